"""Checkpoints: everything a run needs to continue bit for bit, in one file that is written whole or not at all."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import nn
from torch.optim import Optimizer

from fastdcd import config_file
from fastdcd.config import STRICT, Config, Count
from pipelines.files import explain_full_disk, replace_file, user_path


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Attributes:
        epoch: the epoch in progress, or the next one.
        step_in_epoch: steps of it that are done.
        step: optimizer steps done in all.
        seconds: time spent training so far.
        teacher_images: images the teacher looked at so far, on all processes.
        best_top1: best evaluation so far, percent.
    """

    __pydantic_config__ = STRICT
    epoch: Count = 0
    step_in_epoch: Count = 0
    step: Count = 0
    seconds: float = 0.0
    teacher_images: int = 0
    best_top1: float = 0.0

    def after_step(self, *, teacher_images: int) -> Progress:
        """One step later, in which the teacher looked at so many images."""
        return replace(
            self,
            step=self.step + 1,
            step_in_epoch=self.step_in_epoch + 1,
            teacher_images=self.teacher_images + teacher_images,
        )


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        path: its file.
        progress: where the run was.
        config: what the run was started with; None in a checkpoint of an older version.
        origin: what its data, views and teacher were (`experiment.origin`).
        state: tensors and states by part.
    """

    path: Path
    progress: Progress
    config: Config | None
    origin: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any]


def save(
    cfg: Config,
    origin: Mapping[str, str],
    progress: Progress,
    module: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
) -> None:
    """Write step-N.pt into the run's checkpoints (one process does) and remove all but the newest few.

    Raises OSError if it cannot be written, or not all of it; those before are kept then.
    """
    if not accelerator.is_main_process:
        return
    assert cfg.run.dir is not None
    folder, scaler = cfg.run.dir / "checkpoints", accelerator.scaler
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{progress.step:09d}.pt"
    state = {
        "progress": asdict(progress),
        "config": config_file.dump(cfg),
        "origin": dict(origin),
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": random_state(),
    }
    for unfinished in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink(missing_ok=True)
    with explain_full_disk(path, "resume with --resume auto"), replace_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what it makes of a write that failed
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    for old in _checkpoints(folder)[: -cfg.train.keep_checkpoints]:
        old.unlink()


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's generators (for dropout; the data needs none)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def read(path: Path) -> Saved:
    """Read a checkpoint. Raises ValueError if it is damaged, or none."""
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Saved(
            path=path,
            progress=TypeAdapter(Progress).validate_json(json.dumps(state["progress"])),
            config=_config(state.get("config"), path),
            origin=TypeAdapter(dict[str, str]).validate_python(state.get("origin", {})),
            state={part: state[part] for part in ("module", "optimizer", "scaler", "random")},
        )
    except OSError:
        raise
    except Exception as error:  # a file that was made up can fail anywhere in torch's reader
        raise ValueError(f"{path}: not a checkpoint of fastdcd, or damaged ({_first_line(error)})") from None


def _config(text: str | None, path: Path) -> Config | None:
    """None if it is of a version with other keys."""
    with suppress(ValueError):
        return None if text is None else config_file.loads(text, str(path))
    return None


def _check_sums(path: Path) -> None:
    """Compare all of a file with the CRC-32 that torch.save wrote beside each tensor and torch.load does not look at.

    Raises ValueError or BadZipFile if any differs.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 for each in members):
            raise ValueError("it is compressed or encrypted, as torch.save writes nothing")
        if sum(each.file_size for each in members) > path.stat().st_size:
            raise ValueError("its parts overlap")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} differs")


def restore(saved: Saved, module: nn.Module, optimizer: Optimizer, scaler: Any) -> Progress:
    """Load a checkpoint into a module and its optimizer.

    Raises ValueError if it is of another model or configuration of loss terms.
    """
    state = saved.state
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{saved.path}: the checkpoint is of another model or other loss terms ({_first_line(error)}); resume with "
            "the config it was made with"
        ) from None
    return saved.progress


def find(folder: Path, resume: str) -> list[Path]:
    """The checkpoints that train.resume asks for, the newest first; none to start from scratch.

    Raises ValueError if it names no file, or if it is "none" and `folder` already has checkpoints.
    """
    existing = _checkpoints(folder)
    if resume == "auto":
        return existing[::-1]
    if resume == "none":
        if existing:
            raise ValueError(
                f"{folder.parent}: already holds a run ({existing[-1].name}); continue it with --resume auto, or choose "
                "another folder with --set run.dir=..."
            )
        return []
    path = user_path(resume)
    if not path.is_file():
        raise ValueError(f"train.resume: got {resume!r}, expected none, auto, or a checkpoint's path")
    return [path]


def read_newest(candidates: list[Path]) -> tuple[Saved, list[str]]:
    """The first of `candidates` that is whole, and what is wrong with those before it.

    Raises ValueError if none is.
    """
    damaged: list[str] = []
    for path in candidates:
        try:
            return read(path), damaged
        except ValueError as error:
            damaged.append(str(error))
    others = f"; so {'is' if len(damaged) == 2 else 'are'} the {len(damaged) - 1} older" if damaged[1:] else ""
    raise ValueError(f"{damaged[0]}{others}; start over with --set run.dir=...")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__
