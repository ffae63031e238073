"""From a config to the parts of a run: data, plans, modules. The train loop and the tools share it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast,
    set_seed,
)
from torch import nn
from torch.distributed.rendezvous import rendezvous

from fastdcd import export, models, pretrained, trackers, weights
from fastdcd import teacher as teachers
from fastdcd.checkpoint import Progress
from fastdcd.config import Config, Data
from fastdcd.config_file import dump
from fastdcd.distill import DistillModule
from fastdcd.evaluate import Accuracy
from fastdcd.teacher import Teacher, load_teacher
from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.files import replace_file, write_json
from pipelines.image_folder import read_classes, user_cache
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan, epoch_order
from pipelines.views import FAMILIES, ViewFamily


# DDP averages gradients over processes. It need not send BatchNorm's statistics at every step, 2 collectives and a copy
# for each: in training nothing reads them, and the first process's, which count, are the same either way.
# `broadcast_buffers` gives them to all at the end of an epoch.
class _DDPArguments(DistributedDataParallelKwargs):
    def to_kwargs(self) -> dict[str, Any]:
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters  # renamed in torch 2.15
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return {**super().to_kwargs(), name: False}


_DDP = _DDPArguments(gradient_as_bucket_view=True)


PCI = Path("/sys/bus/pci/devices")  # what Linux says of each


def make_accelerator(cfg: Config) -> Accelerator:
    """Accelerate, set up for a config; seeds torch's generators (run.seed)."""
    device = cfg.data.device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"data.device: got {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("data.device: got cuda, but torch finds no GPU; set data.device=cpu or auto")
    precision = "no" if cfg.train.precision == "fp32" else cfg.train.precision
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("train.precision: fp16 needs a GPU (its gradients are scaled there); use bf16 or fp32")
    torch.backends.cudnn.allow_tf32 = cfg.train.tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # every epoch has images of one size, and so one choice of algorithms
    trackers.check(cfg.run.trackers)
    timeout = timedelta(seconds=cfg.train.timeout)
    _rejoin(timeout)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        log_with=list(cfg.run.trackers) or None,
        project_dir=cfg.run.dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    accelerator.ddp_handler = _DDP  # Accelerate takes no subclass as a handler
    set_seed(cfg.run.seed)
    _stay_near(accelerator.device)
    return accelerator


def _stay_near(device: torch.device) -> None:
    """Keep this process, and the workers it will start, on the cores of the GPU's own NUMA node: several processes of
    a machine would otherwise read each other's memory across the node boundary."""
    if device.type != "cuda" or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < 2:
        return
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack its address
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    said = PCI / address / "local_cpulist"  # as 0-15,64-79
    near: set[int] = set()
    for part in said.read_text(encoding="utf-8").strip().split(",") if said.is_file() else []:
        first, _, last = part.partition("-")
        if first:
            near.update(range(int(first), int(last or first) + 1))
    if near := near & os.sched_getaffinity(0):
        os.sched_setaffinity(0, near)


def _rejoin(timeout: timedelta) -> None:
    """Form the process group of processes that torchrun restarted, before Accelerate does.

    torchrun keeps its store, in which a process may find the address of one that is gone; keys of their own
    for every attempt prevent it. Only on one machine: torchrun counts attempts for each machine apart.
    """
    attempt, processes = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    if attempt == "0" or dist.is_initialized() or processes != os.environ.get("LOCAL_WORLD_SIZE"):
        return
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=timeout)


def open_data(cfg: Config, accelerator: Accelerator) -> tuple[Loader, Loader]:
    """The training and validation loaders. Raises ValueError if they cannot be read or their classes differ."""
    with accelerator.main_process_first():  # the first process indexes, the others find the index
        caches = cfg.teacher.mode in ("cached", "fill")
        train = open_set(cfg.data, cfg.data.train, accelerator.device, "data.train", repeatable=caches)
        val = open_set(cfg.data, cfg.data.val, accelerator.device, "data.val")
    if train.index.classes != val.index.classes:
        ours, theirs = set(train.index.classes), set(val.index.classes)
        raise ValueError(
            f"data.val: {cfg.data.val} has {len(theirs)} classes and data.train {len(ours)}; "
            f"not in both: {sorted(ours ^ theirs)[:3]} (data.classes names the classes of folders)"
        )
    classes = cfg.student.classes
    if classes is not None and classes != len(train.index.classes):
        raise ValueError(f"student.classes: got {classes}, but {cfg.data.train} has {len(train.index.classes)}")
    return train, val


def open_set(section: Data, path: Path, device: torch.device, key: str, *, repeatable: bool = False) -> Loader:
    """One dataset by the backend of a config; errors name the config key. A cache needs `repeatable` pixels."""
    options = LoaderOptions(
        workers=section.workers,
        device=device,
        classes=read_classes(section.classes) if section.classes else None,
        index_cache=user_cache(),
        on_decode_error=section.on_decode_error,
        repeatable=repeatable,
        own=section.own,
    )
    try:
        return open_loader(section.backend, path, options)
    except ValueError as error:
        whose = "" if str(error).startswith("data.") else f"{key}: "
        raise ValueError(f"{whose}{error}") from None


def view_family(cfg: Config) -> ViewFamily:
    """The view family of training."""
    section = cfg.views
    family = FAMILIES[section.family]
    wanted = {each.name for each in fields(family)}  # type: ignore[arg-type]
    settings = {name: getattr(section, name) for name in ("scale", "ratio", "padding", "crop_ratio", "flip")}
    try:
        return family(**{name: value for name, value in settings.items() if name in wanted})
    except ValueError as error:
        raise ValueError(f"views.{error}") from None


def epoch_plan(cfg: Config, loader: Loader, family: ViewFamily, epoch: int) -> EpochPlan:
    """What an epoch of training shows, in which order."""
    views, view = cfg.views, epoch % cfg.view_count
    shuffled = epoch_order(
        len(loader.index),
        seed=cfg.run.seed,
        epoch=epoch,
        kind=cfg.data.order,
        augment=views.augment,
        view_seed=views.seed,
        view=view,
    )
    return EpochPlan(
        index=loader.index,
        family=family,
        view_seed=views.seed,
        view=view,
        order=shuffled,
        batch_size=cfg.data.batch_size,
        augment=views.augment,
    )


def origin(train: Loader, teacher: Teacher | None) -> dict[str, str]:
    """What data and teacher are, whatever a config calls them: kept in checkpoints, compared when one is resumed."""
    return {
        **(teachers.fingerprint(teacher) if teacher else {}),
        "data.index": train.index.digest,
        **{f"loader.{key}": value for key, value in train.fingerprint.items()},
    }


def steps_per_epoch(cfg: Config, index: DatasetIndex) -> int:
    """Steps of an epoch of training; the last one's batch may be short."""
    return -(-len(index) // cfg.data.batch_size)


def build_teacher(
    cfg: Config, classes: int, accelerator: Accelerator, *, processes: int | None = None
) -> Teacher | None:
    """The teacher, or None. One forward pass takes one process's share of a batch."""
    if cfg.teacher.mode == "none":
        return None
    rows = -(-cfg.data.batch_size // (processes or accelerator.num_processes))
    published = any(checkpoint and pretrained.is_published(checkpoint) for _, checkpoint in cfg.teacher.members)
    with accelerator.local_main_process_first() if published else nullcontext():  # one of a machine's fetches them
        return load_teacher(cfg, classes=classes, rows=rows, device=accelerator.device, say=accelerator.print)


def build_student(cfg: Config, classes: int, teacher: Teacher | None, accelerator: Accelerator) -> DistillModule:
    """The module to train, with fresh weights of run.seed or those of student.checkpoint."""
    section = cfg.student
    trained = {cfg.student_size(epoch) for epoch in range(cfg.train.epochs)}
    sizes = trained | {cfg.eval_size}
    student = models.build(section.model, classes=classes, sizes=sorted(sizes))
    models.check_sizes(student, section.model, sizes, "student.image_size")
    models.check_training(student, section.model, trained)
    if (checkpoint := section.checkpoint) is not None:
        if pretrained.is_published(checkpoint):
            with accelerator.local_main_process_first():
                checkpoint = pretrained.fetch(section.model, checkpoint, "student.checkpoint", accelerator.print)
        try:
            weights.load_into(student, checkpoint, what="student", classifier=not section.fresh_classifier)
        except ValueError as error:
            raise ValueError(f"student.checkpoint: {error}") from None
    normalize = models.normalize_for(section.model, section.mean, section.std)
    teacher_dim = teacher.feature_dim if teacher else 0
    module: nn.Module = DistillModule(
        student,
        normalize,
        cfg.loss,
        teacher_dim=teacher_dim,
        teacher_classes=teacher.classes if teacher else None,
    )
    if cfg.train.ema:
        assert isinstance(module, DistillModule)
        module.start_average(cfg.train.ema)
    if section.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise ValueError("student.sync_bn: got true, but torch has it on GPUs only; set it false or use GPUs")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module, DistillModule)
    module.to(accelerator.device)
    if section.channels_last:
        module.to(memory_format=torch.channels_last)
    if cfg.train.compile:
        mode = None if cfg.train.compile is True else cfg.train.compile
        module.student.compile(dynamic=False, mode=mode)  # in place: names in checkpoints stay the same
    return module


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers (BatchNorm statistics): each has moved its own by its own rows."""
    broadcast(list(module.buffers()))


def image_sizes(student: int, teacher: int | None) -> tuple[int, ...]:
    """Sizes to render a batch at: the student's first, the teacher's last, once if they are equal."""
    return (student,) if teacher in (None, student) else (student, teacher)


def write_config(cfg: Config, accelerator: Accelerator) -> None:
    """Make the run's folder, with the complete config in it, and start the trackers."""
    assert cfg.run.dir is not None
    if accelerator.is_main_process:
        cfg.run.dir.mkdir(parents=True, exist_ok=True)
        with replace_file(cfg.run.dir / "config.yaml") as file:
            file.write(dump(cfg).encode())
    accelerator.wait_for_everyone()
    trackers.start(accelerator, "trackers", cfg.run.dir)


def write_results(
    cfg: Config,
    accelerator: Accelerator,
    module: DistillModule,
    progress: Progress,
    accuracy: Accuracy | None,
    average_accuracy: Accuracy | None,
    teacher_accuracy: Accuracy | None,
    finished: bool,
    labels: Sequence[str],
) -> dict[str, Any]:
    """Write summary.json; if the run is finished student.safetensors, student-ema.safetensors if there is a moving
    average, and export/, the student as timm loads it, for classes named `labels`. Returns the summary."""
    assert cfg.run.dir is not None
    summary = {
        "finished": finished,
        **asdict(progress),
        "top1": accuracy.top1 if accuracy else None,
        "top5": accuracy.top5 if accuracy else None,
        **({"ema_top1": average_accuracy.top1, "ema_top5": average_accuracy.top5} if average_accuracy else {}),
        "teacher_top1": teacher_accuracy.top1 if teacher_accuracy else None,
        "student_parameters": sum(parameter.numel() for parameter in module.student.parameters()),
    }
    if accelerator.is_main_process:
        if finished:
            student = module.student.original_state_dict()
            weights.save(cfg.run.dir / "student.safetensors", student)
            export.write_folder(cfg.run.dir / "export", export.describe(cfg, labels), student)
            if module.average is not None:
                averaged = module.average.network.original_state_dict()
                weights.save(cfg.run.dir / "student-ema.safetensors", averaged)
        write_json(cfg.run.dir / "summary.json", summary)
    return summary
