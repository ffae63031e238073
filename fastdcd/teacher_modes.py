"""Where the teacher's knowledge of a batch comes from: nowhere, a forward pass, a cache, or both in turn.

The train loop asks for the `ModelOutput` of each batch and does not know which of these answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdcd.cache.match import check_range, expected_manifest, open_cache
from fastdcd.cache.store import TeacherCache
from fastdcd.config import Config
from fastdcd.models import ModelOutput
from fastdcd.teacher import Teacher
from pipelines.base import Batch, Loader
from pipelines.files import Lock
from pipelines.prefetch import to_device
from pipelines.views import ViewFamily

log = logging.getLogger("fastdcd")


class TeacherMode(Protocol):
    """Knowledge of the teacher, batch by batch."""

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

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput:
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
        self.view = cache.view(0)
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
            if self.rows is None or view != self.view.number:
                self.unload()  # its memory is free before more is taken
                self.rows = self._load(view).result()
                self._coming.clear()
            if following != view and self.cache.view(following).complete():
                self._load(following)
        self.view = self.cache.view(view)
        return None

    def unload(self) -> None:
        """Free the memory of the view that is held on the device."""
        self.rows = None

    def _load(self, view: int) -> Future[Tensor]:
        if view not in self._coming:
            self._coming[view] = self._loads.submit(self.cache.view(view).load, self.device)
        return self._coming[view]

    def read_cached(self, ids: Tensor) -> Tensor | None:
        if self.rows is not None:
            return self.rows[to_device(ids, self.device) if self.rows.is_cuda else ids]
        return self.view.read(ids, pin=self.device.type == "cuda")

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        assert rows is not None
        features = self.decode(rows)
        return ModelOutput(features, self.classifier(features))

    def close(self) -> None:
        self._loads.shutdown(cancel_futures=True)
        if self.checks:
            self.checks.close()


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
        if view not in self._damaged and self._cache.view(view).complete():
            self._damaged[view] = self._thread.submit(self._cache.view(view).verify)

    def wait(self, view: int) -> None:
        """Raises ValueError if a complete view is not as it was written."""
        self.start(view)
        if view in self._damaged and (damaged := self._damaged[view].result()):
            raise ValueError(
                f"{self._cache.path}: view {view}: {len(damaged)} blocks fail their checksum, the first of "
                f"rows {damaged[0].start}-{damaged[0].stop - 1}; mend them: tools/cache_teacher.py fill --repair"
            )

    def close(self) -> None:
        """End the thread; a check that runs is waited for."""
        self._thread.shutdown(cancel_futures=True)


def _held_on_device(cache: TeacherCache, device: torch.device, where: str) -> bool:
    if where == "cuda" and device.type != "cuda":
        raise ValueError("cache.device: got cuda, but this run is on the CPU; set cache.device=auto")
    if where == "cpu" or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return where == "cuda" or 2 * cache.manifest.view_bytes < free / 4  # the next view comes while one is in use


class StoringTeacher(OnlineTeacher):
    """Teaches online and stores what it computed in the view that the epoch shows."""

    def __init__(self, teacher: Teacher, cache: TeacherCache, accelerator: Accelerator) -> None:
        super().__init__(teacher)
        self.cache, self.view = cache, cache.view(0)
        self.first = accelerator.is_main_process  # one process lays out and completes the files
        self.wait = accelerator.wait_for_everyone

    def begin(self, view: int) -> int | None:
        self.view = self.cache.view(view)
        if self.first:
            self.view.start()
        self.wait()
        return super().begin(view)

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput:
        teacher_outputs = super().outputs(batch, rows)
        self.view.write(batch.ids, teacher_outputs.features)
        return teacher_outputs

    def flush(self) -> None:
        """All processes' rows, before the first one's checkpoint says that their steps are done."""
        self.cache.flush()
        self.wait()

    def end(self) -> None:
        """Complete the view, unless a run that was killed left gaps in it: then its next epoch fills them."""
        self.flush()
        if self.first and self.view.done().all():
            self.view.finish()
        self.wait()
        self.view.release()


class FillingTeacher:
    """Teaches online and stores what it computed while a view is new; later epochs read it."""

    def __init__(self, online: StoringTeacher, cached: CachedTeacher, lock: Lock | None) -> None:
        """Both modes are of one cache; `lock` is the first process's right to write."""
        self.online, self.cached, self._lock = online, cached, lock
        self.current: StoringTeacher | CachedTeacher = online

    def begin(self, view: int) -> int | None:
        if self.cached.cache.view(view).complete():
            self.current = self.cached
        else:
            self.cached.unload()
            self.current = self.online
        return self.current.begin(view)

    def read_cached(self, ids: Tensor) -> Tensor | None:
        return self.current.read_cached(ids)

    def outputs(self, batch: Batch, rows: Tensor | None) -> ModelOutput | None:
        return self.current.outputs(batch, rows)

    def flush(self) -> None:
        self.online.flush()

    def end(self) -> None:
        self.current.end()

    def close(self) -> None:
        self.flush()
        self.cached.close()
        if self._lock:
            self._lock.close()


# ---- choosing by config

Build = Callable[[Config, Loader, ViewFamily, Teacher, Accelerator], TeacherMode]


def _online(
    cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    return OnlineTeacher(teacher)


def _cached(
    cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    cache = open_cache(cfg, loader, family, teacher)
    return CachedTeacher(
        cache, cfg.view_count, accelerator.device, where=cfg.cache.device, verify=cfg.cache.verify
    )


def _fill(
    cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher, accelerator: Accelerator
) -> TeacherMode:
    assert cfg.cache.path is not None
    manifest = expected_manifest(cfg, loader, family, teacher)
    check_range(cfg, loader, family, teacher)
    lock = None
    if accelerator.is_main_process:
        lock = TeacherCache.begin_filling(cfg.cache.path, manifest, teacher.classifier)
    accelerator.wait_for_everyone()
    cache = TeacherCache.open(cfg.cache.path)
    cached = CachedTeacher(
        cache, cfg.view_count, accelerator.device, where=cfg.cache.device, verify=cfg.cache.verify
    )
    return FillingTeacher(StoringTeacher(teacher, cache, accelerator), cached, lock)


MODES: dict[str, Build] = {"online": _online, "cached": _cached, "fill": _fill}


def open_mode(
    cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher | None, accelerator: Accelerator
) -> TeacherMode:
    """The teacher mode a config asks for, over the training set `loader`.

    Raises ValueError (CacheMismatch) if the cache is not of this teacher, dataset, views and backend.
    """
    if teacher is None:
        return NoTeacher()
    return MODES[cfg.teacher.mode](cfg, loader, family, teacher, accelerator)
