"""Training through its public entry: what is promised of cached teachers, resuming and results."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOTH, Digits, forget_accelerate, metric_lines, run_program
from safetensors.torch import load_file

from fastdcd import config_file, models, weights
from fastdcd.train import train

# Loss of 20 steps of DCD + KD on digits, CPU, float32. A change that moves it changes training itself.
GOLDEN = [
    6.54293,
    6.60648,
    6.56531,
    6.54391,
    6.56653,
    6.55127,
    6.53048,
    6.32279,
    6.46817,
    6.45169,
    6.41833,
    6.43121,
    6.46060,
    6.46306,
    6.48598,
    6.42036,
    6.53588,
    6.48583,
    6.45188,
    6.45011,
]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(run, "train")]


def fill_and_train(digits: Digits, folder: Path, *, views: int, dtype: str, **sections: dict[str, Any]) -> Path:
    cache = {"path": str(folder / "cache"), "dtype": dtype}
    given = {"loss": BOTH, "teacher": {"mode": "cached"}, "views": {"count": views}, "cache": cache, **sections}
    file = digits.file(folder / "cached.yaml", **given)
    ran = run_program("tools/cache_teacher.py", "fill", "--config", file)
    assert ran.code == 0, ran.err
    train(config_file.load(file))
    return folder / "run"


@pytest.mark.parametrize("views", [0, 3, 2, 1])
def test_cached_training_is_online_training_bit_for_bit(digits: Digits, tmp_path: Path, views: int) -> None:
    """Also with fewer views than epochs: the online teacher is then shown the same repeating views."""
    online = digits.config(tmp_path / "online", loss=BOTH, teacher={"mode": "online"}, views={"count": views})
    train(online)
    cached = fill_and_train(digits, tmp_path, views=views, dtype="fp32")
    assert len(losses(cached)) == 3 * 8  # 500 images in batches of 64
    assert losses(cached) == losses(tmp_path / "online")
    assert (cached / "student.safetensors").read_bytes() == (tmp_path / "online/student.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "within"), [("fp16", 1e-4), ("bf16", 3e-4), ("uint8", 3e-4)])
def test_smaller_caches_stay_close(digits: Digits, tmp_path: Path, dtype: str, within: float) -> None:
    """At the same weights (hardly any learning rate) every step's loss; in training, where differences grow from
    step to step, the average step's."""
    for name, optim in (("frozen", {"lr": 1e-6}), ("training", {})):
        (tmp_path / name).mkdir()
        online, scratch = tmp_path / name / "online", tmp_path / name
        train(digits.config(online, loss=BOTH, teacher={"mode": "online"}, optim=optim))
        cached = fill_and_train(digits, scratch, views=0, dtype=dtype, optim=optim)
        ours, exact = np.array(losses(cached)), np.array(losses(online))
        differences = np.abs(ours / exact - 1)
        assert (differences.max() if name == "frozen" else differences.mean()) < within
        assert differences.any(), "a rounded cache cannot give the same bits"


def test_fill_mode_teaches_online_then_reads(digits: Digits, tmp_path: Path) -> None:
    sections = {"loss": BOTH, "views": {"count": 2}, "train": {"epochs": 4}}
    train(digits.config(tmp_path / "online", teacher={"mode": "online"}, **sections))
    filling = digits.config(
        tmp_path / "fill",
        teacher={"mode": "fill"},
        cache={"path": str(tmp_path / "cache"), "dtype": "fp32"},
        **sections,
    )
    summary = train(filling)
    assert summary["teacher_images"] == 2 * 500, "two epochs online, two from the cache"
    assert losses(tmp_path / "fill") == losses(tmp_path / "online")
    cached = digits.config(
        tmp_path / "cached",
        teacher={"mode": "cached"},
        cache={"path": str(tmp_path / "cache"), "dtype": "fp32"},
        **sections,
    )
    assert train(cached)["teacher_images"] == 0
    assert losses(tmp_path / "cached") == losses(tmp_path / "online")


@pytest.mark.parametrize("mode", ["online", "fill"])
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_run_that_stopped_goes_on_bit_for_bit(digits: Digits, tmp_path: Path, mode: str, stop: int) -> None:
    sections = {"loss": BOTH, "views": {"count": 2}, "teacher": {"mode": mode}}
    whole, parts = {"path": str(tmp_path / "cache-a")}, {"path": str(tmp_path / "cache-b")}
    train(digits.config(tmp_path / "whole", cache=whole, **sections))
    stopped = digits.config(tmp_path / "parts", cache=parts, train={"max_steps": stop}, **sections)
    assert not train(stopped)["finished"]
    assert train(digits.config(tmp_path / "parts", cache=parts, train={"resume": "auto"}, **sections))["finished"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("student.safetensors",):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if mode == "fill":
        for file in (tmp_path / "cache-a").glob("view-*"):
            assert file.read_bytes() == (tmp_path / "cache-b" / file.name).read_bytes(), file.name


def test_the_golden_curve(digits: Digits, tmp_path: Path) -> None:
    """An untrained teacher of a seed is the same on every machine; a trained one is not."""
    torch.manual_seed(2407)
    checkpoint = tmp_path / "teacher.safetensors"
    weights.save(checkpoint, models.build("cifar:resnet8", classes=10).original_state_dict())
    teacher = {"mode": "online", "checkpoint": str(checkpoint)}
    train(digits.config(tmp_path / "run", loss=BOTH, teacher=teacher, train={"max_steps": 20}))
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN, rel=1e-3)


def test_results_of_a_run(digits: Digits, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(digits.config(run, loss=BOTH, teacher={"mode": "online"}, run={"trackers": ["tensorboard"]}))
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["step"] == 24 and summary["teacher_images"] == 3 * 500
    assert list((run / "trackers").glob("events.out.tfevents.*"))
    for line in metric_lines(run, "train"):
        named = {"epoch", "step", "loss", "ce", "kd", "dcd_contrast", "dcd_consist", "tau", "lr"}
        assert named <= line.keys() and {"images_per_second", "data_wait"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1
    assert [line["epoch"] for line in metric_lines(run, "eval")] == [0, 1, 2]
    again = config_file.load(run / "config.yaml")
    assert again == digits.config(run, loss=BOTH, teacher={"mode": "online"}, run={"trackers": ["tensorboard"]})


@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:resnet10t", "timm:mobilenetv3_small_050"])
def test_the_student_loads_into_its_own_library(digits: Digits, tmp_path: Path, model: str) -> None:
    train(
        digits.config(
            tmp_path / "run",
            student={"model": model, "image_size": 32},
            teacher={"mode": "none"},
            train={"epochs": 1},
            data={"batch_size": 250},
        )
    )
    library, name = model.split(":")
    if library == "timm":
        import timm

        plain = timm.create_model(name, num_classes=10)
    else:
        import torchvision

        plain = torchvision.models.get_model(name, num_classes=10)
    plain.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)


def test_accumulation_gives_the_gradient_of_the_whole_batch(digits: Digits, tmp_path: Path) -> None:
    """With losses and a network that treat rows one by one, parts of a batch add up to it."""
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, num_classes))\n"
    )
    sections = {"student": {"model": f"{net}:net"}, "loss": {"kd": 1.0}, "teacher": {"mode": "online"}}
    train(digits.config(tmp_path / "whole", **sections))
    train(digits.config(tmp_path / "parts", train={"accumulate": 3}, **sections))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_progressive_resizing_keeps_the_cache(digits: Digits, tmp_path: Path) -> None:
    """The student's size changes with the epoch; the teacher's views, and so its cache, do not."""
    sections = {
        "student": {"image_size": {"0": 8, "2": 12}},
        "teacher": {"mode": "fill", "image_size": 8},
        "views": {"count": 1},
        "loss": BOTH,
        "cache": {"path": str(tmp_path / "cache")},
    }
    summary = train(digits.config(tmp_path / "run", **sections))
    assert summary["teacher_images"] == 500


def test_bf16_trains(digits: Digits, tmp_path: Path) -> None:
    student = {"model": "cifar:resnet8"}
    sections = {"loss": BOTH, "teacher": {"mode": "online", "precision": "bf16"}, "student": student}
    train(digits.config(tmp_path / "full", **sections))
    forget_accelerate()
    train(digits.config(tmp_path / "half", train={"precision": "bf16"}, **sections))
    full, half = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert half != full and half[0] == pytest.approx(full[0], rel=0.02)
    ce = [line["ce"] for line in metric_lines(tmp_path / "half", "train")]
    assert sum(ce[-8:]) < 0.95 * sum(ce[:8])


def test_a_compiled_student_trains_and_is_saved_under_its_own_names(digits: Digits, tmp_path: Path) -> None:
    sections = {"loss": BOTH, "teacher": {"mode": "online"}}
    train(digits.config(tmp_path / "eager", train={"max_steps": 2}, **sections))
    train(digits.config(tmp_path / "compiled", train={"max_steps": 2, "compile": True}, **sections))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    (saved,) = (tmp_path / "compiled" / "checkpoints").iterdir()
    names = torch.load(saved, weights_only=True)["module"].keys()
    assert not any("_orig_mod" in name for name in names)


def test_graphs_of_a_compiled_student_are_of_static_shapes(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short batch at an epoch's end makes no graph, and none that takes any size."""
    seen: list[tuple[bool, list[Any]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        pixels = next(each for each in inputs if isinstance(each, torch.Tensor) and each.shape[1:] == (3, 8, 8))
        seen.append((torch.is_grad_enabled(), [*pixels.shape]))
        return graph

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, dynamic, mode: compiled(self, backend=backend, dynamic=dynamic)
    )
    sections = {"teacher": {"mode": "none"}, "eval": {"batch_size": 128}}
    train(digits.config(tmp_path / "run", train={"epochs": 2, "compile": True}, **sections))
    torch._dynamo.reset()
    sizes = [[64, 3, 8, 8], [128, 3, 8, 8], [72, 3, 8, 8]]  # 500 = 7 x 64 + 52; an evaluation of 200 images
    assert [shape for _, shape in seen] == sizes and [grad for grad, _ in seen] == [True, False, False]
    assert all(type(size) is int for _, shape in seen for size in shape)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "triangular", "one_cycle"])
def test_learning_rates(digits: Digits, tmp_path: Path, schedule: str) -> None:
    section = {"name": schedule, "warmup": 1, "milestones": [2]}
    train(digits.config(tmp_path / "run", teacher={"mode": "none"}, schedule=section))
    rates = [line["lr"] for line in metric_lines(tmp_path / "run", "train")]
    assert rates[0] < rates[4] < rates[8] == pytest.approx(0.1), "up over the first epoch"
    expected = {"constant": 0.1, "step": 0.01, "cosine": 0.0, "triangular": 0.0, "one_cycle": 0.0}[schedule]
    assert rates[-1] == pytest.approx(expected, abs=0.01)
    if schedule == "step":
        assert rates[15] == pytest.approx(0.1) and rates[16] == pytest.approx(0.01)


def test_a_teacher_is_judged_before_training(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(digits.config(tmp_path / "run", teacher={"mode": "online", "evaluate": True}, train={"max_steps": 1}))
    printed = capsys.readouterr().out
    top1 = metric_lines(digits.teacher.parent, "eval")[-1]["top1"]
    assert re.search(rf"teacher +cifar:resnet8, .*; top-1 {top1:.2f} %", printed)


def test_every_weight_moves_and_only_those_meant_to_decay_do(digits: Digits, tmp_path: Path) -> None:
    from fastdcd.distill import DistillModule, no_weight_decay
    from fastdcd.losses.terms import loss_section
    from fastdcd.models import build, normalize_for

    cfg = digits.config(tmp_path, loss=BOTH, teacher={"mode": "online"})
    module = DistillModule(
        build("cifar:resnet8", classes=10), normalize_for("cifar:resnet8"), cfg.loss, teacher_dim=64
    )
    default = no_weight_decay(module, decay_norms_and_biases=False)
    assert {"terms.dcd.log_tau", "terms.dcd.b", "terms.dcd.student_head.bias"} <= default
    assert {"student.network.bn1.weight", "student.classifier.bias"} <= default
    literature = no_weight_decay(module, decay_norms_and_biases=True)
    assert {"terms.dcd.log_tau", "terms.dcd.b", "terms.dcd.teacher_head.bias"} <= literature
    assert not any(name.startswith("student.") for name in literature)
    no_distillation = DistillModule(
        build("cifar:resnet8", classes=10), normalize_for("cifar:resnet8"), loss_section()(), teacher_dim=64
    )
    assert not list(no_distillation.terms.parameters()), "a weight of zero costs nothing"


def test_deterministic_seeds(digits: Digits, tmp_path: Path) -> None:
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(digits.config(tmp_path / run, teacher={"mode": "none"}, run={"seed": seed}, train={"epochs": 1}))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert torch.get_num_threads() >= 1
