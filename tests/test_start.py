"""What a run says and refuses before its first step."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH, Digits, metric_lines, run_program

from fastdcd import progress, start_summary
from fastdcd.evaluate import Accuracy
from fastdcd.start_summary import Facts

USUAL = Facts(
    images=50_000,
    val_images=10_000,
    classes=100,
    shorter_side=10,
    steps_per_epoch=782,
    processes=1,
    device="cpu",
    student_parameters=78_000,
    teacher="cifar:resnet20, online",
    teacher_accuracy=Accuracy(71.2, 92.0, 1.0),
)


def test_a_run_says_what_it_is_about_to_do(digits: Digits, tmp_path: Path) -> None:
    """And the teacher's accuracy is in its metrics and its summary."""
    file = digits.file(tmp_path / "x.yaml", teacher={"mode": "online", "evaluate": True}, loss=BOTH)
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 0, ran.err
    for says in (
        "500 images of 10 classes, 200 to evaluate; loader resident, stored at about 8 px",
        "tiny.py:tiny, ",
        "cifar:resnet8, online, at 8 px; top-1 ",
        "3 epochs of 8 steps, 24 in all; 64 images per step on 1 process (cpu, fp32)",
        "warning: 24 steps in all are too few",
    ):
        assert says in ran.out, ran.out
    (line,) = metric_lines(tmp_path / "run", "teacher")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert line["step"] == 0 and summary["teacher_top1"] == line["top1"] > 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"images": 9_000}, ["swapped"]),
        ({"images": 50, "val_images": 20}, ["one step per epoch"]),
        ({"shorter_side": 3}, ["enlarged"]),
        ({"shorter_side": 500}, ["--max-size 16"]),
        ({"steps_per_epoch": 20}, ["60 steps in all are too few"]),
        ({"teacher_accuracy": Accuracy(1.3, 5.0, 4.6)}, ["hardly more than chance"]),
        ({"teacher_accuracy": None, "teacher": ""}, []),
    ],
)
def test_what_is_likely_a_mistake_is_said(
    digits: Digits, tmp_path: Path, change: dict[str, Any], says: list[str]
) -> None:
    cfg = digits.config(tmp_path)
    found = list(start_summary.warnings(cfg, replace(USUAL, **change)))
    assert len(found) == len(says)
    assert all(each in line for each, line in zip(says, found, strict=True)), found


NET = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(),
                         nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize(("batch_size", "accumulate", "rows"), [(499, 1, 1), (71, 4, 3), (3, 2, 3)])
def test_a_single_row_that_batchnorm_cannot_take_is_refused_before_training(
    digits: Digits, tmp_path: Path, batch_size: int, accumulate: int, rows: int
) -> None:
    (tmp_path / "net.py").write_text(NET)
    sections: dict[str, Any] = {
        "data": {"batch_size": batch_size},
        "train": {"accumulate": accumulate, "epochs": 1},
        "student": {"model": f"{tmp_path}/net.py:net"},
    }
    ran = run_program("fastdcd/train.py", "--config", digits.file(tmp_path / "x.yaml", **sections))
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert f"data.batch_size: got {batch_size} for 500 images" in ran.err and f" of {rows} rows" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_single_row_that_the_student_can_take_is_trained_on(digits: Digits, tmp_path: Path) -> None:
    """Its maps are larger than 1 x 1; and looking whether it can moves neither weights nor statistics."""
    ran = run_program(
        "fastdcd/train.py",
        "--config",
        digits.file(tmp_path / "x.yaml", data={"batch_size": 499}, train={"epochs": 1}),
    )
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("trackers", "says"),
    [
        (["tensorbord"], "got 'tensorbord', expected some of aim, clearml, comet_ml"),
        (["tensorboard", "dvclive"], "dvclive is not installed: pip install dvclive"),
        (["comet_ml"], "pip install comet-ml"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_training(
    digits: Digits, tmp_path: Path, trackers: list[str], says: str
) -> None:
    file = digits.file(tmp_path / "x.yaml", run={"trackers": trackers})
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and ran.err.count("\n") == 1 and says in ran.err
    assert not (tmp_path / "run").exists()


def test_logs_show_long_work_alive_line_by_line() -> None:
    """Where there is no terminal: whole lines on stderr, no control characters, at most one per interval."""
    script = (
        "from fastdcd import progress\n"
        "progress.LINE_SECONDS = 0.0\n"
        "bar = progress.ProgressBar('train', 8, 'steps', initial=5)\n"
        "bar.note('99 images/s')\n"
        "for _ in range(3): bar.update()\n"
        "bar.close()\n"
        "progress.LINE_SECONDS = 60.0\n"
        "bar = progress.ProgressBar('fill', 8, 'rows')\n"
        "for _ in range(3): bar.update()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "" and "\r" not in ran.stderr
    lines = ran.stderr.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"train: {done} of 8 steps" for done in (6, 7, 8)]
    assert all("99 images/s" in line for line in lines)
    assert progress.LINE_SECONDS == 30


# ---- features that a cache cannot hold


def _teacher(digits: Digits, tmp_path: Path, factor: float) -> dict[str, Any]:
    """The digits' teacher with features `factor` times as large."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(digits.teacher)
    last = [name for name in tensors if name.startswith("layer3") and name.endswith("bn2.weight")][-1]
    for name in (last, last.replace("weight", "bias")):
        tensors[name] = tensors[name] * factor
    save_file(tensors, tmp_path / "t.safetensors")
    return {"checkpoint": str(tmp_path / "t.safetensors")}


@pytest.mark.parametrize("program", ["cache_teacher", "train"])
def test_features_beyond_a_caches_range_are_refused_before_anything_is_written(
    digits: Digits, tmp_path: Path, program: str
) -> None:
    """The dtype that is named then holds them."""
    teacher = {"mode": "fill", **_teacher(digits, tmp_path, 1e6)}
    sections: dict[str, Any] = {"teacher": teacher, "loss": BOTH, "cache": {"path": str(tmp_path / "cache")}}
    file = digits.file(tmp_path / "x.yaml", **sections)
    command = ("tools/cache_teacher.py", "fill") if program == "cache_teacher" else ("fastdcd/train.py",)
    ran = run_program(*command, "--config", file)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "cache.dtype: fp16 cannot hold" in ran.err, ran.err
    assert "cache.dtype=bf16" in ran.err and not (tmp_path / "cache").exists()
    if program == "cache_teacher":
        ran = run_program(*command, "--config", file, "--set", "cache.dtype=bf16")
        assert ran.code == 0, ran.err
        ran = run_program("fastdcd/train.py", "--config", file, "--set", "cache.dtype=bf16", "teacher.mode=cached")
        assert ran.code == 0, ran.err


def test_a_row_that_is_not_finite_ends_a_fill_and_is_not_stored(tmp_path: Path) -> None:
    from fastdcd import models
    from fastdcd.cache.manifest import CODECS, Manifest
    from fastdcd.cache.store import TeacherCache

    for dtype in CODECS:
        manifest = Manifest(rows=4, dim=3, views=1, dtype=dtype, fingerprint={})
        cache = TeacherCache.create(tmp_path / dtype, manifest, models.no_outputs(3))
        cache.view(0).start()
        cache.view(0).write(torch.tensor([0]), torch.ones(1, 3))
        features = torch.ones(2, 3)
        features[1, 2] = 1e6 if dtype == "fp16" else float("inf")
        with pytest.raises(ValueError, match=r"1 of 2 images \(first: sample 3\) are not finite, or beyond"):
            cache.view(0).write(torch.tensor([2, 3]), features)
        cache.flush()
        assert cache.view(0).done().tolist() == [True, False, False, False]


def test_rows_of_zeros_agree_with_themselves() -> None:
    """A teacher may give nothing but zeros for a black image: no reason to refuse its cache."""
    from fastdcd.cache.storable import check_storable, least_cosine

    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert least_cosine(rows, rows) == 1
    assert least_cosine(rows, torch.ones(2, 2)) == 0
    check_storable(rows, "fp16")


def test_features_that_a_dtype_would_change_name_one_that_keeps_them() -> None:
    """Too small for fp16, all of them beyond it, or one of each row."""
    from fastdcd.cache.storable import check_storable

    rows = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    spread = torch.cat([rows, torch.full((16, 1), 1e5)], 1)
    for features, dtype in ((rows * 1e-7, "fp16"), (rows * 1e6, "fp16"), (spread, "fp16")):
        with pytest.raises(ValueError, match=rf"{dtype} cannot hold .* reach .* cache.dtype=bf16"):
            check_storable(features, dtype)
    with pytest.raises(ValueError, match="of 1 of 16 images are not finite"):
        check_storable(rows.index_fill(0, torch.tensor([3]), float("nan")), "bf16")


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bf16_without_instructions_for_it_is_warned_of(
    capability: str, warned: bool, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdcd import start_summary

    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    cfg = digits.config(tmp_path / "run", train={"precision": "bf16", "epochs": 50})
    facts = start_summary.Facts(
        images=500,
        val_images=100,
        classes=10,
        shorter_side=8,
        steps_per_epoch=8,
        processes=1,
        device="cpu",
        student_parameters=1000,
    )
    assert any("bf16 is emulated" in line for line in start_summary.warnings(cfg, facts)) == warned
    plain = digits.config(tmp_path / "run", train={"epochs": 50})
    assert not list(start_summary.warnings(plain, facts))
