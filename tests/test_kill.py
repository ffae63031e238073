"""kill -9 at random moments: what is resumed ends as if nothing had happened, bit for bit."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import BOTH, ROOT, Digits, metric_lines

from fastdcd import config, filling
from fastdcd.train import train

# A server that has imported everything forks each process: a kill every second, not every ten.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["fastdcd.train", "fastdcd.filling"])


def run_training(file: Path) -> None:
    train(config.load(file, ["train.resume=auto"]))


def run_fill(file: Path) -> None:
    filling.FLUSH_SECONDS = 0.05  # many small flushes: many moments to be killed between them
    with (parts := filling.open_parts(config.load(file))).loader:
        filling.fill(parts)


def start(target: Callable[[Path], None], file: Path) -> BaseProcess:
    process = FORK.Process(target=target, args=(file,))
    process.start()
    return process


def killed(process: BaseProcess, when: Callable[[], bool]) -> bool:
    """Kill -9 as soon as `when` holds. False if the process had ended before."""
    while process.is_alive() and not when():
        time.sleep(0.001)
    assert process.pid
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def after(seconds: float) -> Callable[[], bool]:
    begin = time.monotonic()
    return lambda: time.monotonic() - begin > seconds


def finish(target: Callable[[Path], None], file: Path) -> float:
    begin = time.monotonic()
    process = start(target, file)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def same_files(ours: Path, theirs: Path, pattern: str) -> None:
    files = sorted(path.name for path in theirs.glob(pattern))
    assert files and files == sorted(path.name for path in ours.glob(pattern))
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.timeout(240)
def test_training_and_filling_survive_20_kills(digits: Digits, tmp_path: Path) -> None:
    moments = random.Random(2407)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        digits.file(
            tmp_path / name / "x.yaml",
            loss=BOTH,
            teacher={"mode": "cached"},
            views={"count": 40},
            cache={"path": str(tmp_path / name / "cache")},
            train={"epochs": 40, "checkpoint_every": 3, "log_every": 20},
            data={"batch_size": 32},
            eval={"every": 10},
        )
    whole, parts = tmp_path / "whole" / "x.yaml", tmp_path / "parts" / "x.yaml"

    # ---- the cache: 6 kills
    whole_fill = finish(run_fill, whole)
    count = 0
    while count < 6:
        assert killed(start(run_fill, parts), after(moments.uniform(0.1, 0.8) * whole_fill)), "it was too quick"
        count += 1
    finish(run_fill, parts)
    same_files(tmp_path / "parts" / "cache", tmp_path / "whole" / "cache", "view-*")
    same_files(tmp_path / "parts" / "cache", tmp_path / "whole" / "cache", "manifest.json")

    # ---- training: 14 kills, 4 of them while a checkpoint is being written
    whole_training = finish(run_training, whole)
    checkpoints = tmp_path / "parts" / "run" / "checkpoints"
    for number in range(14):
        process = start(run_training, parts)
        if number % 4 == 3:
            landed = killed(process, lambda: any(checkpoints.glob(".step-*.tmp")))
        else:
            landed = killed(process, after(moments.uniform(0.05, 0.35) * whole_training))
        assert landed, f"kill {number} came after the end"
    finish(run_training, parts)
    same_files(tmp_path / "parts" / "run", tmp_path / "whole" / "run", "student.safetensors")
    ours, theirs = (metric_lines(tmp_path / name / "run", "eval") for name in ("parts", "whole"))
    assert ours == theirs
    steps = [line["step"] for line in metric_lines(tmp_path / "parts" / "run", "train")]
    assert steps == sorted(set(steps)), "no step is told twice"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(digits: Digits, tmp_path: Path, number: int) -> None:
    file = digits.file(tmp_path / "x.yaml", teacher={"mode": "none"}, train={"epochs": 200})
    command = [sys.executable, str(ROOT / "fastdcd" / "train.py"), "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "--resume auto" in out
    last = metric_lines(tmp_path / "run", "train")[-1]["step"]
    saved = max(int(path.stem.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == last, "nothing that was done is lost"
