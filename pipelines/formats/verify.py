"""All of a converted dataset, compared with the checksums that it was written with.

A loader compares a sample with its checksum when it first reads it; this reads everything, in the order of the disk.
Files are read, not mapped: a bad sector is something to report then, and does not kill the process.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.files import open_file, read_text
from pipelines.formats import beton, shards
from pipelines.formats.checked import Record, read_array, read_record
from pipelines.formats.resident import IMAGES
from pipelines.index import DatasetIndex

Finding = tuple[int, str]  # images compared since the last one; what is wrong, or ""


class Verification(NamedTuple):
    """A dataset that can be compared with its checksums.

    Attributes:
        images: how many it has.
        findings: reads them; yields what is wrong, file and sample named.
    """

    images: int
    findings: Iterator[Finding]


def datasets(path: Path) -> list[Path]:
    """The converted datasets at `path`: itself, or those in a folder, as `convert` makes of a root with several sets.

    Raises ValueError if there is none.
    """
    if _is_dataset(path):
        return [path]
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    found = [each for each in sorted(path.iterdir()) if _is_dataset(each)] if path.is_dir() else []
    if not found:
        raise ValueError(
            f"{path}: nothing here has checksums; expected what convert wrote (a folder of shards, a resident dataset, a "
            ".beton with its .index) or a teacher cache"
        )
    return found


def _is_dataset(path: Path) -> bool:
    if path.is_file():
        return beton.index_folder(path).is_dir()
    return any((path / name).exists() for name in (shards.INDEX, IMAGES, "index.json"))


def open_dataset(path: Path) -> Verification:
    """Prepare to compare all of a dataset.

    Raises ValueError for a damaged index, a file that is missing or cut, and a dataset without checksums.
    """
    if path.is_file():
        folder = beton.index_folder(path)
        index, layout = DatasetIndex.load(folder), beton.read_layout(path)
        spans = _Spans([path], np.zeros(len(index), np.int64), layout.pointers, layout.lengths)
        return Verification(len(index), _beton(path, folder, index, layout, spans))
    if (path / shards.INDEX).is_dir():
        index = DatasetIndex.load(path / shards.INDEX)
        places = shards.read_layout(path, index)
        assert index.lengths is not None
        spans = _Spans(places.paths, places.shards, places.starts, index.lengths)
        return Verification(len(index), _shards(path, index, spans))
    index = DatasetIndex.load(path)
    images = read_array(path / IMAGES, np.uint8, (len(index), None, None, 3), _AGAIN, mode="r")
    size, start = images[:1].nbytes, getattr(images, "offset", 0)
    starts = start + size * np.arange(len(index))
    spans = _Spans([path / IMAGES], np.zeros(len(index), np.int64), starts, np.full(len(index), size))
    return Verification(len(index), _resident(path, index, spans))


_AGAIN = "copy or convert it again"


class _Spans(NamedTuple):
    """Where images lie: sample i in `lengths[i]` bytes from `starts[i]` on of `paths[files[i]]`."""

    paths: list[Path]
    files: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def _beton(
    path: Path, folder: Path, index: DatasetIndex, layout: beton.BetonLayout, spans: _Spans
) -> Iterator[Finding]:
    yield 0, _other_manifest(folder, index)
    if not layout.is_of(index):
        raise ValueError(f"{folder}: belongs to another file than {path.name}; {_AGAIN}")
    for sample in np.flatnonzero(index.labels != layout.labels).tolist():
        yield 0, f"{path}: {index.names[sample]}: its label is {layout.labels[sample]}, was {index.labels[sample]}"
    for _, findings in _file_by_file(index, spans):
        yield from findings


def _resident(path: Path, index: DatasetIndex, spans: _Spans) -> Iterator[Finding]:
    yield 0, _other_manifest(path, index)
    for _, findings in _file_by_file(index, spans):
        yield from findings


def _shards(folder: Path, index: DatasetIndex, spans: _Spans) -> Iterator[Finding]:
    """Tar by tar: the images, and the members that only other readers look at."""
    yield 0, _other_manifest(folder, index)
    for tar, findings in _file_by_file(index, spans, unsummed=True):
        damaged = False
        for images, text in findings:
            damaged |= bool(text)
            yield images, text
        if not damaged:  # a damaged image is part of the same sum
            yield 0, _members(tar, ", in labels, names or headers" if index.checksums is not None else "")


def _file_by_file(
    index: DatasetIndex, spans: _Spans, *, unsummed: bool = False
) -> Iterator[tuple[Path, Iterator[Finding]]]:
    """Each file, and its images one by one, compared with their checksums.

    Raises ValueError if there are none, unless the files are summed by themselves.
    """
    if index.checksums is None and not unsummed:
        raise ValueError(
            f"{spans.paths[0]}: was converted before images were summed, and nothing can be compared; {_AGAIN}"
        )
    order = np.lexsort([spans.starts, spans.files])
    for number, samples in groupby(order.tolist(), key=lambda sample: int(spans.files[sample])):
        yield spans.paths[number], _compare(index, spans, spans.paths[number], samples)


def _compare(index: DatasetIndex, spans: _Spans, path: Path, samples: Iterator[int]) -> Iterator[Finding]:
    with open_file(path) as file:
        for sample in samples:
            if index.checksums is None:
                yield 1, ""
                continue
            wrong = _difference(file, spans, sample, int(index.checksums[sample]))
            yield 1, f"{path}: {index.names[sample]} (sample {sample}): {wrong}" if wrong else ""


def _difference(file: IO[bytes], spans: _Spans, sample: int, checksum: int) -> str:
    try:
        file.seek(int(spans.starts[sample]))
        data = file.read(int(spans.lengths[sample]))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if zlib.crc32(data) == checksum else "fails its checksum"


def _members(tar: Path, where: str) -> str:
    """What is wrong with a shard as a whole, its .idx and its .json; `where` is what is not known to be whole."""
    state = hashlib.blake2b(digest_size=16)
    lines: list[tuple[str, list[str]]] = []
    try:
        noted = shards.read_summary(tar.with_suffix(".json"))
        with tarfile.open(tar, "r:") as file:
            for member in file:
                content = file.extractfile(member)
                state.update(content.read() if content else b"")
                stem, _, extension = member.name.partition(".")
                if not lines or lines[-1][0] != stem:
                    lines.append((stem, []))
                lines[-1][1].append(f"{extension} {member.offset_data} {member.size} {member.name}")
        idx = read_text(tar.with_suffix(".idx"))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        return str(error) if str(tar.parent) in str(error) else f"{tar}: {error}"
    if state.hexdigest() != noted.data or len(lines) != noted.samples:
        return f"{tar}: fails its checksum{where}"
    if idx != "\n".join([f"{shards.IDX_VERSION} {len(lines)}", *(" ".join(words) for _, words in lines), ""]):
        return f"{tar.with_suffix('.idx')}: not the index of {tar.name}, by which DALI's own reader finds samples"
    return ""


class _Manifest(Record):
    index: str


def _other_manifest(folder: Path, index: DatasetIndex) -> str:
    """What is wrong with a manifest.json, if there is one."""
    path = folder / "manifest.json"
    try:
        if not path.is_file() or read_record(path, _Manifest, _AGAIN).index == index.digest:
            return ""
    except ValueError as error:
        return str(error)
    return f"{path}: of another index"
