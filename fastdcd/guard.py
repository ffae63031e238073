"""Optimizer steps that are taken only if their gradient is finite, decided on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer


class GuardedStep:
    """Takes optimizer steps, and undoes one whose gradient is not finite, as if its batch had not been there.

    After DDP's mean all processes hold the same gradient, so all decide alike without asking each other. And
    nothing waits for the device: weights, optimizer state and BatchNorm statistics are copied before the step
    and taken from the copy where the gradient was bad, at the price of that much memory.

    Attributes:
        finite: bool, 0-dimensional: whether the last step was taken.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, accelerator: Accelerator, *, limit: int) -> None:
        """`limit` skipped steps in a row end the run. Restore checkpoints before: BatchNorm statistics are noted."""
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._buffers = [each for each in module.buffers() if each.is_floating_point()]
        self._good_buffers = [each.clone() for each in self._buffers]
        self._optimizer, self._scaler, self._limit = optimizer, accelerator.scaler, limit
        self._skipped, self._in_a_row, self._most = torch.zeros(3, device=accelerator.device).unbind()
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step, after backward (and clipping)."""
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        # the largest magnitude: a sum of squares could overflow where no gradient did
        finite = torch.stack(torch._foreach_norm(gradients, ord=float("inf"))).amax().isfinite()
        live = [*self._parameters, *self._state()]
        before = [each.clone() for each in live]
        self._optimizer.step()
        made = list(self._state())[len(live) - len(self._parameters) :]  # by the first step
        live, before = [*live, *made, *self._buffers], [*before, *map(torch.zeros_like, made), *self._good_buffers]
        for now, good in zip(live, before, strict=True):
            now.copy_(torch.where(finite, now, good))
        torch._foreach_copy_(self._good_buffers, self._buffers)
        self.finite = finite
        self._skipped += ~finite
        self._in_a_row.add_(1).mul_(~finite)
        torch.maximum(self._most, self._in_a_row, out=self._most)

    def _state(self) -> Iterator[Tensor]:
        for parameter, values in self._optimizer.state.items():
            tensors = (each for each in values.values() if isinstance(each, Tensor))
            # Adam's count of steps may be on the host: then it runs ahead of a skipped step
            yield from (each for each in tensors if each.device == parameter.device)

    def take(self) -> dict[str, Tensor]:
        """Counts since the last call: steps skipped, and the most in a row (which may have begun before)."""
        counts = {"skipped_steps": self._skipped.clone(), "skipped_in_a_row": self._most.clone()}
        self._skipped.zero_()
        self._most.copy_(self._in_a_row)
        return counts

    def check(self, in_a_row: float) -> None:
        """Raises FloatingPointError if too many steps in a row were skipped: the run does not recover."""
        if in_a_row >= self._limit:
            raise FloatingPointError(
                f"{in_a_row:.0f} steps in a row had a gradient that is not finite (train.max_skipped = {self._limit}); "
                "the weights are as before them. Lower optim.lr, set train.clip, or look at the data and the teacher; "
                "then go on with --resume auto"
            )
