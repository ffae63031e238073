"""Optimizers by name, and learning rates as pure functions of training progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastdcd.config import Optim
from fastdcd.distill import no_weight_decay


def _sgd(groups: list[dict[str, Any]], config: Optim) -> Optimizer:
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    if config.momentum:
        # A first step that is left out (GuardedOptimizer) would leave the fused kernel's momentum uninitialised.
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
    without = no_weight_decay(module, decay_norms_and_biases=config.decay_norms_and_biases)
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
