"""A newcomer's mistakes: each ends with one clear line, exit code 2, and nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH, Digits, run_program
from PIL import Image

from fastdcd import models, weights
from pipelines.loaders.resident_loader import ResidentLoader

TRAIN, CACHE, CONVERT = "fastdcd/train.py", "tools/cache_teacher.py", "tools/convert.py"
Sections = dict[str, dict[str, Any]]
CACHED: Sections = {"loss": BOTH, "teacher": {"mode": "cached"}, "views": {"count": 1}}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(program: str, *arguments: object, says: list[str]) -> None:
    """One line on stderr with these words in it, exit code 2."""
    ran = run_program(program, *arguments)
    assert ran.code == 2, ran
    lines = [line for line in ran.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in ran.err, ran.err
    for word in says:
        assert word in lines[0], lines[0]


CONFIGS: dict[str, tuple[Sections, list[str]]] = {
    "unknown key": ({"optim": {"learning_rate": 1}}, ["optim.learning_rate", "no such key"]),
    "misspelt key": ({"data": {"batch_sise": 64}}, ["data.batch_sise", "did you mean data.batch_size?"]),
    "key of another section": ({"optim": {"epochs": 3}}, ["optim.epochs", "did you mean train.epochs?"]),
    "wrong type": ({"train": {"epochs": "ten"}}, ["train.epochs", "'ten'", "integer"]),
    "out of range": ({"data": {"batch_size": 0}}, ["data.batch_size", "greater than 0"]),
    "unknown choice": ({"views": {"family": "randomcrop"}}, ["views.family", "random_resized_crop"]),
    "unknown backend": ({"data": {"backend": "dataloader"}}, ["data.backend", "torch", "resident"]),
    "missing folder": ({"data": {"train": "/no/such/folder"}}, ["data.train", "/no/such/folder", "no such"]),
    "unknown model": ({"student": {"model": "cifar:resnet18x"}}, ["resnet18x", "did you mean"]),
    "model without library": ({"student": {"model": "resnet18"}}, ["'resnet18'", "torchvision:NAME"]),
    "no teacher for kd": ({"loss": {"kd": 1}, "teacher": {"mode": "none"}}, ["teacher.mode", "loss.kd"]),
    "label count": ({"student": {"classes": 7}}, ["student.classes", "7", "10"]),
    "missing checkpoint": ({"teacher": {"mode": "online", "checkpoint": "/no/such.pth"}}, ["/no/such.pth"]),
    "no cache": ({**CACHED, "cache": {"path": "/no/cache"}}, ["/no/cache", "fill"]),
    "fp16 on a CPU": ({"train": {"precision": "fp16"}}, ["train.precision", "bf16"]),
    "unknown optimizer": ({"optim": {"name": "timm:sdg"}}, ["optim.name", "sdg"]),
    "crop range": ({"views": {"family": "random_resized_crop", "scale": [0.9, 0.1]}}, ["views.scale", "0.9"]),
    "no such resume": ({"train": {"resume": "last"}}, ["train.resume", "'last'", "auto"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(digits: Digits, tmp_path: Path, name: str) -> None:
    sections, says = CONFIGS[name]
    fails(TRAIN, "--config", digits.file(tmp_path / "x.yaml", **sections), says=says)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_command_line(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml")
    fails(TRAIN, "--config", tmp_path / "missing.yaml", says=["missing.yaml", "no such config file"])
    fails(TRAIN, "--config", file, "--set", "train.epoch=3", says=["train.epoch", "did you mean train.epochs?"])
    fails(TRAIN, "--config", file, "--set", "train.epochs", says=["section.key=value"])
    file.write_text("data: [unclosed")
    fails(TRAIN, "--config", file, says=["x.yaml", "not valid YAML", "line 1"])
    file.write_text("data: {train: a}\ndata: {val: b}\n")
    fails(TRAIN, "--config", file, says=["'data'", "duplicate"])


# ---- folders of images


def empty_class(root: Path) -> list[str]:
    (root / "train" / "10").mkdir()
    return ["train/10", "no images"]


def text_named_png(root: Path) -> list[str]:
    (root / "train" / "3" / "notes.png").write_text("this is no picture")
    return ["3/notes.png", "not a readable image"]


def cut_short(root: Path) -> list[str]:
    path = sorted((root / "train" / "3").iterdir())[0]
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:300])
    return [path.name, "cannot be decoded"]


def no_classes(root: Path) -> list[str]:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return ["train", "no class folders"]


def other_classes(root: Path) -> list[str]:
    shutil.rmtree(root / "val" / "9")
    return ["data.val", "9 classes", "10", "'9'"]


@pytest.mark.parametrize("spoil", [empty_class, text_named_png, cut_short, no_classes, other_classes])
@pytest.mark.parametrize("workers", [0, 1])
def test_image_folders(digits: Digits, tmp_path: Path, spoil: Callable[[Path], list[str]], workers: int) -> None:
    root = tmp_path / "images"
    shutil.copytree(digits.folder, root)
    says = spoil(root)
    data = {"train": f"{root}/train", "val": f"{root}/val", "backend": "torch", "workers": workers}
    file = digits.file(tmp_path / "x.yaml", data=data, teacher={"mode": "none"}, train={"epochs": 1})
    fails(TRAIN, "--config", file, says=says)


# ---- checkpoints and caches


def other_architecture(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    tensors = models.build("cifar:resnet14", classes=10).original_state_dict()
    weights.save(folder / "t.safetensors", tensors)
    return {"teacher": {"mode": "online", "checkpoint": f"{folder}/t.safetensors"}}, [
        "t.safetensors",
        "unexpected",
    ]


def other_label_count(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    weights.save(folder / "t.safetensors", models.build("cifar:resnet8", classes=100).original_state_dict())
    return {"teacher": {"mode": "online", "checkpoint": f"{folder}/t.safetensors"}}, ["100 classes", "10"]


def unsafe_pickle(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    torch.save({"model": os.getcwd}, folder / "t.pth")
    return {"teacher": {"mode": "online", "checkpoint": f"{folder}/t.pth"}}, ["t.pth", "cannot be read safely"]


@pytest.mark.parametrize("make", [other_architecture, other_label_count, unsafe_pickle])
def test_teacher_checkpoints(
    digits: Digits, tmp_path: Path, make: Callable[[Digits, Path], tuple[Sections, list[str]]]
) -> None:
    sections, says = make(digits, tmp_path)
    fails(TRAIN, "--config", digits.file(tmp_path / "x.yaml", **sections), says=says)


@pytest.fixture(scope="module")
def cache(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    file = digits.file(folder / "fill.yaml", **{**CACHED, "cache": {"path": f"{folder}/cache"}})
    assert run_program(CACHE, "fill", "--config", file).code == 0
    return folder / "cache"


def another_teacher(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    tensors = dict(weights.load(digits.teacher))
    tensors["conv1.weight"] = tensors["conv1.weight"].clone()
    tensors["conv1.weight"][0, 0, 0, 0] += 1e-3
    weights.save(folder / "t.safetensors", tensors)
    return {"teacher": {"checkpoint": f"{folder}/t.safetensors"}}, ["teacher.weights"]


def another_dataset(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    return {"data": {"train": str(digits.resident / "val")}}, ["rows", "500", "200"]


def same_size_dataset(digits: Digits, folder: Path) -> tuple[Sections, list[str]]:
    shutil.copytree(digits.folder / "train", folder / "images")
    first = sorted((folder / "images" / "0").iterdir())[0]
    first.rename(first.with_name("renamed.png"))
    ran = run_program(CONVERT, "resident", folder / "images", folder / "resident")
    assert ran.code == 0, ran.err
    return {"data": {"train": str(folder / "resident")}}, ["data.index"]


CACHE_MISMATCHES: dict[str, Callable[[Digits, Path], tuple[Sections, list[str]]]] = {
    "one weight of the teacher": another_teacher,
    "dataset": another_dataset,
    "dataset of the same size": same_size_dataset,
    "seed": lambda digits, folder: ({"views": {"seed": 1}}, ["views.seed", "0", "1"]),
    "family": lambda digits, folder: ({"views": {"family": "random_resized_crop"}}, ["views.family"]),
    "padding": lambda digits, folder: ({"views": {"padding": 2}}, ["views.padding"]),
    "teacher's resolution": lambda digits, folder: ({"teacher": {"image_size": 16}}, ["teacher.image_size", "16"]),
    "normalisation": lambda digits, folder: ({"teacher": {"mean": [0.5, 0.5, 0.5]}}, ["teacher.mean"]),
    "precision": lambda digits, folder: ({"teacher": {"precision": "bf16"}}, ["teacher.precision"]),
    "more views": lambda digits, folder: ({"views": {"count": 2}}, ["views", "1", "2"]),
    "dtype": lambda digits, folder: ({"cache": {"dtype": "fp32"}}, ["dtype", "fp16", "fp32"]),
    "backend": lambda digits, folder: (
        {"data": {"train": f"{digits.folder}/train", "backend": "torch", "val": f"{digits.folder}/val"}},
        ["loader.backend", "resident", "torch", "cache.allow_backend"],
    ),
}


@pytest.mark.parametrize("name", CACHE_MISMATCHES)
def test_a_cache_of_something_else_is_refused(digits: Digits, cache: Path, tmp_path: Path, name: str) -> None:
    changed, says = CACHE_MISMATCHES[name](digits, tmp_path)
    sections: Sections = {**CACHED, "cache": {"path": str(cache)}}
    for section, values in changed.items():
        sections[section] = {**sections.get(section, {}), **values}
    file = digits.file(tmp_path / "x.yaml", **sections)
    before = snapshot(cache)
    fails(TRAIN, "--config", file, says=says)
    if name != "more views":  # filling more views is another matter; a cache of something else is not touched
        fails(CACHE, "fill", "--config", file, says=says)
    assert snapshot(cache) == before


def test_a_named_backend_pair_is_allowed(digits: Digits, cache: Path, tmp_path: Path) -> None:
    data = {"train": f"{digits.folder}/train", "backend": "torch", "val": f"{digits.folder}/val", "workers": 0}
    allowed = {"path": str(cache), "allow_backend": ["resident->torch"]}
    file = digits.file(
        tmp_path / "x.yaml", **{**CACHED, "data": data, "cache": allowed, "train": {"max_steps": 1}}
    )
    ran = run_program(TRAIN, "--config", file)
    assert ran.code == 0 and "least cosine" in ran.err, ran


def test_a_cache_of_another_environment_needs_a_word(
    digits: Digits, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions and device, not the config, decide some pixels: both are named, and the live check is the way on."""
    manifest = json.loads((cache / "manifest.json").read_text())
    noted = {name: value for name, value in manifest["fingerprint"].items() if name.startswith("environment.")}
    assert noted == {"environment.device": "cpu", "environment.tf32": "off"}
    file = digits.file(tmp_path / "x.yaml", **{**CACHED, "cache": {"path": str(cache)}, "train": {"max_steps": 1}})
    before = snapshot(cache)
    with monkeypatch.context() as patch:
        patch.setattr(ResidentLoader, "environment", {"device": "another", "decoder": "new to this run"})
        says = ["filled with device = cpu, this run has another", "cache.allow_environment=true"]
        fails(TRAIN, "--config", file, says=says)
        fails(CACHE, "fill", "--config", file, says=says)
        ran = run_program(TRAIN, "--config", file, "--set", "cache.allow_environment=true")
        assert ran.code == 0 and "with device cpu, read with another: least cosine of 16 rows 1.0000" in ran.err
    assert snapshot(cache) == before
    # a cache that was filled before the environment was noted
    older = {name: value for name, value in manifest["fingerprint"].items() if name not in noted}
    (cache / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": older}))
    try:
        ran = run_program(TRAIN, "--config", file, "--set", f"run.dir={tmp_path / 'older'}")
        assert ran.code == 0 and "cosine" not in ran.err, ran.err
    finally:
        (cache / "manifest.json").write_text(json.dumps(manifest))


# ---- places to write


def test_a_run_is_not_overwritten(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", teacher={"mode": "none"}, train={"epochs": 1})
    assert run_program(TRAIN, "--config", file).code == 0
    before = snapshot(tmp_path / "run")
    fails(TRAIN, "--config", file, says=["already holds a run", "--resume auto"])
    other = ["--set", "student.model=cifar:resnet8", "--resume", "auto"]
    fails(TRAIN, "--config", file, *other, says=["student.model", "cifar:resnet8", "there"])
    assert snapshot(tmp_path / "run") == before


def test_a_damaged_checkpoint(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", teacher={"mode": "none"}, train={"epochs": 1})
    assert run_program(TRAIN, "--config", file).code == 0
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    saved.write_bytes(saved.read_bytes()[:1000])
    fails(TRAIN, "--config", file, "--resume", "auto", says=[saved.name, "damaged"])


def test_unwritable_output(digits: Digits, tmp_path: Path) -> None:
    """A path that runs through a file cannot be written by anyone, root included."""
    (tmp_path / "file").write_text("keep me")
    file = digits.file(tmp_path / "x.yaml", teacher={"mode": "none"}, run={"dir": str(tmp_path / "file" / "run")})
    fails(TRAIN, "--config", file, says=[str(tmp_path / "file")])
    fails(CONVERT, "resident", digits.folder / "train", tmp_path / "file" / "out", says=[str(tmp_path / "file")])
    sections = {**CACHED, "cache": {"path": str(tmp_path / "file" / "cache")}}
    fails(CACHE, "fill", "--config", digits.file(tmp_path / "y.yaml", **sections), says=[str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "keep me"


def test_resident_needs_a_conversion(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", data={"train": str(digits.folder / "train")})
    fails(TRAIN, "--config", file, says=["data.train", "tools/convert.py resident"])


def test_an_interrupted_conversion_is_not_taken_for_a_dataset(digits: Digits, tmp_path: Path) -> None:
    shutil.copytree(digits.resident / "train", tmp_path / "train")
    (tmp_path / "train" / "index.json").unlink()  # it is written last
    file = digits.file(tmp_path / "x.yaml", data={"train": str(tmp_path / "train")})
    fails(TRAIN, "--config", file, says=["data.train", "index.json", "convert"])


def test_a_damaged_index(digits: Digits, tmp_path: Path) -> None:
    shutil.copytree(digits.resident / "train", tmp_path / "train")
    names = tmp_path / "train" / "names.txt"
    names.write_text(names.read_text().replace("0000", "9999", 1))
    file = digits.file(tmp_path / "x.yaml", data={"train": str(tmp_path / "train")})
    fails(TRAIN, "--config", file, says=["data.train", "damaged"])


def test_help_and_usage(digits: Digits) -> None:
    for program in (TRAIN, CACHE, CONVERT):
        ran = run_program(program, "--help")
        assert ran.code == 0 and "example:" in ran.out
        assert run_program(program, "--no-such-flag").code == 2
