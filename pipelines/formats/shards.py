"""WebDataset tar shards that are also random-access files.

A folder of shard-000000.tar, shard-000001.tar, ... Each sample is three members of a tar, named by its
place in the source: 000000042.jpg, .cls (its label in decimal) and .json (name, height, width), so that
the `webdataset` package and DALI's fn.readers.webdataset read them as they are. Beside each tar lies DALI's
index of it (.idx) and what was left out (.json), and index/ holds the DatasetIndex: a sample's offset counts from the start of the first
tar through all of them.

A shard is written whole or not at all, and depends on its own samples only: so a converter writes shards
in any order, in as many processes as it likes, and after a crash writes the missing ones.
"""

from __future__ import annotations

import resource
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.files import map_file, will_need
from pipelines.index import DatasetIndex

INDEX = "index"
BLOCK = tarfile.BLOCKSIZE


def shard_path(folder: Path, number: int) -> Path:
    """The tar of shard `number`."""
    return folder / f"shard-{number:06d}.tar"


class ShardReader:
    """The encoded bytes of any sample, straight from the memory-mapped tars: nothing is copied.

    Memory: mapped pages belong to the page cache, and the system takes them back when it needs them.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder of shards. Raises ValueError for a missing index or a missing or cut tar."""
        self.index = index = DatasetIndex.load(folder / INDEX)
        if index.offsets is None or index.lengths is None:
            raise ValueError(f"{folder / INDEX}: no offsets in it; convert the dataset again")
        paths = sorted(folder.glob("shard-*.tar"))
        _allow_open_files(len(paths))
        self._files = [map_file(path) for path in paths]
        self._maps = [np.frombuffer(file, np.uint8) for file in self._files]
        ends = np.cumsum([len(bytes_) for bytes_ in self._maps], dtype=np.int64)
        self._shard = np.searchsorted(ends, index.offsets, side="right")
        total = int(ends[-1]) if len(ends) else 0
        if len(index) and int((index.offsets + index.lengths).max()) > total:
            raise ValueError(
                f"{folder}: the index needs {int((index.offsets + index.lengths).max()):,} bytes of tars, found "
                f"{total:,} in {len(paths)} files; a tar is missing or cut: copy or convert it again"
            )
        self._start = index.offsets - np.concatenate([[0], ends])[self._shard]
        used, first = np.unique(self._shard, return_index=True)
        if len(used) < len(paths) or (self._start[first] != BLOCK).any():  # every tar begins with an image
            raise ValueError(
                f"{folder}: its {len(paths)} tars are not those of its index: one is missing, cut, longer, or of "
                "another conversion; copy or convert them again"
            )

    def __call__(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes uint8 [length] of samples `ids` [n]; read-only views, valid as long as the reader."""
        assert self.index.lengths is not None
        rows = zip(self._shard[ids], self._start[ids], self.index.lengths[ids], strict=True)
        return [self._maps[shard][start : start + length] for shard, start, length in rows]

    def will_need(self, ids: NDArray[np.int64]) -> None:
        """Let the kernel read samples `ids` [n] in the background; does not wait for the storage."""
        assert self.index.lengths is not None
        spans = (self._shard[ids].tolist(), self._start[ids].tolist(), self.index.lengths[ids].tolist())
        for shard, start, length in zip(*spans, strict=True):
            will_need(self._files[shard], start, length)

    def close(self) -> None:
        """Let go of the files. Views handed out keep theirs open."""
        self._maps, self._files = [], []


def _allow_open_files(count: int) -> None:
    """Every map keeps its file open: raise this process's own limit if a data set has many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == -1 else min(needed, hard), hard))
