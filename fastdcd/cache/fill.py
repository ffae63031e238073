"""Filling a teacher cache: the work behind tools/cache_teacher.py fill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from fastdcd import experiment
from fastdcd.cache.match import check_range, expected_manifest
from fastdcd.cache.store import Manifest, TeacherCache
from fastdcd.config import Config
from fastdcd.progress import ProgressBar
from fastdcd.teacher import Teacher
from pipelines.augment import ViewAugment, aligned, partners
from pipelines.base import Loader
from pipelines.plan import Crops, RankPlan
from pipelines.prefetch import prefetch
from pipelines.views import ViewFamily

# A fill that is killed loses at most the rows of this many seconds.
FLUSH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a fill works with."""

    cfg: Config
    accelerator: Accelerator
    loader: Loader
    family: ViewFamily
    teacher: Teacher

    @property
    def manifest(self) -> Manifest:
        return expected_manifest(self.cfg, self.loader, self.family, self.teacher)


def open_parts(cfg: Config) -> Parts:
    """Open the training set and the teacher of a config.

    Raises ValueError if it names no teacher or cache, or any of them cannot be opened.
    """
    if cfg.teacher.mode == "none" or cfg.cache.path is None:
        raise ValueError("teacher.mode and cache.path must be set to fill a cache; set both in the config")
    accelerator = experiment.make_accelerator(cfg)
    with accelerator.main_process_first():
        loader = experiment.open_set(cfg.data, cfg.data.train, accelerator.device, "data.train", repeatable=True)
    # always chunks of the whole batch size, whatever the number of processes: the bytes stay the same
    teacher = experiment.build_teacher(cfg, len(loader.index.classes), accelerator, processes=1)
    assert teacher is not None
    family = experiment.view_family(cfg)
    return Parts(cfg=cfg, accelerator=accelerator, loader=loader, family=family, teacher=teacher)


def fill(parts: Parts, *, repair: bool = False) -> None:
    """Write what is missing of all views. May be killed and started again at any time, on any number of
    processes. With `repair`, rows whose checksum is wrong are written again first.

    Raises ValueError if the folder holds another cache, is being filled by others, or the disk is too small, and if
    cache.dtype cannot hold the teacher's features.
    """
    cfg, accelerator, manifest = parts.cfg, parts.accelerator, parts.manifest
    assert cfg.cache.path is not None
    check_range(cfg, parts.loader, parts.family, parts.teacher)
    lock: AbstractContextManager[object] = nullcontext()
    if accelerator.is_main_process:
        lock = TeacherCache.begin_filling(cfg.cache.path, manifest, parts.teacher.classifier)
    with lock:
        accelerator.wait_for_everyone()
        _fill_missing(parts, TeacherCache.open(cfg.cache.path), repair=repair)


def _fill_missing(parts: Parts, cache: TeacherCache, *, repair: bool) -> None:
    cfg, accelerator, manifest = parts.cfg, parts.accelerator, cache.manifest
    if repair and accelerator.is_main_process:
        _reopen_damaged(parts, cache)
    accelerator.wait_for_everyone()
    missing = [view for view in range(manifest.views) if not cache.view(view).complete()]
    # in each view an image is mixed with another one: no view could use what was decoded for the last
    together = 1 if cfg.views.augment.mixes else cfg.cache.views_a_pass
    bar = ProgressBar(
        f"fill ({manifest.views - len(missing)} of {manifest.views} views were complete)",
        len(missing) * manifest.rows,
        "rows",
        shown=accelerator.is_main_process,
    )
    for first in range(0, len(missing), together):
        _fill_views(parts, cache, missing[first : first + together], bar)
    bar.close()


def _reopen_damaged(parts: Parts, cache: TeacherCache) -> None:
    """Make a fill write again what is damaged."""
    cache.write_classifier(parts.teacher.classifier)  # as good as what is there, if that is whole
    for number in range(cache.manifest.views):
        view = cache.view(number)
        if view.complete() and (damaged := view.verify()):
            rows = sum(map(len, damaged))
            parts.accelerator.print(
                f"view {number}: {rows} rows in {len(damaged)} damaged blocks are written again"
            )
            view.reopen(damaged)


def _fill_views(parts: Parts, cache: TeacherCache, views: Sequence[int], bar: ProgressBar) -> None:
    """Fill some views in one pass over the images: each is decoded once and rendered once a view."""
    accelerator, teacher, rows = parts.accelerator, parts.teacher, cache.manifest.rows
    if accelerator.is_main_process:
        for view in views:
            cache.view(view).start()
    accelerator.wait_for_everyone()
    section, order = parts.cfg.views, np.arange(rows)
    seed, augment = section.seed, section.augment
    if augment.mixes:
        (view,) = views
        order = aligned(order, partners(rows, seed, view))
    done = np.logical_and.reduce([cache.view(view).done() for view in views])
    ids = order[_mine(done[order], teacher.rows, accelerator)]
    sizes = parts.loader.index.sizes[ids]
    rank_plan = RankPlan(
        ids=ids,
        crops=tuple(
            Crops(
                boxes=boxes,
                flips=flips,
                size=teacher.size,
                augment=ViewAugment(settings=augment, seed=seed, view=view) if augment.active else None,
            )
            for view in views
            for boxes, flips in [parts.family.boxes(seed, ids, view, sizes)]
        ),
        batch_size=teacher.rows,
        batches=-(-len(ids) // teacher.rows),
    )
    bar.update(len(views) * (rows - len(ids) * accelerator.num_processes))
    flushed = time.monotonic()
    for batch, _ in prefetch(parts.loader.epoch(rank_plan), lambda ids: None, accelerator.device):
        for view, images in zip(views, batch.images, strict=True):
            cache.view(view).write(batch.ids, teacher.features(images))
        bar.update(len(views) * len(batch.ids) * accelerator.num_processes)
        if time.monotonic() - flushed > FLUSH_SECONDS:
            cache.flush()
            flushed = time.monotonic()
    cache.flush()
    for view in views:
        cache.view(view).release()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for view in views:
            cache.view(view).finish()
    accelerator.wait_for_everyone()


def _mine(done: NDArray[np.bool_], chunk: int, accelerator: Accelerator) -> NDArray[np.int64]:
    """Places of this process's chunks that have rows to do. Chunks are always whole: the same passes, the same bits."""
    starts = [start for start in range(0, len(done), chunk) if not done[start : start + chunk].all()]
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    pieces = [np.arange(start, min(start + chunk, len(done))) for start in mine]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
