"""What a run says of itself before its first step, and what about it is likely a mistake."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from fastdcd import experiment
from fastdcd.config import Config
from fastdcd.distill import DistillModule
from fastdcd.evaluate import Accuracy
from fastdcd.teacher import Teacher
from pipelines.base import Loader
from pipelines.index import DatasetIndex


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run is about to do.

    Attributes:
        images, val_images, classes: of the data sets.
        shorter_side: median of the stored training images, pixels.
        steps_per_epoch: optimizer steps.
        processes: that train together.
        device: where.
        student_parameters: how many the student has.
        teacher: its name and mode, "" without one.
        teacher_accuracy: measured now, or None.
    """

    images: int
    val_images: int
    classes: int
    shorter_side: int
    steps_per_epoch: int
    processes: int
    device: str
    student_parameters: int
    teacher: str = ""
    teacher_accuracy: Accuracy | None = None


def facts(
    cfg: Config,
    accelerator: Accelerator,
    train_set: Loader,
    val_set: Loader,
    module: DistillModule,
    teacher: Teacher | None,
    accuracy: Accuracy | None,
) -> Facts:
    """What is known when all parts of a run are there."""
    return Facts(
        images=len(train_set.index),
        val_images=len(val_set.index),
        classes=len(train_set.index.classes),
        shorter_side=int(np.median(train_set.index.sizes.min(1))),
        steps_per_epoch=experiment.steps_per_epoch(cfg, train_set.index),
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        student_parameters=sum(parameter.numel() for parameter in module.student.parameters()),
        teacher=f"{teacher.name}, {cfg.teacher.mode}" if teacher else "",
        teacher_accuracy=accuracy,
    )


def text(cfg: Config, run: Facts) -> str:
    """All there is to say: lines, and warnings below them."""
    return "\n".join([*lines(cfg, run), *(f"warning: {warning}" for warning in warnings(cfg, run))])


def lines(cfg: Config, run: Facts) -> Iterator[str]:
    """The summary, a few lines."""
    sizes = sorted({cfg.student_size(epoch) for epoch in range(cfg.train.epochs)})
    yield (
        f"data      {run.images:,} images of {run.classes:,} classes, {run.val_images:,} to evaluate; loader "
        f"{cfg.data.backend}, stored at about {run.shorter_side} px"
    )
    yield (
        f"student   {cfg.student.model}, {run.student_parameters:,} parameters, at {' to '.join(map(str, sizes))} px"
    )
    if run.teacher:
        found = run.teacher_accuracy
        reached = f"; top-1 {found.top1:.2f} % on {cfg.data.val}" if found else ""
        yield f"teacher   {run.teacher}, at {cfg.teacher_size} px{reached}"
    steps = cfg.train.epochs * run.steps_per_epoch
    yield (
        f"training  {cfg.train.epochs} epoch{'s' if cfg.train.epochs > 1 else ''} of {run.steps_per_epoch:,} "
        f"step{'s' if run.steps_per_epoch > 1 else ''}, "
        f"{steps:,} in all; "
        f"{cfg.data.batch_size} images per step on {run.processes} process{'es' if run.processes > 1 else ''} "
        f"({run.device}, {cfg.train.precision})"
    )


def warnings(cfg: Config, run: Facts) -> Iterator[str]:
    """What is likely a mistake, and what to do about it: a line each."""
    if run.images < run.val_images:
        yield (
            f"data.train has {run.images:,} images and data.val {run.val_images:,}: the other way round is usual; "
            "are the two swapped?"
        )
    if cfg.data.batch_size > run.images:
        yield (
            f"data.batch_size is {cfg.data.batch_size:,} and there are {run.images:,} images to train on: one step "
            "per epoch; set a smaller one"
        )
    largest = max(cfg.student_size(epoch) for epoch in range(cfg.train.epochs))
    if largest > 2 * run.shorter_side:
        yield (
            f"student.image_size is {largest} px and the stored images have about {run.shorter_side} px: they are "
            "enlarged; a network for small images (cifar:...) at their own size is faster and usually better"
        )
    if 4 * largest < run.shorter_side:
        yield (
            f"the stored images have about {run.shorter_side} px and student.image_size is {largest} px: most of the "
            f"decoding is thrown away; convert them with --max-size {2 * largest}"
        )
    steps = cfg.train.epochs * run.steps_per_epoch
    if steps < 100:
        yield (
            f"{steps} steps in all are too few for most students: set train.epochs higher or data.batch_size lower"
        )
    teaches = cfg.teacher.precision if run.teacher else "fp32"
    if "bf16" in (cfg.train.precision, teaches) and run.device == "cpu" and bf16_is_emulated():
        yield (
            "bf16 is emulated on this processor, which has no instructions for it: steps take several times as long; "
            "set train.precision and teacher.precision to fp32"
        )
    if run.teacher_accuracy and run.teacher_accuracy.top1 < 3 * 100 / run.classes and run.classes > 3:
        yield (
            f"the teacher's top-1 is {run.teacher_accuracy.top1:.2f} %, hardly more than chance: its classes may be in "
            "another order (data.classes), or its normalisation or image size another (teacher.mean, "
            "teacher.image_size)"
        )


def bf16_is_emulated() -> bool:
    """Whether the CPU computes bf16 convolutions without vector instructions: an x86 without AVX-512 (ResNet-56 on
    CIFAR took 11 times as long as in fp32 on one)."""
    slow = ("DEFAULT", "NO AVX", "AVX2")
    return platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in slow


def check_batches(cfg: Config, module: DistillModule, index: DatasetIndex, processes: int) -> None:
    """Raises ValueError if a batch leaves some part of it a single row, and the student cannot train on one.

    BatchNorm over maps of 1 x 1 pixels needs two rows. That the last batch of an epoch has one is otherwise found
    out at the end of the first epoch.
    """
    last = len(index) % cfg.data.batch_size
    for rows in filter(None, (cfg.data.batch_size, last)):
        if rows >= 2 * processes * cfg.train.accumulate:
            continue
        # shares of processes and parts differ by one at most: one of them has a single row
        error = _trains_on_one_row(module, min(cfg.student_size(epoch) for epoch in range(cfg.train.epochs)))
        if not error:
            return
        raise ValueError(
            f"data.batch_size: got {cfg.data.batch_size} for {len(index):,} images on {processes} process"
            f"{'es' if processes > 1 else ''}, train.accumulate {cfg.train.accumulate}: "
            f"{'the last batch of an epoch' if rows == last else 'a batch'} of {rows} rows leaves a single one to a part, "
            f"on which {cfg.student.model} cannot train ({error}); choose another batch size"
        )


def _trains_on_one_row(module: DistillModule, size: int) -> str:
    """Why the student cannot train on one image, or an empty string. A copy tries: statistics and weights stay."""
    device = next(module.parameters()).device
    student = copy.deepcopy(module.student).train()
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            student(module.normalize(images))
    except ValueError as error:
        return str(error).splitlines()[0]
    return ""
