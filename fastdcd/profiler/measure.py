"""Measuring a run: its stages alone and together, and the ceilings beside them. The result is plain JSON.

docs/profile.md describes its keys; FORMAT changes whenever their meaning does.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from tqdm import tqdm

from fastdcd import experiment
from fastdcd.config import Config
from fastdcd.profiler import alternatives, reading
from fastdcd.profiler.clock import Clock, call_seconds, spread, steady, synchronize
from fastdcd.profiler.stages import in_order
from fastdcd.profiler.steps import Bench, enough, plain, run_steps, set_up
from fastdcd.profiler.verdict import WAITING
from fastdcd.teacher_modes import open_mode
from pipelines.base import Loader
from pipelines.loaders.replay import ReplayLoader
from pipelines.loaders.synthetic import SyntheticLoader
from pipelines.plan import RankPlan, evaluation_plan
from pipelines.prefetch import prefetch

FORMAT = "fastdcd-profile-2"
LEAST = 12  # steps of a measurement, however slow they are
MOST = 400


def profile(
    cfg: Config,
    *,
    seconds: float = 60.0,
    quick: bool = False,
    trace: Path | None = None,
    convert: reading.TrialConversion | None = None,
) -> dict[str, Any]:
    """Measure a config on its data and this machine in about `seconds`. Nothing of the run is written.

    `quick` tries no alternatives: most advice then promises no gain, and too small a batch is not told. With
    `trace` some steps are also recorded by torch.profiler, as a Chrome trace. With `convert` (sample_to_beton of
    pipelines.conversion.job) a conversion is tried where data may be what a step waits for.

    Raises ValueError for what training would refuse.
    """
    if cfg.teacher.mode == "fill":  # its slower half; and a profile must not write a cache
        cfg = replace(cfg, teacher=replace(cfg.teacher, mode="online"))
    accelerator = experiment.make_accelerator(cfg)
    device = accelerator.device
    share = seconds / 12  # the measurements below last about 12 shares
    bar = tqdm(total=9, desc="profile", disable=None if accelerator.is_main_process else True)

    def stage(name: str) -> None:
        bar.set_postfix_str(name)
        bar.update()

    begin = time.perf_counter()
    train, val = experiment.open_data(cfg, accelerator)
    with train, val:
        opened = time.perf_counter() - begin
        classes = len(train.index.classes)
        family = experiment.view_family(cfg)
        teacher = experiment.build_teacher(cfg, classes, accelerator)
        mode = open_mode(cfg, train, family, teacher, accelerator)
        bench = set_up(cfg, accelerator, train.index, family, teacher, mode)
        plan = experiment.epoch_plan(cfg, train, family, 0)
        teacher_size = mode.begin(plan.view)
        rank_plan = plan.for_rank(
            experiment.image_sizes(cfg.student_size(0), teacher_size),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

        stage("first steps")
        cold = {"open_seconds": opened, **_cold(bench, train, rank_plan)}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stage("together")
        steps = Clock(device)
        _steps_together(bench, train, steps, share)
        device_peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        stage("ceilings")
        synthetic_loader = SyntheticLoader(train.index, device)
        synthetic = _measure(bench, synthetic_loader, 1.5 * share)
        ceilings = {"synthetic": _rate(synthetic, cfg), **_replayed(bench, train, cfg, share)}
        if cfg.teacher.mode != "none":
            bare = plain(cfg, bench, train.index)
            ceilings["plain_cross_entropy"] = _rate(_measure(bare, synthetic_loader, share), cfg)
        _steps_together(bench, train, steps, share)
        stage("communication")
        communication = _communication(bench, synthetic_loader, synthetic, share)
        gradient_copy = _gradient_copy(bench)
        stage("loader")
        loading = reading.stages(train, rank_plan, cfg, share)
        loading_cpu = None
        if loading:
            ceilings["loader"] = accelerator.num_processes / loading["loader"]
            loading_cpu = reading.seconds_an_image(train, rank_plan, share / 3, time.process_time)
        ceilings |= _copies(train, rank_plan, accelerator)
        stage("evaluation")
        evaluation = _evaluation(bench, val, share)
        stage("memory")
        sizes = [crops.size for crops in rank_plan.crops]
        memory = {**_memory(bench, synthetic_loader, sizes), "device_peak": device_peak}
        _steps_together(bench, train, steps, share)
        together = _summary(*steps.take())
        _split_backward(together, synthetic, communication)
        _attribute_wait(together, ceilings)
        stage("alternatives")
        found: alternatives.Found = {}
        if not quick:
            found |= alternatives.of_student(bench, train.index, device_peak, share)
            found |= alternatives.of_teacher(bench) | alternatives.of_loss(bench)
            waiting = together["stages"].get("data_wait", {"mean": 0.0})["mean"] / together["step"]["mean"]
            slow = cfg.data.backend == "torch" and waiting >= WAITING
            if convert and slow and accelerator.is_main_process:
                sizes = [each.size for each in rank_plan.crops]
                found |= alternatives.of_data(cfg, loading, sizes, share, convert)
        if trace is not None:
            stage("trace")
            _trace(bench, train, trace)
        mode.close()
        bar.close()

    own = {name: values["mean"] for name, values in together["stages"].items()}
    ranks = gather_object([{"rank": accelerator.process_index, "stages": own, "step": together["step"]["mean"]}])
    images = cfg.data.batch_size
    return {
        "format": FORMAT,
        "about": _about(cfg, accelerator),
        "images_per_step": images,
        "images_per_second": images / together["step"]["mean"],
        "step": together["step"],
        "stages": together["stages"],
        "alone": {name: values for name, values in synthetic["stages"].items() if name != "data_wait"},
        "profiling_overhead": together["overhead"],
        "data_wait_seconds": together["waits"],
        "loader_seconds_an_image": loading,
        "loader_cpu_seconds_an_image": loading_cpu,
        "ceilings": ceilings,
        "cold": cold,
        "communication": communication,
        "gradient_copy_seconds": gradient_copy,
        "evaluation": evaluation,
        "memory": memory,
        "alternatives": found,
        "ranks": ranks,
        "dataset": {"images": len(train.index), "val_images": len(val.index), "classes": classes},
    }


def _steps_together(bench: Bench, loader: Loader, clock: Clock, seconds: float) -> None:
    """Steps as in training. They come in three turns over the minute: a machine's pace drifts, and what two profiles
    may differ by should be seen within each."""
    done = enough(seconds=seconds, least=-(-LEAST // 3), most=MOST // 3)
    run_steps(bench, loader, clock, done, alternate=True)


def _measure(bench: Bench, loader: Loader, seconds: float, **options: Any) -> dict[str, Any]:
    """Steps for about `seconds`, all of them marked."""
    clock = Clock(bench.accelerator.device)
    run_steps(bench, loader, clock, enough(seconds=seconds, least=LEAST, most=MOST), **options)
    return _summary(*clock.take())


def _summary(marked: list[dict[str, float]], whole: list[float]) -> dict[str, Any]:
    """The whole step, its stages, and what marking them costs, from steps that were marked and others."""
    waits = [round(step.get("data_wait", 0.0), 6) for step in marked]
    overhead = float(np.median([sum(step.values()) for step in marked]) / np.median(whole) - 1) if whole else None
    kept = steady(marked, lambda step: sum(step.values()))
    totals = [[sum(step.values()) for step in steps] for steps in (marked, kept)]
    names = in_order({name for step in marked for name in step})
    return {
        "step": spread(whole, steady(whole, float)) if whole else spread(*totals),
        "stages": {
            name: spread(*([step.get(name, 0.0) for step in steps] for steps in (marked, kept))) for name in names
        },
        "waits": waits,
        "overhead": overhead,
    }


def _rate(measured: dict[str, Any], cfg: Config) -> float:
    """Images per second over all processes."""
    return cfg.data.batch_size / float(measured["step"]["mean"])


def _replayed(bench: Bench, loader: Loader, cfg: Config, seconds: float) -> dict[str, float]:
    # closing a ReplayLoader closes what it repeats, which is still needed
    return {"replay": _rate(_measure(bench, ReplayLoader(loader), seconds), cfg)}


def _cold(bench: Bench, loader: Loader, rank_plan: RankPlan) -> dict[str, float | None]:
    """What only the beginning costs: the first batch, the first step, and reading what no cache holds yet."""
    cfg = bench.cfg
    threads = max(cfg.data.workers, 1)
    sample = rank_plan.ids[-256:]
    cold = reading.cold_read_seconds(cfg.data.train, loader.index, sample, threads)
    begin = time.perf_counter()
    epoch = loader.epoch(rank_plan)
    next(epoch)
    first_batch = time.perf_counter() - begin
    epoch.close()
    clock = Clock(bench.accelerator.device)
    run_steps(bench, loader, clock, lambda kept: True, warm_up=0)
    begin = time.perf_counter()
    run_steps(bench, SyntheticLoader(loader.index, bench.accelerator.device), clock, lambda kept: True, warm_up=0)
    clock.take()
    return {
        "first_batch_seconds": first_batch,
        "first_step_seconds": time.perf_counter() - begin,
        "read_seconds_an_image": cold,
    }


def _communication(
    bench: Bench, loader: Loader, synced: dict[str, Any], seconds: float
) -> dict[str, float] | None:
    """Gradient all-reduce alone, and the backward pass with and without it; None on one process."""
    accelerator = bench.accelerator
    if accelerator.num_processes == 1:
        return None
    silent = _measure(bench, loader, seconds, communicate=False)
    gradient = _gradient(bench)
    alone = call_seconds(lambda: dist.all_reduce(gradient), accelerator.device, 8)
    processes = accelerator.num_processes
    return {
        "bytes": gradient.nbytes,
        "all_reduce_alone_seconds": alone,
        "bytes_per_second": 2 * (processes - 1) / processes * gradient.nbytes / alone,
        "backward_seconds": silent["stages"]["backward"]["mean"],
        "exposed_seconds": synced["stages"]["backward"]["mean"] - silent["stages"]["backward"]["mean"],
    }


def _gradient(bench: Bench) -> Tensor:
    """As large as all gradients: zeros [numbers], float32."""
    count = sum(each.numel() for each in bench.step.module.parameters() if each.requires_grad)
    return torch.zeros(count, device=bench.accelerator.device)


def _gradient_copy(bench: Bench) -> float:
    """Seconds of a pass over all gradients, as DDP makes it to fill its buckets: it divides them on the way."""
    gradient, bucket = _gradient(bench), _gradient(bench)
    return call_seconds(lambda: torch.mul(gradient, 0.5, out=bucket), bench.accelerator.device, 8)


def _split_backward(
    together: dict[str, Any], synthetic: dict[str, Any], communication: dict[str, float] | None
) -> None:
    """With DDP, a backward pass is its own work and what it waits for other processes beyond that."""
    if communication is None:
        return
    for found in (together, synthetic):
        stages = found["stages"]
        whole, own = stages["backward"], communication["backward_seconds"]
        waiting = max(whole["mean"] - own, 0.0)
        kept = (whole["mean"] - waiting) / whole["mean"]
        reduce = stages.setdefault("all_reduce", dict.fromkeys(whole, 0.0))
        for name in ("mean", "median", "quartile_25", "quartile_75"):
            reduce[name] += whole[name] * (1 - kept)
            whole[name] *= kept
        reduce["samples"] = whole["samples"]


def _evaluation(bench: Bench, val: Loader, seconds: float) -> dict[str, float]:
    """Seconds of one evaluation, from some of its batches."""
    cfg, accelerator = bench.cfg, bench.accelerator
    batch_size = max(cfg.eval.batch_size, accelerator.num_processes)
    plan = evaluation_plan(val.index, crop_ratio=cfg.eval.crop_ratio, batch_size=batch_size)
    rank_plan = plan.for_rank(
        (cfg.eval_size,), rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    module = bench.step.module.eval()
    images = 0
    batches = prefetch(val.epoch(rank_plan), lambda ids: None, accelerator.device)
    with torch.no_grad():
        begin = time.perf_counter()
        for number, (batch, _) in enumerate(batches):
            with accelerator.autocast():
                module.predict(batch.at(cfg.eval_size))
                if cfg.eval.flip:
                    module.predict(batch.at(cfg.eval_size).flip(3))
            if number == 0 and rank_plan.batches > 1:  # starts workers, compiles
                synchronize(accelerator.device)
                begin = time.perf_counter()
                continue
            images += len(batch.ids)
            if time.perf_counter() - begin > seconds:
                break
        synchronize(accelerator.device)
        elapsed = time.perf_counter() - begin
    batches.close()
    bench.step.wrapped.train()
    per_image = elapsed / max(images, 1) / accelerator.num_processes
    return {"seconds_an_image": per_image, "seconds": per_image * len(val.index)}


def _memory(bench: Bench, loader: Loader, sizes: Sequence[int]) -> dict[str, float | None]:
    """Bytes by what they hold. Activations: everything one step keeps for its backward pass, counted once."""
    saved: dict[int, int] = {}
    weights = {each.untyped_storage().data_ptr() for each in bench.step.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_steps(bench, loader, Clock(bench.accelerator.device), lambda kept: True, warm_up=0)
    parameters = _bytes(bench.step.module.parameters())
    state = [
        value
        for of_parameter in bench.step.optimizer.state.values()
        for value in of_parameter.values()
        if isinstance(value, Tensor)
    ]
    on_gpu = bench.accelerator.device.type == "cuda"
    total = torch.cuda.get_device_properties(bench.accelerator.device).total_memory if on_gpu else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "student": parameters,
        "gradients": parameters,
        "optimizer": _bytes(state),
        "teacher": _bytes(bench.teacher.parameters()) if bench.teacher else 0,
        "activations": sum(saved.values()),
        "images": sum(bench.rows * 3 * size * size for size in sizes),
        "process_peak": peak,
        "device_total": total,
    }


def _copies(loader: Loader, rank_plan: RankPlan, accelerator: Accelerator) -> dict[str, float]:
    """Images per second over all processes that the way to the device lets through, as prefetch sends them; empty
    where there is no such way."""
    if accelerator.device.type != "cuda":
        return {}
    epoch = loader.epoch(rank_plan)
    batch = next(epoch)
    epoch.close()
    if all(image.is_cuda for image in batch.images):
        return {}
    seconds = call_seconds(
        lambda: [image.to(accelerator.device, non_blocking=True) for image in batch.images], accelerator.device, 8
    )
    return {"copy": accelerator.num_processes * len(batch.ids) / seconds}


def _attribute_wait(together: dict[str, Any], ceilings: dict[str, float]) -> None:
    """On a GPU a step waits alike for a late loader and for a late copy: it is the slower of them it waits for."""
    if ceilings.get("copy", math.inf) < ceilings.get("loader", math.inf):
        together["stages"]["copy"] = together["stages"].pop("data_wait")


def _trace(bench: Bench, loader: Loader, path: Path) -> None:
    """A Chrome trace of some steps; of several processes each writes its own."""
    activities = [ProfilerActivity.CPU]
    if bench.accelerator.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    clock = Clock(bench.accelerator.device)
    clock.tracing = True
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says when it begins, ends and finds no GPU
    with torch_profile(activities=activities) as recorded:
        run_steps(bench, loader, clock, lambda kept: kept >= 5, warm_up=1)
    if bench.accelerator.num_processes > 1:
        path = path.with_stem(f"{path.stem}-rank{bench.accelerator.process_index}")
    recorded.export_chrome_trace(str(path))


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _about(cfg: Config, accelerator: Accelerator) -> dict[str, Any]:
    """What was measured, where."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "torch": torch.__version__,
        "student": cfg.student.model,
        "image_size": cfg.student_size(0),
        "teacher": cfg.teacher.model if cfg.teacher.mode != "none" else None,
        "teacher_mode": cfg.teacher.mode,
        "backend": cfg.data.backend,
        "train": str(cfg.data.train),
        "val": str(cfg.data.val),
        "classes": str(cfg.data.classes) if cfg.data.classes else None,
        "workers": cfg.data.workers,
        "precision": cfg.train.precision,
        "compile": cfg.train.compile,
        "channels_last": cfg.student.channels_last,
        "form": cfg.loss.form,
        "epochs": cfg.train.epochs,
        "eval_every": cfg.eval.every,
        "cache": str(cfg.cache.path or Path("data", f"{cfg.run.dir.name if cfg.run.dir else 'teacher'}-cache")),
        "config": "CONFIG",
        "set": [],
    }
