"""Accelerate's trackers (TensorBoard, Weights & Biases, MLflow ...): there before training, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from fastdcd.model_file import near

# What to install, where it is called otherwise.
_PACKAGES = {"comet_ml": "comet-ml"}


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed. Accelerate itself leaves it out in silence."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"run.trackers: got {name!r}, expected some of {', '.join(sorted(known))}{near(name, known)}"
            )
        if name not in there:
            raise ValueError(
                f"run.trackers: {name} is not installed: pip install {_PACKAGES.get(name, name)}, or leave it out "
                "(run.trackers=[]; metrics.jsonl has the same numbers)"
            )


def start(accelerator: Accelerator, project: str, folder: Path) -> None:
    """Start the trackers that the accelerator was made with; their files go to `folder`, not beside the program.
    MLflow keeps all runs in one database (MLFLOW_TRACKING_URI), where this one is named after its folder.

    Raises ValueError if one does not start.
    """
    try:
        own = {"wandb": {"dir": str(folder)}, "mlflow": {"run_name": str(folder)}}
        accelerator.init_trackers(project, init_kwargs=own)
    except Exception as error:  # each has errors of its own: no login, no server, a folder that cannot be written
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(
            f"run.trackers: a tracker does not start ({lines[0].strip()[:200]}); set it up, use it offline "
            "(WANDB_MODE=offline), or leave it out"
        ) from error
