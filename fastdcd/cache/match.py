"""Is this cache of this teacher, data set and machine? By its manifest, and by asking the live teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastdcd import teacher as teachers
from fastdcd.cache.manifest import ENVIRONMENT, PIXELS, CacheMismatch, Manifest, different_environment
from fastdcd.cache.storable import check_storable, least_cosine
from fastdcd.cache.store import TeacherCache
from fastdcd.config import Config
from fastdcd.teacher import Teacher
from pipelines import views
from pipelines.augment import aligned, partners
from pipelines.base import Loader
from pipelines.plan import EpochPlan
from pipelines.prefetch import prefetch
from pipelines.views import ViewFamily

log = logging.getLogger("fastdcd")


def expected_manifest(cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> Manifest:
    """The manifest of the cache that this config would fill."""
    index = loader.index
    return Manifest(
        rows=len(index),
        dim=teacher.feature_dim,
        views=cfg.view_count,
        dtype=cfg.cache.dtype,
        fingerprint={
            **teachers.fingerprint(teacher),
            "data.index": index.digest,
            **({PIXELS: index.pixels_digest} if index.pixels_digest else {}),
            "views.seed": str(cfg.views.seed),
            **{f"views.{key}": str(value) for key, value in views.describe(family).items()},
            **{f"views.augment.{key}": value for key, value in cfg.views.augment.describe().items()},
            "views.table": views.table_digest(family, cfg.views.seed, index.sizes),
            **{f"loader.{key}": value for key, value in loader.fingerprint.items()},
            **_environment(cfg, loader, teacher),
        },
    )


def _environment(cfg: Config, loader: Loader, teacher: Teacher) -> dict[str, str]:
    """What decides features beside the config and the data; see Loader.environment."""
    found = dict(loader.environment)
    if cfg.teacher.precision == "fp32":
        on_gpu = next(teacher.parameters()).is_cuda
        found["tf32"] = "convolutions" if on_gpu and cfg.train.tf32 else "off"
    return {f"{ENVIRONMENT}{name}": value for name, value in found.items()}


def open_cache(cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> TeacherCache:
    """Open the cache of a config, after checking its fingerprint and some rows against the live teacher.

    Raises CacheMismatch if either differs.
    """
    assert cfg.cache.path is not None
    cache = TeacherCache.open(cfg.cache.path)
    cache.check(
        expected_manifest(cfg, loader, family, teacher),
        allow=cfg.cache.allow_backend,
        allow_environment=cfg.cache.allow_environment,
    )
    missing = [view for view in range(cfg.view_count) if not cache.view(view).complete()]
    if missing:
        raise ValueError(
            f"{cache.path}: {len(missing)} of {cfg.view_count} views are not complete (first: {missing[0]}); "
            "continue the fill: python tools/cache_teacher.py fill"
        )
    if cfg.cache.check_rows:
        check_live(cache, cfg, loader, family, teacher)
    return cache


def check_live(cache: TeacherCache, cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> float:
    """Recompute cache.check_rows rows of the last view with the live teacher; return the least cosine.

    Raises CacheMismatch if it is below what the stored dtype allows.
    """
    count = min(cfg.cache.check_rows, len(loader.index))
    ids, live = _look(cfg, loader, family, teacher, count)
    stored = cache.manifest.codec.decode(cache.view(cfg.view_count - 1).read(ids).to(live.device))
    cosine = least_cosine(live, stored)
    crossed = _crossed(cache.manifest.fingerprint, loader.backend, _environment(cfg, loader, teacher))
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


def check_range(cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher) -> None:
    """Raises ValueError if cache.dtype cannot hold the teacher's features of some images. Nothing is written."""
    _, features = _look(cfg, loader, family, teacher, min(16, len(loader.index)))
    check_storable(features, cfg.cache.dtype)


def _look(cfg: Config, loader: Loader, family: ViewFamily, teacher: Teacher, count: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [n] of `count` samples drawn by hash, others for another run.seed, with the partners of mixed ones; and
    the live teacher's features of their last view [n, d]."""
    keys = views.hash_key(cfg.run.seed, np.arange(len(loader.index)), 0)
    ids = torch.from_numpy(np.sort(np.argsort(keys, kind="stable")[:count]))
    view, augment = cfg.view_count - 1, cfg.views.augment
    if augment.mixes:
        partner = partners(len(loader.index), cfg.views.seed, view)
        ids = torch.from_numpy(aligned(np.union1d(ids, partner[ids.numpy()]), partner))
    plan = EpochPlan(
        index=loader.index,
        family=family,
        view_seed=cfg.views.seed,
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
