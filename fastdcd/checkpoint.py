"""Checkpoints: everything a run needs to go on bit for bit, in one file that is there whole or not at all."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from fastdcd.config import Config
from pipelines.files import replace_file


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Attributes:
        epoch: the epoch in progress, or the next one.
        step_in_epoch: steps of it that are done.
        step: optimizer steps done in all.
        seconds: time spent training so far.
        teacher_images: images the teacher looked at so far.
        best_top1: best evaluation so far, percent.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    teacher_images: int = 0
    best_top1: float = 0.0


def save(
    config: Config, progress: Progress, module: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Write step-N.pt into the run's checkpoints (one process does) and remove all but the newest few."""
    if not accelerator.is_main_process:
        return
    assert config.run.dir is not None
    folder, scaler = config.run.dir / "checkpoints", accelerator.scaler
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{progress.step:09d}.pt"
    state = {
        "progress": asdict(progress),
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": random_state(),
    }
    with replace_file(path) as file:
        torch.save(state, file)
    for old in _checkpoints(folder)[: -config.train.keep_checkpoints]:
        old.unlink()
    for unfinished in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink(missing_ok=True)


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's generators (for dropout; the data needs none)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(path: Path, module: nn.Module, optimizer: Optimizer, scaler: Any) -> Progress:
    """Load a checkpoint into a module and its optimizer.

    Raises ValueError if the file is damaged or of another model or configuration of loss terms.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        progress = Progress(**state["progress"])
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of fastdcd, or damaged ({_first_line(error)})") from None
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: the checkpoint is of another model or other loss terms ({_first_line(error)}); resume with "
            "the config it was made with"
        ) from None
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return progress


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that train.resume asks for: None to start afresh.

    Raises ValueError if it names no file, or if it is "none" and `folder` already has checkpoints.
    """
    existing = _checkpoints(folder)
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "none":
        if existing:
            raise ValueError(
                f"{folder.parent}: a run is there already ({existing[-1].name}); go on with --resume auto, or choose "
                "another folder with --set run.dir=..."
            )
        return None
    if not Path(resume).is_file():
        raise ValueError(f"train.resume: got {resume!r}, expected none, auto, or a checkpoint's path")
    return Path(resume)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__
