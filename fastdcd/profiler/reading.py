"""What a loader's time goes to. It shows its work through its contract alone, so any backend can be asked.

The same samples are asked for three times: as planned; as crops of one pixel, which are read and decoded as
before but leave nothing to resize; and as bytes, by as many threads as the loader has workers. What one has
over the next is the cost of augmenting, and of decoding.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdcd import experiment
from fastdcd.config import Config
from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton
from pipelines.conversion.sources import open_sources
from pipelines.files import path_of, read_file
from pipelines.image_folder import read_classes
from pipelines.index import DatasetIndex
from pipelines.plan import Crops, EpochPlan, RankPlan

LEAST, ROUNDS = 4, 3  # batches of a measurement, measurements of each kind
CONVERTED, CONVERTED_SIZE = 128, 256  # images of a trial conversion; their longest side, pixels
ReadSample = Callable[[int], int]  # sample id -> bytes read


def seconds_an_image(loader: Loader, rank_plan: RankPlan, seconds: float) -> float:
    """Steady time of an image through the whole loader, all workers at work; NaN if there is one batch only.

    The first batch is not counted: it is made while nothing else is.
    """
    epoch = loader.epoch(rank_plan)
    images = 0
    try:
        next(epoch)
        begin = time.perf_counter()
        for number, batch in enumerate(epoch, 1):
            images += len(batch.ids)
            if number >= LEAST and time.perf_counter() - begin > seconds:
                break
        elapsed = time.perf_counter() - begin
    finally:
        epoch.close()
    return elapsed / images if images else math.nan


def without_augmenting(rank_plan: RankPlan) -> RankPlan:
    """The same samples as crops of one pixel."""
    boxes = np.tile(np.array([0, 0, 1, 1], np.int32), (len(rank_plan.ids), 1))
    crop = Crops(boxes=boxes, flips=np.zeros(len(rank_plan.ids), np.bool_), size=1)
    return replace(rank_plan, crops=(crop,))


def stages(loader: Loader, rank_plan: RankPlan, config: Config, seconds: float) -> dict[str, float]:
    """Seconds an image: loader (all of it), and read, decode, augment as far as the backend has them."""
    reader = reader_of(config.data.train, loader.index)
    bare, threads = without_augmenting(rank_plan), max(config.data.workers, 1)
    wholes, decodes, reads = [], [], []
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all
        wholes.append(seconds_an_image(loader, rank_plan, seconds / ROUNDS))
        if reader is not None:
            decodes.append(seconds_an_image(loader, bare, seconds / ROUNDS))
            reads.append(read_seconds(reader, rank_plan.ids, threads, seconds / ROUNDS / 2))
    whole = float(np.median(wholes))
    if math.isnan(whole):
        return {}
    if reader is None:  # nothing is stored apart from the pixels themselves
        return {"loader": whole, "augment": whole}
    read = min(float(np.median(reads)), whole)
    decoded = min(max(float(np.median(decodes)), read), whole)
    return {"loader": whole, "read": read, "decode": decoded - read, "augment": whole - decoded}


def converted_seconds(config: Config, sizes: tuple[int, ...], seconds: float) -> float | None:
    """`seconds_an_image` of FFCV with the images converted to CONVERTED_SIZE, found with a few of them in a
    temporary folder; None if FFCV is missing."""
    section = config.data
    family = experiment.view_family(config)
    classes = read_classes(section.classes) if section.classes else None
    sources = open_sources(section.train, classes).limit(CONVERTED)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.beton"
        job = Job(sources=sources, out=file, workers=section.workers)
        try:
            index = to_beton(job, Storage(max_size=CONVERTED_SIZE))
            loader = open_loader("ffcv", file, LoaderOptions(workers=section.workers))
        except (ImportError, ValueError):
            return None
        assert index is not None
        with loader:
            rows = min(section.batch_size, len(index))
            order = np.resize(np.arange(len(index)), 2 * LEAST * rows)
            plan = EpochPlan(
                index=index, family=family, view_seed=config.views.seed, view=0, order=order, batch_size=rows
            )
            seconds_an_image(loader, plan.for_rank(sizes), 0.0)  # compiles
            return seconds_an_image(loader, plan.for_rank(sizes), seconds)


def read_seconds(reader: ReadSample, ids: np.ndarray, threads: int, seconds: float) -> float:
    """Time of an image's bytes, read by so many threads in the order of `ids`."""
    images, begin = 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while images < len(ids) and (images == 0 or time.perf_counter() - begin < seconds):
            part = ids[images : images + 16 * threads].tolist()
            list(pool.map(reader, part))
            images += len(part)
    return (time.perf_counter() - begin) / images


def cold_read_seconds(path: Path, index: DatasetIndex, ids: np.ndarray, threads: int) -> float | None:
    """The same after the system was asked to forget the files (a hint: it may keep what others use)."""
    reader = reader_of(path, index)
    if reader is None or not hasattr(os, "posix_fadvise"):
        return None
    for name in {_file_of(path, index, int(sample)) for sample in ids}:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return read_seconds(reader, ids, threads, 1.0)


def reader_of(path: Path, index: DatasetIndex) -> ReadSample | None:
    """Reads a sample's stored bytes; None if they do not lie in files one can tell apart."""
    if not len(index):
        return None
    if index.offsets is None:
        if path.is_dir() and (path / index.names[0]).is_file():
            return lambda sample: len(read_file(path_of(path, index.names[sample])))
        return None
    lengths = index.lengths
    if lengths is None:
        return None
    offsets = index.offsets
    starts, files = _containers(path)

    def read(sample: int) -> int:
        offset = int(offsets[sample])
        number = int(np.searchsorted(starts, offset, "right")) - 1
        with files[number].open("rb") as file:
            file.seek(offset - int(starts[number]))
            return len(file.read(int(lengths[sample])))

    return read if files else None


def _file_of(path: Path, index: DatasetIndex, sample: int) -> Path:
    if index.offsets is None:
        return path / index.names[sample]
    starts, files = _containers(path)
    return files[int(np.searchsorted(starts, int(index.offsets[sample]), "right")) - 1]


def _containers(path: Path) -> tuple[np.ndarray, list[Path]]:
    """Files that offsets count through: one, or the shards of a folder one after the other."""
    files = sorted(path.glob("shard-*.tar")) if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files]
    return np.cumsum([0, *sizes[:-1]]), files
