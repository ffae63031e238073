"""Checkpoints as others leave them: what loads, under which names, and what is refused in one line."""

import argparse
import datetime
import json
import logging
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOTH, Digits, run_program
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdcd import models, weights

NAME = "cifar:resnet8"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return models.build(NAME, classes=7).original_state_dict()


def loads(path: Path, tensors: Mapping[str, Tensor], **options: Any) -> bool:
    """Whether a file gives a network these weights."""
    model = models.build(NAME, classes=7)
    weights.load_into(model, path, what="teacher", **options)
    return weights.digest(model.original_state_dict()) == weights.digest(tensors)


def refusal(path: Path, **options: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        weights.load_into(models.build(NAME, classes=7), path, what="teacher", **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message, message
    return message


# ---- wrappers


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "Lightning": lambda t: {"epoch": 3, "pytorch-lightning_version": "2", "state_dict": below("model.", t)},
    "Lightning, compiled": lambda t: {"state_dict": below("model._orig_mod.", t)},
    "DDP around Lightning's model": lambda t: {"state_dict": below("model.module.", t)},
    "compiled in DDP": lambda t: {"model": below("module._orig_mod.", t)},
    "a student beside its optimizer": lambda t: {
        "student": t,
        "optimizer": {"state": {0: {"step": torch.ones(())}}},
    },
    "DINO": lambda t: {"student": below("module.backbone.", t), "teacher": below("backbone.", t), "epoch": 1},
    "ema": lambda t: {"ema": below("module.", t), "updates": 7},
    "BasicSR": lambda t: {"params": t},
    "timm's model_ema": lambda t: {"model_ema": t, "epoch": 2},
    "averaged": lambda t: {**below("module.", t), "n_averaged": torch.tensor(5)},
    "thop": lambda t: {
        **t,
        "total_ops": torch.zeros(1),
        "layer1.total_params": torch.zeros(1, dtype=torch.float64),
    },
    "a name of its own": lambda t: {"resnet": t, "best": torch.tensor(0.7), "args": {"lr": 0.1}},
    "numbers among tensors": lambda t: {**t, "epoch": 3, "arch": "resnet8"},
    "parameters": lambda t: {name: nn.Parameter(value, requires_grad=False) for name, value in t.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_of_training_programs(tensors: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
    torch.save(WRAPPED[wrapper](tensors), tmp_path / "x.pth")
    assert loads(tmp_path / "x.pth", tensors)
    assert models.trained_classes(NAME, tmp_path / "x.pth") == 7


def test_tensors_beside_the_network_are_named(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(weights.log, "handlers", [handler])
    torch.save(
        {"state_dict": {**below("model.", tensors), "criterion.weight": torch.ones(7)}}, tmp_path / "x.ckpt"
    )
    assert loads(tmp_path / "x.ckpt", tensors)
    assert len(said) == 1 and "criterion.weight lie beside the network's tensors (model.*)" in said[0]


def test_several_networks_that_fit_are_not_guessed_between(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": below("student.", tensors) | below("teacher.", tensors)}, tmp_path / "x.ckpt")
    message = refusal(tmp_path / "x.ckpt")
    assert "2 networks in it fit: student.*, teacher.*" in message
    torch.save({"first": tensors, "second": tensors}, tmp_path / "y.pth")
    assert "several state dicts in it (first, second)" in refusal(tmp_path / "y.pth")
    torch.save({**tensors, **below("module.", tensors)}, tmp_path / "z.pth")
    assert "twice" in refusal(tmp_path / "z.pth")


def test_batch_counters_may_be_missing_as_before_pytorch_0_4_1(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """torch's own strict loading allows it; here the network is fresh, so that its counters are zero."""
    old = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    torch.save({"state_dict": below("module.", old), "best_prec1": 93.4}, tmp_path / "old.th")
    assert loads(tmp_path / "old.th", tensors)
    torch.save(list_names := {f"{n}": value for n, value in enumerate(old.values())}, tmp_path / "renamed.th")
    assert len(list_names) == len(old) and loads(tmp_path / "renamed.th", tensors, by_order=True)


def test_every_tensor_that_does_not_fit_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(tensors)
    torch.save({**{n: tensors[n] for n in names[2:]}, "odd": torch.ones(2)}, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert "2 tensors missing, 1 unexpected" in message and names[0] in message and names[1] in message
    torch.save({**tensors, **{f"more.{n}": torch.ones(2) for n in range(5)}}, tmp_path / "x.pth")
    assert "more.0, more.1, more.2 and 2 more" in refusal(tmp_path / "x.pth")


# ---- what lies beside the weights


def test_arguments_and_figures_beside_the_weights_do_not_hinder(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    options = argparse.Namespace(lr=0.1, data=Path("/data"), nested=argparse.Namespace(x=1))
    beside = {
        "arguments": options,
        "numpy scalar": np.float64(71.2),
        "numpy array": np.array([71.2]),
        "date": datetime.datetime(2024, 1, 1),
        "default": __import__("collections").defaultdict(list, a=[1]),
    }
    for number, (name, value) in enumerate(beside.items()):
        for new in (True, False):
            path = tmp_path / f"{number}.pth"
            torch.save({"model": tensors, "args": value}, path, _use_new_zipfile_serialization=new)
            assert loads(path, tensors), name


def test_dictionaries_of_configuration_packages_load_without_the_package(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """A yacs CfgNode is a dict by another name: the name is all that stands in the pickle."""
    import sys
    import types

    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    sys.modules.update({"yacs": package, "yacs.config": module})
    try:
        settings = module.CfgNode(lr=0.1)
        settings.frozen = True
        torch.save({"state_dict": tensors, "cfg": settings}, tmp_path / "x.pth")
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    assert loads(tmp_path / "x.pth", tensors)


def test_a_whole_model_says_what_stands_in_the_way(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert "torch.nn.modules.container.Sequential" in message and "model.state_dict()" in message


# ---- what is no weight file


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html>\n<html><head><title>Google Drive - Quota exceeded</title></head></html>")


def archive(path: Path) -> None:
    inner = path.with_name("inner.pth")
    inner.write_bytes(b"weights")
    with tarfile.open(path, "w") as file:
        file.add(inner, "inner.pth")


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/weights.bin", b"weights")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 26))


def run_checkpoint(path: Path) -> None:
    torch.save({"progress": {"step": 3}, "module": {"student.network.x": torch.ones(1)}, "random": {}}, path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.touch(), "is empty (0 bytes)"),
        (lfs, "Git LFS pointer"),
        (web_page, "is a web page"),
        (archive, "is a tar archive"),
        (other_zip, "zip archive without a PyTorch checkpoint"),
        (bomb, "would grow to"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(50)), "is compressed (gzip)"),
        (lambda path: path.write_text(json.dumps({"weight_map": {}})), "is JSON"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "HDF5"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: None, "no such file"),
        (lambda path: __import__("os").mkfifo(path), "not a regular file"),
        (run_checkpoint, "student.safetensors"),
        (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "TorchScript"),
    ],
)
def test_files_that_are_something_else_are_told_so(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / "teacher.pth")
    assert says in refusal(tmp_path / "teacher.pth")


def test_safetensors_under_another_name_and_the_other_way_round(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "weights.bin")
    torch.save(tensors, tmp_path / "weights.safetensors")
    assert loads(tmp_path / "weights.bin", tensors) and loads(tmp_path / "weights.safetensors", tensors)


def test_crafted_and_damaged_files_end_in_one_line(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Bytes changed where the structure is written down: each file loads, or is refused in a line."""
    generator, network = random.Random(0), models.build(NAME, classes=7)
    torch.save(tensors, tmp_path / "x.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pth", "old.pth", "x.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for number in range(30):
            damaged = bytearray(whole)
            at = generator.randrange(4000) if number % 3 else len(whole) - 1 - generator.randrange(2000)
            damaged[at] ^= 1 << generator.randrange(8)
            path = tmp_path / f"damaged{Path(name).suffix}"
            path.write_bytes(damaged)
            try:
                weights.load_into(network, path)
            except ValueError as error:
                assert "\n" not in str(error), (name, at)


def test_numbers_that_are_no_weights_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    cases = {
        "not finite": torch.full_like(tensors["conv1.weight"], float("nan")),
        "int8": torch.zeros_like(tensors["conv1.weight"], dtype=torch.int8),
        "complex64": torch.zeros_like(tensors["conv1.weight"], dtype=torch.complex64),
        "sparse": tensors["conv1.weight"].to_sparse(),
    }
    for says, value in cases.items():
        torch.save({**tensors, "conv1.weight": value}, tmp_path / "x.pth")
        message = refusal(tmp_path / "x.pth")
        assert says in message and "conv1.weight" in message
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    torch.save(half, tmp_path / "half.pth")
    assert loads(tmp_path / "half.pth", {name: value.to(tensors[name].dtype) for name, value in half.items()})


# ---- in a run


def test_a_missing_teacher_names_the_key_and_how_to_make_one(digits: Digits, tmp_path: Path) -> None:
    for checkpoint, says in ((tmp_path / "teacher.pth", "no such file"), (None, "is missing")):
        teacher = {"mode": "online", "checkpoint": checkpoint and str(checkpoint)}
        ran = run_program(
            "fastdcd/train.py", "--config", digits.file(tmp_path / "x.yaml", teacher=teacher, loss=BOTH)
        )
        assert ran.code == 2 and ran.err.count("\n") == 1
        assert "teacher.checkpoint" in ran.err and says in ran.err
        assert "student.model=cifar:resnet8 and teacher.mode=none" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_student_may_begin_from_weights_of_other_classes(digits: Digits, tmp_path: Path) -> None:
    """Everything but the classifier comes from the file; the classifier is the seed's own."""
    torch.manual_seed(0)
    other = models.build(NAME, classes=100).original_state_dict()
    weights.save(tmp_path / "x.safetensors", other)
    assert "student.fresh_classifier=true" not in refusal(tmp_path / "x.safetensors")
    torch.manual_seed(1)
    model = models.build(NAME, classes=7)
    classifier = model.classifier.weight.clone()
    weights.load_into(model, tmp_path / "x.safetensors", what="student", classifier=False)
    assert torch.equal(model.classifier.weight, classifier)
    assert torch.equal(model.original_state_dict()["conv1.weight"], other["conv1.weight"])
