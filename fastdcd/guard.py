"""Optimizer steps that are taken only if their gradient is finite, decided on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer


class GuardedOptimizer:
    """Takes optimizer steps, and leaves out one whose gradient is not finite, as if its batch had not been there.

    After DDP's mean all processes hold the same gradient, so all decide alike without asking each other, and
    nothing waits for the device. Torch's fused optimizers leave a step out themselves, as they do for
    GradScaler. For others weights and optimizer state are copied before the step and taken from the copy where
    the gradient was bad, at the price of that much memory. BatchNorm statistics, which the forward pass has
    moved by then, come from a copy in either case.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, accelerator: Accelerator, *, limit: int) -> None:
        """`limit` skipped steps in a row end the run."""
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._buffers = [each for each in module.buffers() if each.is_floating_point()]
        self._good_buffers = _flat(self._buffers)
        self._optimizer, self._scaler, self._limit = optimizer, accelerator.scaler, limit
        self._own: Optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        # torch's own sign, which GradScaler looks for
        self._step = self._told if getattr(self._own, "_step_supports_amp_scaling", False) else self._undone
        if self._scaler is not None and self._step == self._undone:
            raise ValueError(
                f"train.precision: fp16 with optimizer {type(self._own).__name__}: loss scaling would wait for the device in "
                "every step of it; use bf16, or optim.name sgd or adamw"
            )
        self._skipped, self._in_a_row, self._most = torch.zeros(3, device=accelerator.device).unbind()

    def remember(self) -> None:
        """Note BatchNorm statistics, before the forward pass moves them."""
        self._good_buffers = _flat(self._buffers)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One optimizer step, after backward (and clipping). Returns whether it was taken: bool, 0-dimensional."""
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        # the largest magnitude: a sum of squares could overflow where no gradient did
        finite = torch.stack(torch._foreach_norm(gradients, ord=float("inf"))).amax().isfinite()
        self._step(finite)
        if self._buffers:
            good_buffers = torch.where(finite, _flat(self._buffers), self._good_buffers)
            good = good_buffers.split([each.numel() for each in self._buffers])
            torch._foreach_copy_(self._buffers, [g.view_as(b) for g, b in zip(good, self._buffers, strict=True)])
        self._skipped += ~finite
        self._in_a_row.add_(1).mul_(~finite)
        torch.maximum(self._most, self._in_a_row, out=self._most)
        return finite

    def _told(self, finite: Tensor) -> None:
        """A step of an optimizer that leaves it out itself. With loss scaling, the scaler tells it."""
        if self._scaler is None:
            self._own.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()

    def _undone(self, finite: Tensor) -> None:
        """A step that is taken, and then taken back where the gradient was bad."""
        live = [*self._parameters, *self._state()]
        before = [each.clone() for each in live]
        self._optimizer.step()
        made = list(self._state())[len(live) - len(self._parameters) :]  # by the first step
        for now, good in zip([*live, *made], [*before, *map(torch.zeros_like, made)], strict=True):
            now.copy_(torch.where(finite, now, good))

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


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers one after the other, [n]."""
    return torch.cat([each.detach().reshape(-1) for each in tensors]) if tensors else torch.empty(0)
