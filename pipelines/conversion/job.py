"""Conversions: sources in, a dataset for a loader backend out. Resumable, in several processes, in order.

Worker processes read, decode and encode; this one writes what they hand over, in the order of the source, a
part at a time. So equal sources and settings give equal bytes, whatever the number of workers and
however often the conversion was killed. Memory holds some parts, never the dataset.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.conversion import beton_writer, resident_writer, shard_writer
from pipelines.conversion.encode import Source, Storage
from pipelines.conversion.journal import MANIFEST, Reject, finished, other_settings, write_manifest, write_rejects
from pipelines.conversion.sources import Sources, open_sources
from pipelines.files import Lock, explain_full_disk, human_bytes, write_json
from pipelines.formats import beton, shards
from pipelines.formats.checked import read_object
from pipelines.index import DatasetIndex

PART = 64  # sources between two marks in a journal: what a kill can cost
SHARD = 1000  # sources a tar
_LOCK = ".convert"  # a file of this name, and of each part's number, while an output is written
_CHUNK = 8  # sources a worker takes at a time
_SAMPLE = 32  # sources that an estimate encodes
PATIENCE = 600.0  # seconds without a result from any worker, after which storage hangs

R = TypeVar("R")
Encode = Callable[[Source, int], R]  # (source, position) -> record; ValueError if it cannot be decoded


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `of`, counted from 0: --shard."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(
                f"--shard: got {self.number}/{self.of}, expected 0/{self.of} to {self.of - 1}/{self.of}"
            )

    def range(self, count: int) -> range:
        """This part's share of `count` things."""
        return range(count * self.number // self.of, count * (self.number + 1) // self.of)


WHOLE = Part(number=0, of=1)


class _Encoder(Dataset[list[Any]], Generic[R]):
    def __init__(self, sources: Sources, encode: Encode[R]) -> None:
        self._sources, self._encode = sources, encode

    def one(self, position: int) -> R | Reject:
        name = self._sources.names[position]
        try:
            return self._encode(self._sources[position], position)
        except ValueError as error:
            return Reject(position=position, name=name, reason=str(error))

    def __getitem__(self, positions: range) -> list[R | Reject | OSError]:
        outcomes: list[R | Reject | OSError] = []
        for position in positions:
            try:
                outcomes.append(self.one(position))
            except OSError as error:  # storage fails: no property of the sample; end the conversion, resumable
                outcomes.append(OSError(error.errno, f"{self._sources.names[position]}: {error.strerror}"))
        return outcomes


def encoded(
    sources: Sources, encode: Encode[R], ranges: Sequence[range], workers: int
) -> Generator[R | Reject, None, None]:
    """Encode the sources of `ranges` in order, in `workers` processes (0: in this one).

    torch's DataLoader is the pool: it keeps the order and holds back workers that are too far ahead.

    Raises OSError if a source cannot be read, RuntimeError if a worker is lost, or gives nothing for PATIENCE seconds.
    """
    chunks = [each[start : start + _CHUNK] for each in ranges for start in range(0, len(each), _CHUNK)]
    loader = DataLoader(
        _Encoder(sources, encode),
        batch_size=None,
        sampler=chunks,
        collate_fn=_unchanged,
        num_workers=min(workers, len(chunks)),
        prefetch_factor=4 if workers and chunks else None,
        worker_init_fn=functools.partial(_die_with_parent, os.getpid()),
        timeout=PATIENCE if workers and chunks else 0,
    )
    for outcomes in loader:
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
            yield outcome


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent(parent: int, worker: int) -> None:
    """A worker whose parent was killed would wait forever for somebody to read its results."""
    with suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before that
        os._exit(1)


def _unchanged(outcomes: list[Any]) -> list[Any]:
    return outcomes


def estimate(sources: Sources, encode: Encode[R], size: Callable[[R], int]) -> int:
    """Bytes that the whole will take, from samples spread over it."""
    sample = sources.limit(_SAMPLE)
    encoder = _Encoder(sample, encode)
    outcomes = [encoder.one(position) for position in range(len(sample))]
    sizes = [size(outcome) for outcome in outcomes if not isinstance(outcome, Reject)]
    return round(sum(sizes) / len(outcomes) * len(sources))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all conversions have in common.

    Attributes:
        sources: what to convert.
        out: the file or folder to make.
        workers: processes.
        part: the share of the sources to convert.
        say: where the estimate and notes go, a line at a time.
        empty_classes: keep a class that loses all of its images as a label without any; else that is an error.
    """

    sources: Sources
    out: Path
    workers: int = 2
    part: Part = WHOLE
    say: Callable[[str], None] = lambda line: None
    empty_classes: bool = False

    def check_classes(self, rejects: Iterable[Reject]) -> None:
        """Raises ValueError if a class has lost all of its images, and that is not what the user wants."""
        labels = self.sources.labels
        bad = list(rejects)
        had = np.bincount(labels, minlength=len(self.sources.classes))
        left = had - np.bincount(labels[[each.position for each in bad]], minlength=len(had))
        gone = np.flatnonzero((had > 0) & (left == 0)).tolist()
        if not gone or self.empty_classes or not left.any():  # not one image: the writer says so
            return
        first = next(each for each in bad if labels[each.position] == gone[0])
        raise ValueError(
            f"{self.out}: class {self.sources.classes[gone[0]]!r} ({len(gone)} in all) keeps no image: all "
            f"{had[gone[0]]} are rejected, the first, {first.name}: {first.reason}. Decide: --empty-classes keeps its "
            f"label without images; or repair them, remove {self.out} and convert again"
        )

    def announce(self, bytes_: int) -> None:
        """Tell the estimated size, and when it will not fit."""
        folder = next(each for each in (self.out, *self.out.parents) if each.is_dir())
        free = shutil.disk_usage(folder).free
        note = "" if bytes_ < free else ": TOO LITTLE, unless the sample misleads"
        self.say(
            f"{self.out}: {len(self.sources):,} images, about {human_bytes(bytes_)} (from {min(_SAMPLE, len(self.sources))} "
            f"of them); {human_bytes(free)} free{note}"
        )

    def own(self) -> Job:
        """The job for this part's sources alone, as a dataset of its own."""
        positions = np.array(self.part.range(len(self.sources)), np.int64)
        if not len(positions):
            raise ValueError(f"--shard {self.part.number}/{self.part.of}: no samples in it; use fewer parts")
        return replace(self, sources=self.sources.select(positions), part=WHOLE)


class _Writer(Protocol[R]):  # type: ignore[misc]
    sources: int

    def append(self, records: Sequence[R], sources: int, rejects: Sequence[Reject] = ()) -> None: ...
    def rejects(self) -> Iterable[Reject]: ...
    def finish(self, classes: Sequence[str]) -> DatasetIndex: ...
    def close(self) -> None: ...


def to_beton(job: Job, storage: Storage) -> DatasetIndex:
    """Convert to a .beton. Killed at any moment, it continues where it stopped when started again.

    Raises:
        ValueError: something else is there, or not one sample can be stored.
        OSError: storage fails or is full; what is done stays, hidden beside `out`.
    """
    job = job.own()
    folder = beton.index_folder(job.out)
    beton.import_ffcv()  # once, before there are workers
    settings = beton_writer.beton_settings(len(job.sources), storage, source=job.sources.digest)
    if job.out.exists():
        if not job.out.is_file() or not finished(folder, settings):
            raise ValueError(f"{job.out}: something else is there; remove it or choose another name")
        return DatasetIndex.load(folder)
    _make_folder(job.out.parent)
    encode = functools.partial(beton_writer.encode_record, storage=storage)
    with _alone(job.out, job.out.with_name(f".{job.out.name}.lock")), explain_full_disk(job.out):
        job.announce(estimate(job.sources, encode, lambda record: len(record.payload)))
        writer = beton_writer.BetonWriter(
            job.out, capacity=len(job.sources), storage=storage, source=job.sources.digest
        )
        return _run(job, writer, encode)


def sample_to_beton(
    source: Path, classes: Sequence[str] | None, out: Path, *, images: int, max_size: int, workers: int
) -> DatasetIndex:
    """Convert some images of a source, to see what converting all of them would bring. Raises as to_beton does."""
    sources = open_sources(source, classes).limit(images)
    return to_beton(Job(sources=sources, out=out, workers=workers), Storage(max_size=max_size))


def to_resident(job: Job, size: int | None) -> DatasetIndex:
    """Convert to a resident dataset: see to_beton. Images of several sizes need `size`."""
    job = job.own()
    settings = {"source": job.sources.digest, "size": size}
    if finished(job.out, settings):
        return DatasetIndex.load(job.out)
    if (job.out / resident_writer.IMAGES).exists() and not (
        job.out / f".{resident_writer.IMAGES}.journal"
    ).exists():
        raise ValueError(f"{job.out}: another dataset is there; remove it or choose another folder")
    _make_folder(job.out)
    encode = functools.partial(resident_writer.encode_record, size=size)
    with _alone(job.out, job.out / f"{_LOCK}.lock"), explain_full_disk(job.out):
        job.announce(estimate(job.sources, encode, lambda record: record.pixels.nbytes))
        return _run(job, resident_writer.ResidentWriter(job.out, settings), encode)


def _run(job: Job, writer: _Writer[R], encode: Encode[R]) -> DatasetIndex:
    """Feed a writer of one file from where it stands."""
    count = len(job.sources)
    with _bar(job, count, writer.sources) as bar:
        outcomes = encoded(job.sources, encode, [range(writer.sources, count)], job.workers)
        try:
            while writer.sources < count:
                records: list[R] = []
                rejects: list[Reject] = []
                for outcome in islice(outcomes, min(PART, count - writer.sources)):
                    bar.update()
                    if isinstance(outcome, Reject):
                        rejects.append(outcome)
                    else:
                        records.append(outcome)
                writer.append(records, writer.sources + len(records) + len(rejects), rejects)
            job.check_classes(writer.rejects())
            return writer.finish(job.sources.classes)
        finally:
            outcomes.close()
            writer.close()


def to_shards(job: Job, storage: Storage, shard_size: int = SHARD) -> DatasetIndex | None:
    """Convert to WebDataset shards. Several machines may each write a part of the same (or a copied) folder.

    Shards that are there are kept. Whoever finds all there writes the index, rejects.csv and manifest.json.

    Returns None while other parts' shards are missing. Raises: see to_beton.
    """
    out = job.out
    settings = {"source": job.sources.digest, "shard_size": shard_size, **asdict(storage)}
    if finished(out, settings):
        return DatasetIndex.load(out / shards.INDEX)
    with explain_full_disk(out):
        _make_folder(out)
        with _alone(out, out / f"{_LOCK}-{job.part.number}-of-{job.part.of}.lock"):
            _claim(out, settings)
            return _write_shards(job, storage, shard_size, settings)


def _write_shards(job: Job, storage: Storage, shard_size: int, settings: Mapping[str, Any]) -> DatasetIndex | None:
    """Write the part's shards that are missing, and the index if all are there then."""
    count, out = len(job.sources), job.out
    spans = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    todo = [number for number in job.part.range(len(spans)) if not shard_writer.shard_done(out, number)]
    encode = functools.partial(shard_writer.encode_record, storage=storage)
    job.announce(estimate(job.sources, encode, lambda record: len(record.data) + 3 * 1024))
    mine = sum(len(spans[number]) for number in job.part.range(len(spans)))
    left = sum(len(spans[number]) for number in todo)
    with _bar(job, mine, mine - left) as bar:
        outcomes = encoded(job.sources, encode, [spans[number] for number in todo], job.workers)
        try:
            for number in todo:
                rejects: list[Reject] = []
                records = _split(islice(outcomes, len(spans[number])), rejects, bar)
                shard_writer.write_shard(out, number, records, rejects)
        finally:
            outcomes.close()
        if not all(shard_writer.shard_done(out, number) for number in range(len(spans))):
            return None
        summaries = list(shard_writer.shard_summaries(out))
        job.check_classes(Reject.of(row) for each in summaries for row in each.rejects)
        index = shard_writer.finish_shards(out, job.sources.classes)
        rejected = write_rejects(out, (Reject.of(row) for each in summaries for row in each.rejects))
        data = [each.data for each in summaries]
        write_manifest(out, index, settings, rejected=rejected, shards=len(data), data=data)
        shard_writer.remove_notes(out)
    return index


def _alone(out: Path, lock: Path) -> Lock:
    """The right to write an output. Raises ValueError if another conversion has it."""
    return Lock(
        lock,
        f"{out}: another conversion is writing there (it holds {lock.name}); wait for it, or choose another place",
    )


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings in the folder before the first shard is in it."""
    note = out / ".settings.json"
    if note.is_file():
        there = read_object(note, f"remove {out} and convert again")
        if there != settings:
            raise ValueError(other_settings(out, there, settings))
    elif out.is_dir() and not all(each.name.startswith(_LOCK) for each in out.iterdir()):
        raise ValueError(f"{out}: other files are there and no {MANIFEST}; remove them or choose another folder")
    write_json(note, settings)


def _make_folder(folder: Path) -> None:
    """Make a folder to write into, before hours are spent. Raises ValueError if it is no place to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # say_when_full says what to do
            raise
        raise ValueError(f"{folder}: cannot be made a folder ({error.strerror}); choose another place") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: cannot be written to; choose another place or change its permissions")


def _split(
    outcomes: Iterator[shard_writer.ShardRecord | Reject], rejects: list[Reject], bar: tqdm[Any]
) -> Iterator[shard_writer.ShardRecord]:
    for outcome in outcomes:
        bar.update()
        if isinstance(outcome, Reject):
            rejects.append(outcome)
        else:
            yield outcome


def _bar(job: Job, total: int, done: int) -> tqdm[Any]:
    """Images per second and time left; nothing when not on a terminal."""
    return tqdm(desc=f"convert {job.out.name}", total=total, initial=done, unit=" images", disable=None)
