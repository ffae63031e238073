"""Where the teacher's knowledge of a batch comes from: nowhere, a forward pass, a cache, or both in turn.

The train loop asks for the `ModelOutput` of each batch and does not know which of these answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fastdcd import teacher as teachers
from fastdcd.cache.storable import check_storable, least_cosine
from fastdcd.cache.store import ENVIRONMENT, PIXELS, CacheMismatch, Manifest, TeacherCache, different_environment
from fastdcd.config import Config
from fastdcd.models import ModelOutput
from fastdcd.teacher import Teacher
from pipelines import views
from pipelines.augment import aligned, partners
from pipelines.base import Batch, Loader
from pipelines.files import Lock
from pipelines.plan import EpochPlan
from pipelines.prefetch import prefetch, to_device
from pipelines.views import ViewFamily

log = logging.getLogger("fastdcd")


class TeacherMode(Protocol):
    """Knowledge of the teacher, batch by batch."""

    images_seen: int
    """Images the teacher looked at in training, since this process began."""

    def begin(self, view: int) -> int | None:
        """Prepare an epoch that shows `view`. Returns the image size the teacher must see, or None if it looks at
        nothing."""
        ...

    def read_cached(self, ids: Tensor) -> Tensor | None:
        """Host-side part, ahead of the step: stored rows of samples `ids` int64 [n], or None."""
        ...

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        """Features [n, d] and logits [n, classes] float32 for a batch on the device, with its looked-up rows."""
        ...

    def flush(self) -> None:
        """Bring to disk what a checkpoint that follows relies on."""
        ...

    def end(self) -> None:
        """An epoch was completed."""
        ...

    def close(self) -> None: ...


class NoTeacher:
    """Training without a teacher."""

    images_seen = 0

    def begin(self, view: int) -> int | None:
        return None

    def read_cached(self, ids: Tensor) -> Tensor | None:
        return None

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        return None

    def flush(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class OnlineTeacher(NoTeacher):
    """A forward pass of the teacher at every step. Its images are the last rendering of the batch."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def begin(self, view: int) -> int | None:
        return self.teacher.size

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        self.images_seen += len(batch.ids)
        features = self.teacher.features(batch.at(self.teacher.size))
        return ModelOutput(features, self.teacher.logits(features))


class CachedTeacher(NoTeacher):
    """Features from the cache, logits recomputed from them by the teacher's own final layer."""

    def __init__(
        self,
        cache: TeacherCache,
        view_count: int,
        device: torch.device,
        where: str = "cpu",
        verify: bool = True,
    ) -> None:
        """`where` is cache.device of the config: cpu, cuda or auto; `verify` is cache.verify."""
        self.cache, self.view_count = cache, view_count
        self.checks = _Checks(cache) if verify else None
        self.decode = cache.manifest.codec.decode
        self.classifier = cache.classifier().to(device)
        self.view = 0
        self.device, self.on_device = device, _held_on_device(cache, device, where)
        self.rows: Tensor | None = None  # the whole view, if it is held on the device
        self._loads = ThreadPoolExecutor(1, "cache-load")
        self._coming: dict[int, Future[Tensor]] = {}  # the view after this one, while this one is trained with

    def begin(self, view: int) -> int | None:
        following = (view + 1) % self.view_count
        if self.checks:
            self.checks.wait(view)
            self.checks.start(following)
        if self.on_device:
            if self.rows is None or view != self.view:
                self.rows = None  # its memory is free before more is taken
                self.rows = self._load(view).result()
                self._coming.clear()
            if following != view and self.cache.complete(following):
                self._load(following)
        self.view = view
        return None

    def _load(self, view: int) -> Future[Tensor]:
        if view not in self._coming:
            self._coming[view] = self._loads.submit(self.cache.load, view, self.device)
        return self._coming[view]

    def read_cached(self, ids: Tensor) -> Tensor | None:
        if self.rows is not None:
            return self.rows[to_device(ids, self.device) if self.rows.is_cuda else ids]
        return self.cache.read(self.view, ids, pin=self.device.type == "cuda")

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        assert rows is not None
        features = self.decode(rows)
        return ModelOutput(features, self.classifier(features))


class _Checks:
    """Compares views with their checksums, each once, in a thread: all but the first while the epoch before trains.

    It also brings a view into the page cache in the order of the disk.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, "verify")
        self._damaged: dict[int, Future[list[range]]] = {}

    def start(self, view: int) -> None:
        """Begin with a view, if it is complete and was not checked yet."""
        if view not in self._damaged and self._cache.complete(view):
            self._damaged[view] = self._thread.submit(self._cache.verify, view)

    def wait(self, view: int) -> None:
        """Raises ValueError if a complete view is not as it was written."""
        self.start(view)
        if view in self._damaged and (damaged := self._damaged[view].result()):
            raise ValueError(
                f"{self._cache.path}: view {view}: {len(damaged)} blocks are not as they were written, the first of "
                f"rows {damaged[0].start}-{damaged[0].stop - 1}; mend them: tools/cache_teacher.py fill --repair"
            )


def _held_on_device(cache: TeacherCache, device: torch.device, where: str) -> bool:
    if where == "cuda" and device.type != "cuda":
        raise ValueError("cache.device: got cuda, but this run is on the CPU; set cache.device=auto")
    if where == "cpu" or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return where == "cuda" or 2 * cache.manifest.view_bytes < free / 4  # the next view comes while one is in use


class FillingTeacher(CachedTeacher):
    """Teaches online and writes what it computed while a view is new; later epochs read it."""

    def __init__(
        self,
        cache: TeacherCache,
        view_count: int,
        teacher: Teacher,
        accelerator: Accelerator,
        *,
        where: str,
        verify: bool,
        lock: Lock | None,
    ) -> None:
        """`lock` is the first process's right to write."""
        super().__init__(cache, view_count, accelerator.device, where=where, verify=verify)
        self.online = OnlineTeacher(teacher)
        self.first = accelerator.is_main_process  # one process lays out and completes the files
        self.wait = accelerator.wait_for_everyone
        self.reading = False
        self._lock = lock

    def begin(self, view: int) -> int | None:
        self.reading = self.cache.complete(view)
        if self.reading:
            return super().begin(view)
        self.view, self.rows = view, None
        if self.first:
            self.cache.start(self.view)
        self.wait()
        return self.online.begin(view)

    def read_cached(self, ids: Tensor) -> Tensor | None:
        return super().read_cached(ids) if self.reading else None

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        if self.reading:
            return super().outputs(batch, rows)
        self.images_seen += len(batch.ids)
        teacher_outputs = self.online.outputs(batch, rows)
        assert teacher_outputs is not None
        self.cache.write(self.view, batch.ids, teacher_outputs.features)
        return teacher_outputs

    def flush(self) -> None:
        """All processes' rows, before the first one's checkpoint says that their steps are done."""
        self.cache.flush()
        self.wait()

    def end(self) -> None:
        """Complete the view, unless a run that was killed left gaps in it: then its next epoch fills them."""
        if self.reading:
            return
        self.flush()
        if self.first and self.cache.done(self.view).all():
            self.cache.finish(self.view)
        self.wait()
        self.cache.release(self.view)

    def close(self) -> None:
        self.flush()
        if self._lock:
            self._lock.close()


# ---- choosing by config

Build = Callable[[Config, Loader, ViewFamily, Teacher, Accelerator], TeacherMode]


def _online(
    config: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    return OnlineTeacher(teacher)


def _cached(
    config: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    cache = open_cache(config, loader, family, teacher)
    return CachedTeacher(
        cache, config.view_count, accelerator.device, where=config.cache.device, verify=config.cache.verify
    )


def _fill(
    config: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    assert config.cache.path is not None
    manifest = expected_manifest(config, loader, family, teacher)
    check_range(config, loader, family, teacher)
    lock = None
    if accelerator.is_main_process:
        lock = TeacherCache.begin_filling(config.cache.path, manifest, teacher.classifier)
    accelerator.wait_for_everyone()
    cache = TeacherCache.open(config.cache.path)
    return FillingTeacher(
        cache,
        config.view_count,
        teacher,
        accelerator,
        where=config.cache.device,
        verify=config.cache.verify,
        lock=lock,
    )


MODES: dict[str, Build] = {"online": _online, "cached": _cached, "fill": _fill}


def open_mode(
    config: Config, loader: Loader, family: ViewFamily, teacher: Teacher | None, accelerator: Accelerator
) -> TeacherMode:
    """The teacher mode a config asks for, over the training set `loader`.

    Raises ValueError (CacheMismatch) if the cache is not of this teacher, dataset, views and backend.
    """
    if teacher is None:
        return NoTeacher()
    return MODES[config.teacher.mode](config, loader, family, teacher, accelerator)


# ---- is this cache of this teacher?


def expected_manifest(config: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> Manifest:
    """The manifest of the cache that this config would fill."""
    index = loader.index
    return Manifest(
        rows=len(index),
        dim=teacher.feature_dim,
        views=config.view_count,
        dtype=config.cache.dtype,
        fingerprint={
            **teachers.fingerprint(teacher),
            "data.index": index.digest,
            **({PIXELS: index.pixels_digest} if index.pixels_digest else {}),
            "views.seed": str(config.views.seed),
            **{f"views.{key}": str(value) for key, value in views.describe(family).items()},
            **{f"views.augment.{key}": value for key, value in config.views.augment.describe().items()},
            "views.table": views.table_digest(family, config.views.seed, index.sizes),
            **{f"loader.{key}": value for key, value in loader.fingerprint.items()},
            **_environment(config, loader, teacher),
        },
    )


def _environment(config: Config, loader: Loader, teacher: Teacher) -> dict[str, str]:
    """What decides features beside the config and the data; see Loader.environment."""
    found = dict(loader.environment)
    if config.teacher.precision == "fp32":
        on_gpu = next(teacher.parameters()).is_cuda
        found["tf32"] = "convolutions" if on_gpu and config.train.tf32 else "off"
    return {f"{ENVIRONMENT}{name}": value for name, value in found.items()}


def open_cache(config: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> TeacherCache:
    """Open the cache of a config, after checking its fingerprint and some rows against the live teacher.

    Raises CacheMismatch if either differs.
    """
    assert config.cache.path is not None
    cache = TeacherCache.open(config.cache.path)
    cache.check(
        expected_manifest(config, loader, family, teacher),
        allow=config.cache.allow_backend,
        allow_environment=config.cache.allow_environment,
    )
    missing = [view for view in range(config.view_count) if not cache.complete(view)]
    if missing:
        raise ValueError(
            f"{cache.path}: {len(missing)} of {config.view_count} views are not complete (first: {missing[0]}); "
            "go on filling them: python tools/cache_teacher.py fill"
        )
    if config.cache.check_rows:
        check_live(cache, config, loader, family, teacher)
    return cache


def check_live(cache: TeacherCache, config: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> float:
    """Recompute cache.check_rows rows of the last view with the live teacher; return the least cosine.

    Raises CacheMismatch if it is below what the stored dtype allows.
    """
    count = min(config.cache.check_rows, len(loader.index))
    ids, live = _look(config, loader, family, teacher, count)
    stored = cache.manifest.codec.decode(cache.read(config.view_count - 1, ids).to(live.device))
    cosine = least_cosine(live, stored)
    crossed = _crossed(cache.manifest.fingerprint, loader.backend, _environment(config, loader, teacher))
    if crossed:
        log.warning("cache filled %s: least cosine of %d rows %.4f", crossed, count, cosine)
    # another decoder's pixels are not the cached ones; the user allowed it and sees how far they agree
    floor = 0.9 if crossed else cache.manifest.codec.cosine
    if not cosine >= floor:
        raise CacheMismatch(
            f"{cache.path}: the live teacher's features differ from the stored ones (least cosine of {count} rows "
            f"{cosine:.4f}, expected at least {floor}); fill the cache again"
        )
    return cosine


def check_range(config: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> None:
    """Raises ValueError if cache.dtype cannot hold the teacher's features of some images. Nothing is written."""
    _, features = _look(config, loader, family, teacher, min(16, len(loader.index)))
    check_storable(features, config.cache.dtype)


def _look(
    config: Config, loader: Loader, family: ViewFamily, teacher: Teacher, count: int
) -> tuple[Tensor, Tensor]:
    """Ids int64 [n] of `count` samples drawn by hash, others for another run.seed, with the partners of mixed ones; and
    the live teacher's features of their last view [n, d]."""
    keys = views.hash_key(config.run.seed, np.arange(len(loader.index)), 0)
    ids = torch.from_numpy(np.sort(np.argsort(keys, kind="stable")[:count]))
    view, augment = config.view_count - 1, config.views.augment
    if augment.mixes:
        partner = partners(len(loader.index), config.views.seed, view)
        ids = torch.from_numpy(aligned(np.union1d(ids, partner[ids.numpy()]), partner))
    plan = EpochPlan(
        index=loader.index,
        family=family,
        view_seed=config.views.seed,
        view=view,
        order=ids.numpy(),
        batch_size=len(ids) + len(ids) % 2,
        augment=augment,
    )
    device = next(teacher.parameters()).device
    ((batch, _),) = prefetch(loader.epoch(plan.for_rank((teacher.size,))), lambda ids: None, device)
    return ids, teacher.features(batch.at(teacher.size))


def _crossed(stored: Mapping[str, str], backend: str, environment: Mapping[str, str]) -> str:
    """How a cache was filled otherwise than this run would, as far as that was allowed; "" if it was not."""
    if stored["loader.backend"] != backend:
        return f"through {stored['loader.backend']}, read with {backend}"
    different = different_environment(stored, environment)
    return ", ".join(f"with {name} {old}, read with {new}" for name, old, new in different)
