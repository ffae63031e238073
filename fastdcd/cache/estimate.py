"""What a teacher cache would cost and save, measured: the work behind tools/cache_teacher.py estimate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from fastdcd import experiment
from fastdcd.cache.fill import Parts
from fastdcd.cache.store import free_bytes
from fastdcd.models import ModelOutput
from fastdcd.step import TrainStep


def estimate(parts: Parts, *, seconds: float = 5.0) -> dict[str, Any]:
    """What a cache would cost and save, measured here: nothing is written.

    Returns bytes, rates (images/s) and seconds; see `tools/cache_teacher.py estimate`.
    """
    cfg, manifest = parts.cfg, parts.manifest
    accelerator = parts.accelerator
    rows, epochs, views = manifest.rows, cfg.train.epochs, manifest.views
    size = cfg.student_size(0)
    batch = cfg.data.batch_size
    images = torch.randint(0, 256, (batch, 3, parts.teacher.size, parts.teacher.size), dtype=torch.uint8)
    images = images.to(accelerator.device)
    teacher_step = _median_seconds(lambda: parts.teacher.features(images), seconds, accelerator)

    module = experiment.build_student(cfg, len(parts.loader.index.classes), parts.teacher, accelerator)
    train_step = TrainStep(cfg, module, accelerator, steps_per_epoch=-(-rows // batch))
    train_step.wrapped.train()
    student_images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=accelerator.device)
    labels = torch.randint(0, len(parts.loader.index.classes), (batch,), device=accelerator.device)
    features = torch.rand(batch, manifest.dim, device=accelerator.device)

    def step() -> None:
        teacher_outputs = ModelOutput(features, parts.teacher.logits(features))
        train_step(student_images, labels, teacher_outputs, rows=batch * accelerator.num_processes, number=0)

    cached_step = _median_seconds(step, seconds, accelerator)
    fill_seconds = views * rows / batch * teacher_step
    saved = epochs * rows / batch * teacher_step  # of one run
    path = cfg.cache.path
    assert path is not None
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return {
        "rows": rows,
        "views": views,
        "bytes_a_view": manifest.view_bytes,
        "bytes": views * manifest.view_bytes,
        "free_bytes": free_bytes(existing),
        "teacher_images_per_second": batch / teacher_step,
        "fill_seconds": fill_seconds,
        "cached_step_seconds": cached_step,
        "online_step_seconds": cached_step + teacher_step,
        "teacher_share_of_online_step": teacher_step / (cached_step + teacher_step),
        "saved_seconds_a_run": saved,
        "runs_to_break_even": fill_seconds / saved,
        "epochs_to_break_even": views,
    }


def _median_seconds(call: Any, seconds: float, accelerator: Accelerator) -> float:
    """Median time of a call, after two to warm up, over about `seconds` or at least three calls."""
    times: list[float] = []
    begin = time.perf_counter()
    for number in _until(begin, seconds):
        start = time.perf_counter()
        call()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def _until(begin: float, seconds: float) -> Iterator[int]:
    number = 0
    while number < 5 or time.perf_counter() - begin < seconds:
        yield number
        number += 1
