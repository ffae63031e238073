"""Optimizer steps that are taken only if their gradient is finite, decided on the device."""

from __future__ import annotations

from collections.abc import Iterator

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
        """`limit` skipped steps in a row end the run. `flatten_buffers` was called on `module` before DDP wrapped it."""
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for each in self._parameters:
            self._by_dtype.setdefault(each.dtype, []).append(each)
        self._found, self._one = (
            torch.zeros(1, device=accelerator.device),
            torch.ones(1, device=accelerator.device),
        )
        buffers = [each for each in module.buffers() if each.is_floating_point()]
        storages = {each.untyped_storage().data_ptr(): each for each in buffers}
        # each as one run of numbers: one kernel copies or chooses all of them
        self._buffers = [each.detach().as_strided((_numel(each),), (1,), 0) for each in storages.values()]
        self._good_buffers = [each.clone() for each in self._buffers]
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
        for good, now in zip(self._good_buffers, self._buffers, strict=True):
            good.copy_(now)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One optimizer step, after backward (and clipping). Returns whether it was taken: bool, 0-dimensional."""
        self._found.zero_()
        for parameters in self._by_dtype.values():
            if gradients := [each.grad for each in parameters if each.grad is not None]:
                # GradScaler's own check: one call, a factor of 1 leaves every number as it is
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found, self._one)
        finite = self._found[0] == 0
        self._step(finite)
        for good, now in zip(self._good_buffers, self._buffers, strict=True):
            torch.where(finite, now, good, out=now)
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
                "then continue with --resume auto"
            )


def flatten_buffers(module: nn.Module) -> None:
    """Let a module's floating-point buffers lie in one tensor for each kind, so that a single kernel copies all of them:
    for a ResNet-50 there are 106, and a copy of each would cost the host more than the step's arithmetic costs a GPU.

    Names, values and state_dict stay. Call it before anything keeps the buffers themselves, as DDP does.
    """
    owners: dict[tuple[torch.dtype, torch.device], list[tuple[nn.Module, str, Tensor]]] = {}
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owners.setdefault((buffer.dtype, buffer.device), []).append((each, name, buffer))
    for kind in owners.values():
        distinct = list({id(buffer): buffer for *_, buffer in kind}.values())  # two modules may share one
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in distinct])
        pieces = flat.split([buffer.numel() for buffer in distinct])
        placed = {id(old): new.view(old.shape) for old, new in zip(distinct, pieces, strict=True)}
        for owner, name, buffer in kind:
            owner._buffers[name] = placed[id(buffer)]


def _numel(tensor: Tensor) -> int:
    """Numbers in a tensor's whole storage."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
