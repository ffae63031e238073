"""What a loader's time goes to. It shows its work through its contract alone, so any backend can be asked.

The same samples are asked for three times: as planned; as two crops of one pixel, the boxes' corners, which are read
and decoded as before (loaders decode only what is shown) but leave nothing to resize; and as bytes, by as many threads
as the loader has workers. What one has over the next is the cost of augmenting, and of decoding.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdcd import experiment
from fastdcd.config import Config
from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.formats.stored import StoredSamples, open_stored
from pipelines.image_folder import read_classes
from pipelines.index import DatasetIndex
from pipelines.plan import Crops, EpochPlan, RankPlan

LEAST, ROUNDS = 4, 3  # batches of a measurement, measurements of each kind
CONVERTED, CONVERTED_SIZE = 128, 256  # images of a trial conversion; their longest side, pixels
# pipelines.conversion.job.sample_to_beton. The program brings it: nothing in this package converts.
TrialConversion = Callable[..., DatasetIndex]


def seconds_an_image(
    loader: Loader, rank_plan: RankPlan, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Steady time of an image through the whole loader, all workers at work; NaN if there is one batch only.

    The first batch is not counted: it is made while nothing else is. By time.process_time it is the processor's time,
    of all threads.
    """
    epoch = loader.epoch(rank_plan)
    images = 0
    try:
        next(epoch)
        begin, begun = time.perf_counter(), clock()
        for number, batch in enumerate(epoch, 1):
            images += len(batch.ids)
            if number >= LEAST and time.perf_counter() - begin > seconds:
                break
        elapsed = clock() - begun
    finally:
        epoch.close()
    return elapsed / images if images else math.nan


def without_augmenting(rank_plan: RankPlan, sizes: NDArray[np.int32]) -> RankPlan:
    """The same samples; of all their boxes together, the first pixel and the last one.

    Args:
        sizes: int32 [N, 2], height and width of every stored image.
    """
    boxes, limits = np.stack([each.boxes for each in rank_plan.crops]), sizes[rank_plan.ids] - 1
    first = boxes[..., :2].min(0).clip(0, limits)
    last = (boxes[..., :2] + boxes[..., 2:] - 1).max(0).clip(first, limits)
    flips = np.zeros(len(rank_plan.ids), np.bool_)
    crops = (
        Crops(boxes=np.concatenate([corner, np.ones_like(corner)], 1).astype(np.int32), flips=flips, size=1)
        for corner in (first, last)
    )
    return replace(rank_plan, crops=tuple(crops))


def stages(loader: Loader, rank_plan: RankPlan, cfg: Config, seconds: float) -> dict[str, float]:
    """Seconds an image: loader (all of it), and read, decode, augment as far as the backend has them."""
    stored = open_stored(cfg.data.train, loader.index)
    bare, threads = without_augmenting(rank_plan, loader.index.sizes), max(cfg.data.workers, 1)
    wholes, decodes, reads = [], [], []
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all
        wholes.append(seconds_an_image(loader, rank_plan, seconds / ROUNDS))
        if stored is not None:
            decodes.append(seconds_an_image(loader, bare, seconds / ROUNDS))
            reads.append(read_seconds(stored, rank_plan.ids, threads, seconds / ROUNDS / 2))
    if stored is not None:
        stored.close()
    whole = float(np.median(wholes))
    if math.isnan(whole):
        return {}
    if stored is None:  # nothing is stored apart from the pixels themselves
        return {"loader": whole, "augment": whole}
    read = min(float(np.median(reads)), whole)
    decoded = min(max(float(np.median(decodes)), read), whole)
    return {"loader": whole, "read": read, "decode": decoded - read, "augment": whole - decoded}


def converted_seconds(
    cfg: Config, sizes: tuple[int, ...], seconds: float, convert: TrialConversion
) -> float | None:
    """`seconds_an_image` of FFCV with the images converted to CONVERTED_SIZE, found with a few of them in a
    temporary folder; None if FFCV is missing."""
    section = cfg.data
    family = experiment.view_family(cfg)
    classes = read_classes(section.classes) if section.classes else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.beton"
        try:
            index = convert(
                section.train, classes, file, images=CONVERTED, max_size=CONVERTED_SIZE, workers=section.workers
            )
            loader = open_loader("ffcv", file, LoaderOptions(workers=section.workers))
        except (ImportError, ValueError):
            return None
        with loader:
            rows = min(section.batch_size, len(index))
            order = np.resize(np.arange(len(index)), 2 * LEAST * rows)
            plan = EpochPlan(
                index=index, family=family, view_seed=cfg.views.seed, view=0, order=order, batch_size=rows
            )
            seconds_an_image(loader, plan.for_rank(sizes), 0.0)  # compiles
            return seconds_an_image(loader, plan.for_rank(sizes), seconds)


def read_seconds(stored: StoredSamples, ids: np.ndarray, threads: int, seconds: float) -> float:
    """Time of an image's bytes, read by so many threads in the order of `ids`."""

    def reader(sample: int) -> int:
        return len(stored.read(sample).tobytes())

    images, begin = 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while images < len(ids) and (images == 0 or time.perf_counter() - begin < seconds):
            part = ids[images : images + 16 * threads].tolist()
            list(pool.map(reader, part))
            images += len(part)
    return (time.perf_counter() - begin) / images


def cold_read_seconds(path: Path, index: DatasetIndex, ids: np.ndarray, threads: int) -> float | None:
    """The same after the system was asked to forget the files (a hint: it may keep what others use)."""
    stored = open_stored(path, index)
    if stored is None or not hasattr(os, "posix_fadvise"):
        return None
    with closing(stored):
        for name in {stored.file(int(sample)) for sample in ids}:
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        return read_seconds(stored, ids, threads, 1.0)
