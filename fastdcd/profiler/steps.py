"""Training steps as fastdcd.train takes them, with marks between their stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdcd import experiment
from fastdcd.config import Config
from fastdcd.losses.terms import LossInputs
from fastdcd.profiler.clock import Clock
from fastdcd.step import TrainStep
from fastdcd.teacher import Teacher
from fastdcd.teacher_modes import NoTeacher, TeacherMode
from pipelines import prefetch as prefetching
from pipelines.base import Batch, Loader
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan
from pipelines.views import ViewFamily

WARM_UP = 3  # steps: lazy initialisation, choice of kernels, compilation


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One trainable setup, and the data it can be fed with."""

    cfg: Config
    accelerator: Accelerator
    family: ViewFamily
    teacher: Teacher | None
    mode: TeacherMode
    step: TrainStep

    @property
    def rows(self) -> int:
        """Rows of a step on this process, rounded up."""
        return -(-self.cfg.data.batch_size // self.accelerator.num_processes)


def set_up(
    cfg: Config,
    accelerator: Accelerator,
    index: DatasetIndex,
    family: ViewFamily,
    teacher: Teacher | None,
    mode: TeacherMode,
) -> Bench:
    """Build what one step needs. The weights are trained and thrown away."""
    # a rate that keeps the numbers finite: a step costs the same at any
    cfg = replace(cfg, optim=replace(cfg.optim, lr=min(cfg.optim.lr, 1e-3)))
    module = experiment.build_student(cfg, len(index.classes), teacher, accelerator)
    step = TrainStep(cfg, module, accelerator, steps_per_epoch=experiment.steps_per_epoch(cfg, index))
    step.wrapped.train()
    return Bench(cfg=cfg, accelerator=accelerator, family=family, teacher=teacher, mode=mode, step=step)


def plain(cfg: Config, bench: Bench, index: DatasetIndex) -> Bench:
    """The student of a config trained by cross-entropy alone: what distillation is compared with."""
    cfg = replace(
        cfg,
        loss=cfg.loss.with_weights(**{name: float(name == "ce") for name in cfg.loss.terms}),
        teacher=replace(cfg.teacher, mode="none"),
    )
    return set_up(cfg, bench.accelerator, index, bench.family, None, NoTeacher())


def in_bf16(bench: Bench) -> None:
    """Let the student run in bf16, as Accelerate does it: its own precision is that of the whole process."""
    device = bench.accelerator.device.type
    bench.step.wrapped.forward = torch.autocast(device, dtype=torch.bfloat16)(bench.step.wrapped.forward)


def enough(*, seconds: float, least: int, most: int) -> Callable[[int], bool]:
    """Whether a measurement may end after so many samples."""
    begin = time.perf_counter()
    return lambda samples: samples >= most or (samples >= least and time.perf_counter() - begin >= seconds)


class _Timed:
    """Seconds that a call or an iterator took, added up: on the CPU a batch is made inside the wait for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def batches(self, source: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        try:
            while True:
                begin = time.perf_counter()
                batch = next(source, None)
                self.seconds += time.perf_counter() - begin
                if batch is None:
                    return
                yield batch
        finally:
            source.close()

    def call(self, function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def timed(ids: Tensor) -> Tensor | None:
            begin = time.perf_counter()
            try:
                return function(ids)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def run_steps(
    bench: Bench,
    loader: Loader,
    clock: Clock,
    done: Callable[[int], bool],
    *,
    alternate: bool = False,
    communicate: bool = True,
    warm_up: int = WARM_UP,
) -> int:
    """Take training steps from `loader` until `done(steps kept)`; `clock` holds their laps.

    Steps that are not whole batches, the first of each epoch and those of the warm-up are not kept.

    Args:
        alternate: mark half the steps only: the others tell what marking costs. Which half follows the
            Thue-Morse sequence, that no period of workers falls in with.
        communicate: let DDP average gradients.
        warm_up: steps before the first that is kept.

    Returns the number of steps kept.
    """
    cfg, accelerator, mode = bench.cfg, bench.accelerator, bench.mode
    inline = accelerator.device.type != "cuda"  # on the CPU nothing is prefetched: a wait is work
    kept = taken = epoch = 0
    with ExitStack() as stack:
        for hook in _hooks(bench, clock):
            stack.callback(hook.remove)
        if not communicate:
            stack.enter_context(accelerator.no_sync(bench.step.wrapped))
        while True:
            number = epoch % cfg.train.epochs
            plan = experiment.epoch_plan(cfg, loader, bench.family, number)
            teacher_size = mode.begin(plan.view)
            rank_plan = plan.for_rank(
                experiment.image_sizes(cfg.student_size(number), teacher_size),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            loading, looking = _Timed(), _Timed()
            batches = prefetching.prefetch(
                loading.batches(loader.epoch(rank_plan)), looking.call(mode.read_cached), accelerator.device
            )
            try:
                for step in range(_usable(plan)):
                    loading.seconds = looking.seconds = 0.0
                    clock.start(marking=not alternate or taken.bit_count() % 2 == 0)
                    batch, cached = next(batches)
                    clock.lap("copy" if inline else "data_wait")
                    if inline:
                        clock.move("copy", "data_wait", loading.seconds)
                        if cached is not None:
                            clock.move("copy", "cache_read", looking.seconds)
                    teacher_outputs = mode.outputs(batch, cached)
                    found = "other" if teacher_outputs is None else "teacher" if cached is None else "cache_read"
                    clock.lap(found)
                    images, rows = batch.at(cfg.student_size(number)), plan.rows(step)
                    bench.step(
                        images,
                        batch.labels,
                        teacher_outputs,
                        mixed=batch.mixed,
                        rows=rows,
                        number=taken,
                        mark=clock.lap,
                    )
                    clock.stop()
                    taken += 1
                    first = step == 0 and _usable(plan) > 1
                    if taken <= warm_up or first:
                        clock.drop()
                    else:
                        kept += 1
                    if _agreed(taken, taken > warm_up and done(kept), accelerator):
                        return kept
            finally:
                batches.close()
            epoch += 1


def _hooks(bench: Bench, clock: Clock) -> Iterator[Any]:
    """Marks inside the wrapped module. None is inside compiled code: terms are not compiled, the student is."""
    waits = "all_reduce" if bench.accelerator.num_processes > 1 else "other"

    def entered(module: nn.Module, inputs: Any) -> None:
        clock.lap(waits)  # DDP sends BatchNorm's buffers before it calls the module

    yield bench.step.module.register_forward_pre_hook(entered)

    first = next(iter(bench.step.module.terms))
    for name, term in bench.step.module.terms.items():

        def begins(module: nn.Module, inputs: tuple[LossInputs], name: str = name) -> None:
            if name != first:
                return
            clock.lap("student_forward")
            logits = inputs[0].student.logits
            if logits.requires_grad:
                # every term's backward runs before the logits' gradient is complete, the student's after it
                logits.register_hook(lambda gradient: clock.lap("loss_backward", trace=False))

        def ends(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            clock.lap(f"loss.{name}")

        yield term.register_forward_pre_hook(begins)
        yield term.register_forward_hook(ends)


def _usable(plan: EpochPlan) -> int:
    """Whole batches of an epoch; a set smaller than one batch is a batch."""
    return max(len(plan.order) // plan.batch_size, 1)


def _agreed(taken: int, done: bool, accelerator: Accelerator) -> bool:
    """Whether the first process is done: all must take the same steps. Asked now and then, since it is a wait."""
    if accelerator.num_processes == 1:
        return done
    if taken % 8:
        return False
    flag = torch.tensor(float(done and accelerator.is_main_process), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())
