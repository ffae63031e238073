"""train.ema: the moving average is what its definition says, is resumed bit for bit, evaluated and saved."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from conftest import BOTH, Digits, metric_lines
from safetensors.torch import load_file
from test_processes import run

from fastdcd import models
from fastdcd.average import MovingAverage
from fastdcd.train import train

EMA: dict[str, Any] = {"loss": BOTH, "teacher": {"mode": "online"}}


def test_it_is_the_average_of_its_definition() -> None:
    torch.manual_seed(0)
    student = models.build("cifar:resnet8", classes=10)
    average = MovingAverage(student, decay=0.9)
    expected = {name: each.clone().double() for name, each in student.state_dict().items()}
    for number in range(30):
        with torch.no_grad():
            for each in student.parameters():
                each.add_(torch.randn_like(each), alpha=0.1)
        taken = number % 5 != 3  # a step that was left out leaves no trace
        average.update(student, number, torch.tensor(taken))
        decay = min(0.9, (1 + number) / (10 + number))
        for name, each in student.state_dict().items():
            if taken and each.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * each.double()
    for name, each in average.network.state_dict().items():
        torch.testing.assert_close(each.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(each.requires_grad for each in average.parameters())


def test_it_changes_nothing_of_the_student_and_is_resumed_evaluated_and_saved(
    digits: Digits, tmp_path: Path
) -> None:
    train(digits.config(tmp_path / "without", **EMA))
    whole = train(digits.config(tmp_path / "whole", train={"ema": 0.95}, **EMA))
    train(digits.config(tmp_path / "parts", train={"ema": 0.95, "max_steps": 11}, **EMA))
    parts = train(digits.config(tmp_path / "parts", train={"ema": 0.95, "resume": "auto"}, **EMA))
    student = "student.safetensors"
    assert (tmp_path / "without" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()
    assert not (tmp_path / "without" / "student-ema.safetensors").exists()
    for name in (student, "student-ema.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert parts["ema_top1"] == whole["ema_top1"] == metric_lines(tmp_path / "whole", "eval")[-1]["ema_top1"]
    ours, averaged = (load_file(tmp_path / "whole" / name) for name in (student, "student-ema.safetensors"))
    assert ours.keys() == averaged.keys() and any((ours[name] != averaged[name]).any() for name in ours)


def test_a_run_does_not_take_up_an_average_in_the_middle(digits: Digits, tmp_path: Path) -> None:
    train(digits.config(tmp_path / "run", train={"max_steps": 3}, **EMA))
    with pytest.raises(ValueError, match=r"train\.ema 0\.0 there, 0\.9 now"):
        train(digits.config(tmp_path / "run", train={"ema": 0.9, "resume": "auto"}, **EMA))


def test_processes_hold_the_same_average(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", train={"ema": 0.9, "epochs": 1}, **EMA)
    run(2, ranks.run_training, file, [])
    first, second = (torch.load(tmp_path / "run" / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    names = [name for name in first if name.startswith("average.")]
    assert names and all(torch.equal(first[name], second[name]) for name in names)
