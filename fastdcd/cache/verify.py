"""Checksums of stored rows, and what of a view or a cache differs from them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdcd.cache.manifest import BLOCK_ROWS, Manifest
from fastdcd.cache.npy_file import PAGE, npy_header
from pipelines.formats.checked import read_array

if TYPE_CHECKING:
    from fastdcd.cache.store import TeacherCache


def block_sums(path: Path, manifest: Manifest) -> NDArray[np.int64]:
    """CRC-32 of each block of rows as the file is now: int64 [blocks]; -1 for a block that is not all there."""
    rows, row_bytes = manifest.rows, manifest.row_bytes
    sums = np.full(-(-rows // BLOCK_ROWS), -1)
    if not path.is_file():
        return sums
    with path.open("rb") as file:
        if file.read(PAGE) == npy_header((rows, row_bytes)):
            for block in range(len(sums)):
                size = min(BLOCK_ROWS, rows - block * BLOCK_ROWS) * row_bytes
                data = file.read(size)
                if len(data) == size:
                    sums[block] = zlib.crc32(data)
    return sums


def damaged_blocks(path: Path, sums: Path, manifest: Manifest) -> list[range]:
    """Ranges of rows of the file `path`, a block each, that differ from their checksums in the file `sums`."""
    actual = block_sums(path, manifest)
    try:
        wrong = read_array(sums, np.uint32, actual.shape, "") != actual
    except ValueError:
        wrong = np.ones(len(actual), np.bool_)
    return [
        range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, manifest.rows))
        for block in np.flatnonzero(wrong).tolist()
    ]


class Verified(NamedTuple):
    """What is not as it was written: rows of complete views, in blocks; what is said of the classifier, or ""."""

    views: int
    complete: int
    damaged: dict[int, list[range]]
    classifier: str

    def wrong(self, path: Path) -> list[str]:
        """What of the cache at `path` is damaged and how to mend it, a line each; none if nothing is."""
        lines = []
        for view, blocks in self.damaged.items():
            rows = ", ".join(f"{block.start}-{block.stop - 1}" for block in blocks[:5])
            more = " ..." if blocks[5:] else ""
            lines.append(f"{path}: view {view}: {len(blocks)} blocks fail their checksum, rows {rows}{more}")
        lines += [self.classifier] if self.classifier else []
        return lines and [*lines, "write them again: python tools/cache_teacher.py fill --repair --config ..."]

    @property
    def summary(self) -> str:
        """What to say if nothing is wrong."""
        return f"{self.complete} of {self.views} views are complete, all checksums match"


def is_cache(path: Path) -> bool:
    """Whether `path` looks like the folder of a teacher cache, damaged or not."""
    return (path / "classifier.safetensors").is_file() or any(path.glob("view-*.npy"))


def verify(cache: TeacherCache) -> Verified:
    """Compare all complete views and the classifier of a cache with their checksums."""
    complete = [number for number in range(cache.manifest.views) if cache.view(number).complete()]
    found = {number: cache.view(number).verify() for number in tqdm(complete, "verify", unit="view", disable=None)}
    damaged = {number: blocks for number, blocks in found.items() if blocks}
    classifier = ""
    try:
        cache.classifier()
    except ValueError as error:
        classifier = str(error)
    return Verified(cache.manifest.views, len(complete), damaged, classifier)
