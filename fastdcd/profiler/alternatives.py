"""Other ways to do the same, measured: what advice may promise.

Each is found under the setting it is had by: seconds per step of what that setting changes, `now` and `then`, for as
many images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from fastdcd.config import Config
from fastdcd.losses.terms import LossInputs, LossTerm
from fastdcd.models import ModelOutput
from fastdcd.profiler import reading
from fastdcd.profiler.clock import Clock, call_seconds
from fastdcd.profiler.steps import WARM_UP, Bench, enough, in_bf16, plain, run_steps
from fastdcd.teacher import Teacher
from pipelines.index import DatasetIndex
from pipelines.loaders.synthetic import SyntheticLoader

ROUNDS = 3  # turns of each way to train the student
MOST = 400  # steps of a turn
Found = dict[str, dict[str, float]]


def of_student(bench: Bench, index: DatasetIndex, device_peak: int | None, seconds: float) -> Found:
    """A step of the student alone in bf16, with the other order of pixels, and with twice the rows.

    They take turns for about `seconds`, without data and without a teacher. One that is far slower is not asked
    again. A student that is compiled is not tried: each setting would be compiled again.
    """
    cfg, device = bench.cfg, bench.accelerator.device
    if cfg.train.compile:
        return {}
    double = 2 * cfg.data.batch_size
    changes: dict[str, Config] = {
        f"student.channels_last={str(not cfg.student.channels_last).lower()}": replace(
            cfg, student=replace(cfg.student, channels_last=not cfg.student.channels_last)
        )
    }
    if cfg.train.precision == "fp32" and _has_bf16(device):
        changes["train.precision=bf16"] = replace(cfg, train=replace(cfg.train, precision="bf16"))
    if double <= len(index) and _room(device_peak, bench.accelerator):
        changes[f"data.batch_size={double}"] = replace(cfg, data=replace(cfg.data, batch_size=double))
    benches = {"now": plain(cfg, bench, index)}
    for name, changed in changes.items():
        benches[name] = plain(changed, bench, index)
        if changed.train.precision != cfg.train.precision:
            in_bf16(benches[name])
    loader = SyntheticLoader(index, device)
    times: dict[str, list[float]] = {name: [] for name in benches}
    for number in range(ROUNDS):
        for name, each in benches.items():
            slow = number and np.median(times[name]) > 4 * np.median(times["now"])
            if any(gather_object([bool(slow)])):  # all processes take the same steps
                continue
            clock = Clock(device)
            done = enough(seconds=seconds / ROUNDS / len(benches), least=2, most=MOST)
            run_steps(each, loader, clock, done, warm_up=1 if number else WARM_UP)
            marked, _ = clock.take()
            times[name] += [sum(stages.values()) for stages in marked]
    medians = {name: float(np.median(values)) for name, values in times.items()}
    rows = {name: changed.data.batch_size for name, changed in changes.items()}
    return {
        name: {"now": medians["now"], "then": medians[name] * cfg.data.batch_size / rows[name]} for name in rows
    }


def _room(device_peak: int | None, accelerator: Accelerator) -> bool:
    """Whether a batch twice as large surely fits: every process must answer alike."""
    if device_peak is None:
        return True
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    return max(gather_object([device_peak / total])) < 0.45


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_bf16_supported()


def of_teacher(bench: Bench) -> Found:
    """The teacher's forward pass in bf16, and its classifier alone, which is what a cache leaves."""
    cfg, device, teacher = bench.cfg, bench.accelerator.device, bench.teacher
    if cfg.teacher.mode != "online" or teacher is None:
        return {}
    images = torch.zeros(bench.rows, 3, teacher.size, teacher.size, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    features = torch.rand(bench.rows, teacher.feature_dim, device=device)
    now = call_seconds(lambda: teacher(images), device, 4)
    found = {
        "teacher.mode=cached": {"now": now, "then": call_seconds(lambda: teacher.logits(features), device, 8)}
    }
    if teacher.precision == "fp32" and not cfg.teacher.compile and _has_bf16(device):
        teacher.precision = "bf16"
        try:
            found["teacher.precision=bf16"] = {
                "now": now,
                "then": call_seconds(lambda: teacher(images), device, 4),
            }
        finally:
            teacher.precision = "fp32"
    return found


def of_loss(bench: Bench) -> Found:
    """DCD in the form that `auto` chooses."""
    config, teacher = bench.cfg.loss, bench.teacher
    if not config.dcd or config.form == "auto" or teacher is None:
        return {}
    now, then = (_dcd_seconds(bench, teacher, form) for form in (config.form, "auto"))
    return {"loss.form=auto": {"now": now, "then": then}}


def _dcd_seconds(bench: Bench, teacher: Teacher, form: str) -> float:
    """Forward and backward of the DCD term alone, by one form of it."""
    device, rows = bench.accelerator.device, bench.rows
    classes = 2
    term = bench.step.module.terms["dcd"]
    assert isinstance(term, LossTerm)
    kept = term.settings
    term.settings = replace(kept, form=form)

    def random(dim: int) -> ModelOutput:
        features = torch.randn(rows, dim, device=device)
        return ModelOutput(features, features[:, :classes])

    known = random(teacher.feature_dim)

    def call() -> None:
        student = random(bench.step.module.student.feature_dim)
        student.features.requires_grad_()
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        term(LossInputs(student, known, labels, rows))[0].backward()
        term.zero_grad()

    try:
        return call_seconds(call, device, 5)
    finally:
        term.settings = kept


def of_data(
    cfg: Config,
    loading: dict[str, float],
    sizes: list[int],
    seconds: float,
    convert: reading.TrialConversion,
) -> Found:
    """The loader of one process, as measured in `loading`, and FFCV's with the images converted."""
    found = reading.converted_seconds(cfg, tuple(sizes), seconds, convert)
    if found is None or not loading:
        return {}
    rows = cfg.data.batch_size
    return {"data.backend=ffcv": {"now": rows * loading["loader"], "then": rows * found}}
