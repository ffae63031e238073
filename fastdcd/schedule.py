"""Learning rates as pure functions of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from fastdcd.config import Schedule

Curve = Callable[[float, float, Schedule], float]  # (epochs done, epochs in all) -> share of the peak rate


def _constant(epoch: float, epochs: float, config: Schedule) -> float:
    return 1.0


def _step(epoch: float, epochs: float, config: Schedule) -> float:
    return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)


def _cosine(epoch: float, epochs: float, config: Schedule) -> float:
    done = (epoch - config.warmup) / max(epochs - config.warmup, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(epoch: float, epochs: float, config: Schedule) -> float:
    return (epochs - epoch) / max(epochs - config.warmup, 1e-9)


CURVES: dict[str, Curve] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "triangular": _linear,  # up over the warm-up, then straight down: FFCV's ImageNet recipes
    "one_cycle": _cosine,  # up over the warm-up, then down along a cosine: torch's OneCycleLR, anneal to 0
}


def learning_rate(step: int, steps_an_epoch: int, *, epochs: int, schedule: Schedule, peak: float) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the whole run.

    A pure function, so that a resumed run needs no scheduler state.
    """
    epoch = step / steps_an_epoch
    if epoch < schedule.warmup:
        return peak * (step + 1) / (schedule.warmup * steps_an_epoch + 1)
    return peak * CURVES[schedule.name](epoch, epochs, schedule)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
