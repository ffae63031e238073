"""Teachers that have no classifier: their features alone teach."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Digits, metric_lines, run_program

from fastdcd import models, weights
from fastdcd.cache.store import TeacherCache
from fastdcd.train import train

FEATURES = {"classifier": False, "evaluate": True}


def test_features_alone_teach_and_are_cached(digits: Digits, tmp_path: Path) -> None:
    """Trained online and from a cache: equal losses. The checkpoint is of 100 classes, the data of 10."""
    torch.manual_seed(0)
    other = models.build("cifar:resnet8", classes=100).original_state_dict()
    weights.save(tmp_path / "t.safetensors", other)
    curves = []
    for mode in ("online", "fill", "cached"):
        summary = train(
            digits.config(
                tmp_path / mode,
                teacher={**FEATURES, "mode": mode, "checkpoint": str(tmp_path / "t.safetensors")},
                loss={"dcd": 1.0},
                cache={"path": str(tmp_path / "cache"), "dtype": "fp32"},
                train={"epochs": 1},
            )
        )
        assert summary["finished"]
        curves.append([line["loss"] for line in metric_lines(tmp_path / mode, "train")])
    assert curves[0] == curves[1] == curves[2]
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["dim"] == 64
    assert TeacherCache.open(tmp_path / "cache").classifier().weight.shape == (0, 64)


@pytest.mark.parametrize("loss", [{"kd": 1.0}, {"kd": 0.5, "dcd": 1.0}])
def test_losses_that_need_logits_are_refused_in_one_line(
    digits: Digits, tmp_path: Path, loss: dict[str, float]
) -> None:
    file = digits.file(tmp_path / "x.yaml", teacher={**FEATURES, "mode": "online"}, loss=loss)
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert f"loss.kd: got {loss['kd']}" in ran.err and "teacher.classifier is false" in ran.err
    assert not (tmp_path / "run").exists()
