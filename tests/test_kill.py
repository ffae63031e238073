"""kill -9 at random moments: what is resumed ends as if nothing had happened, bit for bit."""

import contextlib
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

from fastdcd import config_file
from fastdcd.cache import fill as filling
from fastdcd.train import train

# A server that has imported everything forks each process: a kill every second, not every ten.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["fastdcd.train", "fastdcd.cache.fill", "torch._dynamo"])

ROWS, VIEWS, EPOCHS = 500, 20, 20
KILLS = int(os.environ.get("FASTDCD_KILLS", "8"))  # a third of them in the fill
STEPS = EPOCHS * -(-ROWS // 32)


def run_training(file: Path) -> None:
    train(config_file.load(file, ["train.resume=auto"]))


def run_fill(file: Path) -> None:
    filling.FLUSH_SECONDS = 0.05  # many small flushes: many moments to be killed between them
    with (parts := filling.open_parts(config_file.load(file))).loader:
        filling.fill(parts)


def start(target: Callable[[Path], None], file: Path) -> BaseProcess:
    process = FORK.Process(target=target, args=(file,))
    process.start()
    return process


def kill(process: BaseProcess, when: Callable[[], bool], jitter: float) -> None:
    """Kill -9 `jitter` seconds after `when` holds. Fails if the process ended before."""
    while process.is_alive() and not when():
        time.sleep(0.001)
    time.sleep(jitter)
    assert process.pid and process.is_alive(), "it ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def finish(target: Callable[[Path], None], file: Path) -> None:
    process = start(target, file)
    process.join()
    assert process.exitcode == 0


def rows_written(cache: Path) -> int:
    """Rows of all views that are marked as done."""
    rows = ROWS * len(list(cache.glob("view-*.crc32.npy")))
    for path in cache.glob("view-*.done.npy"):
        with contextlib.suppress(FileNotFoundError):  # complete by now
            rows += path.read_bytes()[-ROWS:].count(1)
    return rows


def newest_step(checkpoints: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in checkpoints.glob("step-*.pt")), default=0)


def same_files(ours: Path, theirs: Path, pattern: str) -> None:
    files = sorted(path.name for path in theirs.glob(pattern))
    assert files and files == sorted(path.name for path in ours.glob(pattern))
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.timeout(240)
def test_training_and_filling_survive_kills(digits: Digits, tmp_path: Path) -> None:
    moments = random.Random(2407)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        digits.file(
            tmp_path / name / "x.yaml",
            loss=BOTH,
            teacher={"mode": "cached"},
            views={"count": VIEWS, "augment": {"mixup": 0.8, "cutmix": 1.0}},
            cache={"path": str(tmp_path / name / "cache")},
            train={"epochs": EPOCHS, "checkpoint_every": 3, "log_every": 20},
            data={"batch_size": 32},
            eval={"every": 10},
        )
    whole, parts = tmp_path / "whole" / "x.yaml", tmp_path / "parts" / "x.yaml"

    # ---- the cache: kills spread over the work
    finish(run_fill, whole)
    cache = tmp_path / "parts" / "cache"
    kills = KILLS // 3
    for number in range(kills):
        rows = int((number + moments.random()) / (kills + 1) * ROWS * VIEWS)
        kill(start(run_fill, parts), lambda: rows_written(cache) > rows, moments.uniform(0, 0.02))  # noqa: B023
    finish(run_fill, parts)
    same_files(cache, tmp_path / "whole" / "cache", "view-*")
    same_files(cache, tmp_path / "whole" / "cache", "manifest.json")

    # ---- training: every other kill while a checkpoint is being written
    finish(run_training, whole)
    checkpoints = tmp_path / "parts" / "run" / "checkpoints"
    kills = KILLS - kills
    for number in range(kills):
        step = int((number + moments.random()) / (kills + 1) * STEPS)
        process = start(run_training, parts)
        if number % 2:
            kill(process, lambda: newest_step(checkpoints) > step and any(checkpoints.glob(".step-*.tmp")), 0.0)  # noqa: B023
        else:
            kill(process, lambda: newest_step(checkpoints) > step, moments.uniform(0, 0.02))  # noqa: B023
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
