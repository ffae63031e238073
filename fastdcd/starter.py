"""A first config for somebody's data: what is there is looked at, the rest is chosen, every choice has a comment."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastdcd import pretrained
from pipelines.base import LoaderOptions, open_loader
from pipelines.formats.resident import IMAGES
from pipelines.formats.shards import INDEX
from pipelines.image_folder import SETS, is_hidden, user_cache
from pipelines.index import DatasetIndex

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test")
SMALL = 64  # pixels: below, images are padded and shifted, and networks made for CIFAR fit


@dataclass(frozen=True, kw_only=True)
class Found:
    """A training and a validation set.

    Attributes:
        train, val: their paths.
        kind: what they are, in words.
        backend: the loader for it.
        images, val_images: how many.
        classes: names in label order.
        side: median of the shorter side of the training images, pixels.
        uniform: all images are squares of that side.
    """

    train: Path
    val: Path
    kind: str
    backend: str
    images: int
    val_images: int
    classes: tuple[str, ...]
    side: int
    uniform: bool


def look(root: Path, backend: str | None = None) -> Found:
    """Look at the data in a folder: class folders or what tools/convert.py wrote, training and validation set.

    Args:
        root: holds train/ and val/ (or validation/, test/), or train.beton and val.beton.
        backend: the loader; chosen by what is there if None.

    Raises ValueError if there are no such sets, their classes differ, or the loader cannot read them.
    """
    train, val = (_set(root, names) for names in (TRAIN, VAL))
    kind, usual = _kind(train)
    chosen = backend or usual
    indexes = [_index(path, chosen) for path in (train, val)]
    ours, theirs = (set(index.classes) for index in indexes)
    if indexes[0].classes != indexes[1].classes:
        raise ValueError(
            f"{val}: has {len(theirs)} classes and {train} {len(ours)}; not in both: {sorted(ours ^ theirs)[:3]}"
        )
    sizes = indexes[0].sizes
    side = int(np.median(sizes.min(1)))
    return Found(
        train=train,
        val=val,
        kind=kind,
        backend=chosen,
        images=len(indexes[0]),
        val_images=len(indexes[1]),
        classes=indexes[0].classes,
        side=side,
        uniform=bool((sizes == side).all()),
    )


def _set(root: Path, names: tuple[str, ...]) -> Path:
    if not root.is_dir():
        raise ValueError(
            f"{root}: no such folder; expected one that holds train/ and val/, or train.beton and val.beton"
        )
    for path in (root / f"{name}{suffix}" for suffix in ("", ".beton") for name in names):
        if path.exists():
            return path
    inside = sorted(entry.name for entry in root.iterdir() if not is_hidden(entry.name))
    convert = f"convert first: fastdcd convert shards {shlex.quote(str(root))} OUT, then fastdcd init OUT"
    archives = [name for name in inside if name.endswith((".parquet", ".tar", ".zip", ".gz"))]
    hint = convert if archives or "ILSVRC" in inside or "data" in inside else "make them of your images"
    raise ValueError(
        f"{root}: no {names[0]}/ in it (looked for {', '.join(names)}, and .beton); it has "
        f"{', '.join(inside[:5]) or 'nothing'}; {hint}"
    )


def _kind(path: Path) -> tuple[str, str]:
    """What a set is, and the loader for it."""
    if path.suffix == ".beton":
        return ".beton", "ffcv"
    if (path / IMAGES).is_file():
        return "resident arrays", "resident"
    on_gpu = torch.cuda.is_available() and importlib.util.find_spec("nvidia.dali") is not None
    return "shards" if (path / INDEX).is_dir() else "class folders", "dali" if on_gpu else "torch"


def _index(path: Path, backend: str) -> DatasetIndex:
    options = LoaderOptions(workers=1, index_cache=user_cache())
    try:
        with open_loader(backend, path, options) as loader:
            return loader.index
    except ValueError as error:
        inside = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        if SETS.isdisjoint(inside) and any(name.endswith((".tar", ".parquet")) for name in inside):
            raise ValueError(
                f"{error}; convert first: fastdcd convert shards {shlex.quote(str(path.parent))} OUT"
            ) from None
        raise


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a first config does with the data.

    Attributes:
        name: of the experiment: runs/NAME/...
        student: a model's name.
        teacher: a model's name.
        published: the teacher's weights are fetched; else it is trained first.
        size: pixels, of student and teacher.
        teacher_size: pixels that the teacher's published weights were trained at.
        epochs, batch: of the student, and of the teacher if it is trained.
    """

    name: str
    student: str
    teacher: str
    published: bool
    size: int
    teacher_size: int
    epochs: int
    batch: int


def choose(
    found: Found, name: str, *, student: str | None, teacher: str | None, size: int | None, epochs: int
) -> Choice:
    """Fill in what the user has not said. Raises ValueError for a teacher without published weights."""
    small = found.uniform and found.side <= SMALL
    published = teacher is not None and teacher.startswith(("timm:", "torchvision:"))
    if teacher is not None and published:
        pretrained.check_published(teacher, "--teacher")
    usual_size = found.side if small else min(max(found.side // 32 * 32, 32), 224)
    return Choice(
        name=name,
        student=student or ("cifar:resnet20" if small else "torchvision:resnet18"),
        teacher=teacher or ("cifar:wrn-16-2" if small else "torchvision:resnet50"),
        published=published,
        size=size or usual_size,
        teacher_size=pretrained.input_size(teacher) if teacher and published else size or usual_size,
        epochs=epochs,
        batch=_batch(found.images),
    )


def _batch(images: int) -> int:
    """64, or 256 for large sets; fewer for tiny ones, and never one image left over: BatchNorm cannot train on one."""
    batch = min(256 if images >= 100_000 else 64, max(images // 2 * 2, 2))
    while batch > 2 and images % batch == 1:
        batch -= 2
    return batch


def configs(found: Found, choice: Choice, folder: Path) -> dict[str, str]:
    """The files to write in `folder`: student.yaml, and teacher.yaml if the teacher is trained first."""
    files = {"student.yaml": _student(found, choice, folder)}
    if not choice.published:
        files["teacher.yaml"] = _teacher(found, choice)
    return files


def commands(folder: Path, choice: Choice) -> list[str]:
    """The two commands that lead from the configs to a distilled student."""
    student, teacher = (shlex.quote(str(folder / name)) for name in ("student.yaml", "teacher.yaml"))
    first = f"fastdcd cache fill --config {student}" if choice.published else f"fastdcd train --config {teacher}"
    return [first, f"fastdcd train --config {student}"]


def _quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _shared(found: Found, choice: Choice, run: str) -> tuple[str, str]:
    """The sections that both configs have, about data and training."""
    small = found.uniform and found.side <= SMALL
    views = (
        [
            "  family: pad_crop          # shifted by up to padding pixels, as for CIFAR",
            f"  padding: {max(found.side // 8, 1)}",
        ]
        if small
        else ["  family: random_resized_crop   # as for ImageNet; scale and ratio are torchvision's"]
    )
    lines = [
        "data:",
        f"  train: {_quoted(found.train)}   # {found.images:,} images, {len(found.classes)} classes, {found.side} px",
        f"  val: {_quoted(found.val)}   # {found.val_images:,} images",
        f"  backend: {found.backend}   # {found.kind}; docs/backends.md compares the loaders",
        f"  batch_size: {choice.batch}   # of one step, over all processes",
        "  workers: 4   # of each process, for decoding",
        "views:",
        *views,
        "  flip: 0.5   # 0 where left and right matter, as in digits",
    ]
    training = [
        "optim: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5.0e-4}   # lr: the first thing to tune",
        "schedule: {name: one_cycle, warmup: 3}   # epochs until the peak",
        "train:",
        f"  epochs: {choice.epochs}",
        "  precision: fp32   # bf16 on GPUs of 2020 and later",
        "  log_every: 20",
        f"eval: {{crop_ratio: {1.0 if small else 0.875}}}   # side of the centre crop over the shorter side",
        "run:",
        f"  dir: {_quoted(f'runs/{choice.name}/{run}')}",
        "  trackers: [tensorboard]   # also wandb, mlflow ...; [] for metrics.jsonl alone",
    ]
    return "\n".join(lines), "\n".join(training)


def _student(found: Found, choice: Choice, folder: Path) -> str:
    data, training = _shared(found, choice, "student")
    views = max(choice.epochs // 3, 1)
    data += f"\n  count: {views}   # views of each image that the cache keeps; a third of the epochs, as docs/cache.md advises"
    imagenet = len(found.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in found.classes)
    features_only = choice.published and not imagenet
    if choice.published:
        teacher = [
            "teacher:",
            "  mode: cached   # its features come from cache.path; online: a forward pass in every step",
            f"  model: {_quoted(choice.teacher)}",
            "  checkpoint: pretrained   # published weights, fetched once; or a file",
            f"  image_size: {choice.teacher_size}   # what they were trained at",
        ]
        if features_only:
            teacher.append(
                "  classifier: false   # it knows ImageNet's classes, not yours: it teaches by its features"
            )
    else:
        teacher = [
            "teacher:",
            "  mode: fill   # teaches online for the first views.count epochs and fills cache.path; then the cache teaches",
            f"  model: {_quoted(choice.teacher)}",
            f"  checkpoint: {_quoted(f'runs/{choice.name}/teacher/student.safetensors')}   # what teacher.yaml trains",
        ]
    loss = (
        "loss: {ce: 1, dcd: 1}   # kd needs a teacher that knows your classes: docs/choose.md"
        if features_only
        else "loss: {ce: 1, kd: 1, dcd: 1}   # docs/choose.md says which when"
    )
    return "\n".join(
        [
            f"# A student of {choice.name}, distilled. Every key: fastdcd/config.py. Next:",
            *(f"#   {command}" for command in commands(folder, choice)),
            "# Several GPUs: accelerate launch -m fastdcd train --config ...",
            data,
            "student:",
            f"  model: {_quoted(choice.student)}   # torchvision:NAME, timm:NAME, cifar:NAME or file.py:function",
            f"  image_size: {choice.size}",
            *teacher,
            f"cache: {{path: {_quoted(f'runs/{choice.name}/cache')}}}   # serves every student of this teacher and data",
            loss,
            training,
            "",
        ]
    )


def _teacher(found: Found, choice: Choice) -> str:
    data, training = _shared(found, choice, "teacher")
    start = (
        []
        if not choice.teacher.startswith(("timm:", "torchvision:"))
        else [
            "  # from published weights, fetched once, instead of from nothing:",
            "  # checkpoint: pretrained",
            "  # fresh_classifier: true",
        ]
    )
    return "\n".join(
        [
            f"# The teacher of {choice.name}: trained without one. Every key: fastdcd/config.py.",
            data,
            "student:",
            f"  model: {_quoted(choice.teacher)}",
            f"  image_size: {choice.size}",
            *start,
            training,
            "",
        ]
    )
