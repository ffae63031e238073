"""The moving average of a student's weights (train.ema), on its device."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from fastdcd.models import FeatureModel, ModelOutput


class MovingAverage(nn.Module):
    """An exponential moving average of a network's weights and BatchNorm statistics.

    It lies in the module that is trained, so that checkpoints hold it and processes share it; no gradient reaches it. The
    decay of step t (counted from 0) is min(decay, (1 + t) / (10 + t)), as in TensorFlow and timm: a short run is not
    drawn towards its initial weights.

    Attributes:
        network: the averaged student.
    """

    def __init__(self, student: FeatureModel, decay: float) -> None:
        """Begins at the student's weights. `student` must be neither compiled nor moved to its device yet."""
        super().__init__()
        self.network, self.decay = copy.deepcopy(student).requires_grad_(False), decay

    def forward(self, images: Tensor) -> ModelOutput:
        output: ModelOutput = self.network(images)
        return output

    @cached_property
    def _own(self) -> tuple[list[Tensor], list[Tensor]]:
        return _tensors(self.network)

    @torch.no_grad()
    def update(self, student: nn.Module, number: int, taken: Tensor) -> None:
        """Move towards `student` after step `number`, unless it was left out (`taken`: bool, 0-dimensional).

        Three kernels over all tensors together; nothing waits for the device.
        """
        averaged, counted = self._own
        live, live_counted = _tensors(student)
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        change = torch._foreach_sub(live, averaged)
        torch._foreach_mul_(change, taken.float() * share)
        torch._foreach_add_(averaged, change)
        if counted:
            torch._foreach_copy_(counted, live_counted)


def _tensors(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and statistics, and what is counted in whole numbers."""
    tensors = [*network.parameters(), *network.buffers()]
    floating = [each for each in tensors if each.is_floating_point()]
    return floating, [each for each in tensors if not each.is_floating_point()]
