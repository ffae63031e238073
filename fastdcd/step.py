"""One training step. The train loop, the profiler, the cache's estimate and the benchmarks all take this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdcd.config import Config
from fastdcd.distill import DistillModule
from fastdcd.guard import GuardedOptimizer, flatten_buffers
from fastdcd.metrics import RunningMeans
from fastdcd.models import ModelOutput
from fastdcd.optim import build_optimizer
from fastdcd.schedule import learning_rate, set_learning_rate
from pipelines.augment import Mixed

# Images, labels, the teacher's outputs and mixed labels of the same rows
Inputs = tuple[Tensor, Tensor, ModelOutput | None, Mixed | None]


def _unmarked(stage: str) -> None: ...


class TrainStep:
    """Trains a module one batch at a time: forward and backward in train.accumulate parts, clipping, an optimizer step
    unless the gradient is not finite, and what the loss terms bound after it. Nothing in it waits for the device.

    Attributes:
        module: what is trained.
        wrapped: the same, inside DDP if there are several processes.
        optimizer: Accelerate's, around the one that optim.name asks for.
    """

    def __init__(
        self, cfg: Config, module: DistillModule, accelerator: Accelerator, *, steps_per_epoch: int
    ) -> None:
        self.module = module
        flatten_buffers(module)
        self.wrapped, self.optimizer = accelerator.prepare(module, build_optimizer(module, cfg.optim))
        self._cfg, self._accelerator, self._steps_per_epoch = cfg, accelerator, steps_per_epoch
        self._guard = GuardedOptimizer(module, self.optimizer, accelerator, limit=cfg.train.max_skipped)
        self._means = RunningMeans()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        teacher_outputs: ModelOutput | None,
        *,
        mixed: Mixed | None = None,
        rows: int,
        number: int,
        mark: Callable[[str], None] = _unmarked,
    ) -> None:
        """Train by this process's images uint8 [n, 3, H, W] and labels int64 [n].

        Args:
            teacher_outputs: features [n, d_t] and logits [n, classes] float32, or None without a teacher.
            mixed: the other labels of mixed images, and the shares of both.
            rows: rows of the batch over all processes.
            number: steps taken since the start of the run: the learning rate depends on it.
            mark: called with the name of each stage when it ends.
        """
        set_learning_rate(self.optimizer, self.learning_rate(number))
        self._guard.remember()
        mark("other")
        terms = self._backward((images, labels, teacher_outputs, mixed), rows, number // self._steps_per_epoch)
        mark("backward")
        if self._cfg.train.clip:
            self._accelerator.clip_grad_norm_(self.wrapped.parameters(), self._cfg.train.clip)
        finite = self._guard.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.after_step(number, finite)
        self._means.add(terms, taken=finite)
        mark("optimizer")

    def _backward(self, inputs: Inputs, rows: int, epoch: int) -> dict[str, Tensor]:
        """Gradients of one batch, accumulated over its parts; returns its named loss terms.

        Every term is a sum over local rows divided by rows / processes, so that DDP's mean over processes is the mean
        over the whole batch.
        """
        parts = self._cfg.train.accumulate
        divisor = rows / self._accelerator.num_processes / parts
        means = RunningMeans()
        for part, own in enumerate(_split(inputs, parts)):
            # DDP exchanges gradients once per batch, with its last part
            with nullcontext() if part == parts - 1 else self._accelerator.no_sync(self.wrapped):
                with self._compiled(whole=rows == self._cfg.data.batch_size):
                    terms = self.wrapped(*own, divisor, epoch)
                self._accelerator.backward(terms["loss"] / parts)
            means.add(terms)
        return means.on_device()

    def _compiled(self, *, whole: bool) -> AbstractContextManager[object]:
        """Short batches, one each epoch, run uncompiled: graphs are of static shapes, and one more would not pay."""
        if not self._cfg.train.compile:
            return nullcontext()
        if not whole:
            return torch.compiler.set_stance("force_eager")
        torch.compiler.cudagraph_mark_step_begin()  # what the last graph returned may be overwritten
        return nullcontext()

    def learning_rate(self, number: int) -> float:
        """The learning rate of step `number`, counted from 0 over the whole run."""
        return learning_rate(
            number,
            self._steps_per_epoch,
            epochs=self._cfg.train.epochs,
            schedule=self._cfg.schedule,
            peak=self._cfg.optim.lr,
        )

    def take_metrics(self, own: Sequence[float]) -> tuple[dict[str, float], list[list[float]]]:
        """Means of the loss terms and counts of skipped steps since the last call, over all processes; and the numbers
        `own` of every process, [len(own)][processes]. Every process must call it; waits once for the device."""
        return self._means.take(self._accelerator, self._guard.take(), own)

    def check(self, skipped_in_a_row: float) -> None:
        """Raises FloatingPointError if train.max_skipped steps in a row were skipped."""
        self._guard.check(skipped_in_a_row)


def _split(inputs: Inputs, parts: int) -> list[Inputs]:
    images, labels, outputs, mixed = inputs
    return list(
        zip(
            images.tensor_split(parts),
            labels.tensor_split(parts),
            [ModelOutput(*each) for each in _pieces(outputs, parts)] if outputs is not None else [None] * parts,
            [Mixed(*each) for each in _pieces(mixed, parts)] if mixed is not None else [None] * parts,
            strict=True,
        )
    )


def _pieces(tensors: Sequence[Tensor], parts: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(each.tensor_split(parts) for each in tensors), strict=True)
