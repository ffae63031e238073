"""What benchmarks of whole runs share: a run of two epochs and what its second took, and lines of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.state import AcceleratorState, GradientState

from fastdcd.config import Config
from fastdcd.train import train

# Settings of a run of which only the speed or the accuracy at the end matters.
QUIET = ["teacher.evaluate=false", "run.trackers=[]", f"eval.every={10**6}", f"train.log_every={10**6}"]


class Epoch(NamedTuple):
    """Seconds of an epoch without its evaluation, and the share of them that steps waited for data."""

    seconds: float
    data_wait: float


def fresh(cfg: Config) -> dict[str, Any]:
    """Train in a folder that is emptied first; the summary."""
    assert cfg.run.dir is not None
    shutil.rmtree(cfg.run.dir, ignore_errors=True)
    forget_accelerate()
    return train(cfg)


def forget_accelerate() -> None:
    """Accelerate keeps its settings for the life of a process: another precision needs a new start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def second_epoch(cfg: Config) -> Epoch:
    """The second epoch of a run of two with the settings QUIET: the first starts workers and warms up."""
    assert cfg.run.dir is not None and cfg.train.epochs == 2
    fresh(cfg)
    found = lines(cfg.run.dir / "metrics.jsonl")
    first, second = [line["seconds"] for line in found if line["kind"] == "epoch"]
    (step,) = [line for line in found if line["kind"] == "train" and line["epoch"] == 1]  # of the whole epoch
    return Epoch(second - first, step["data_wait"])


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one object to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
