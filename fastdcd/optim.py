"""Optimizers by name, and learning rates as pure functions of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastdcd.config import Optim, Schedule
from fastdcd.distill import undecayed


def _sgd(groups: list[dict[str, Any]], config: Optim) -> Optimizer:
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    if config.momentum:
        # A first step that is left out (GuardedStep) would leave the fused kernel's momentum uninitialised.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adamw(groups: list[dict[str, Any]], config: Optim) -> Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optim], Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def _timm(name: str, groups: list[dict[str, Any]], config: Optim) -> Optimizer:
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, opt=name, lr=config.lr, momentum=config.momentum)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"optim.name: timm has no optimizer {name!r} ({error})") from None


def build_optimizer(module: nn.Module, config: Optim) -> Optimizer:
    """The optimizer over a module's trainable parameters, weight decay only where it belongs.

    Raises ValueError for an unknown name.
    """
    without = undecayed(module, decay_norms_and_biases=config.decay_norms_and_biases)
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if n not in without], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n in without], "weight_decay": 0.0},
    ]
    if config.name.startswith("timm:"):
        return _timm(config.name.removeprefix("timm:"), groups, config)
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name: got {config.name!r}, expected {', '.join(OPTIMIZERS)} or timm:NAME")
    return OPTIMIZERS[config.name](groups, config)


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
