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

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from pipelines.formats.checked import Record, read_record
from pipelines.index import DatasetIndex

INDEX = "index"
BLOCK = tarfile.BLOCKSIZE
IDX_VERSION = "v1.2"  # nvidia-dali's wds2idx.IndexCreator.index_file_version


def shard_path(folder: Path, number: int) -> Path:
    """The tar of shard `number`."""
    return folder / f"shard-{number:06d}.tar"


class Summary(Record):
    """What was noted of a shard: samples in it, a digest of all their data; position, name, reason of each reject."""

    samples: NonNegativeInt
    data: str
    rejects: list[tuple[int, str, str]]


def read_summary(path: Path) -> Summary:
    """The .json beside a shard. Raises ValueError if it is damaged."""
    return read_record(path, Summary, f"remove it and {path.stem}.tar, and convert again")


@dataclass(frozen=True)
class ShardLayout:
    """Where the samples of a folder of shards lie, checked.

    Attributes:
        paths: the tars.
        shards: int64 [N], the tar of each sample, counted in `paths`.
        starts: int64 [N], where in it the sample's image begins.
    """

    paths: list[Path]
    shards: NDArray[np.int64]
    starts: NDArray[np.int64]


def read_layout(folder: Path, index: DatasetIndex) -> ShardLayout:
    """Find the samples of an index in the tars of `folder`.

    Raises ValueError for an index without offsets, and for tars that are not the ones it was made of.
    """
    if index.offsets is None or index.lengths is None:
        raise ValueError(f"{folder / INDEX}: no offsets in it; convert the dataset again")
    paths = sorted(folder.glob("shard-*.tar"))
    sizes = np.array([path.stat().st_size for path in paths], np.int64)
    ends = np.cumsum(sizes)
    total, last = int(sizes.sum()), index.offsets + index.lengths
    if len(index) and int(index.lengths.min()) < 1:
        raise ValueError(f"{folder / INDEX}: a sample of no bytes; convert the dataset again")
    if len(index) and int(last.max()) > total:
        raise ValueError(
            f"{folder}: the index needs {int(last.max()):,} bytes of tars, found {total:,} in {len(paths)} files; a "
            "tar is missing or cut: copy or convert it again"
        )
    shards = np.searchsorted(ends, index.offsets, side="right")
    starts = index.offsets - np.concatenate([[0], ends])[shards]
    used, first = np.unique(shards, return_index=True)
    begins = (starts[first] == BLOCK).all()  # every tar begins with an image
    if len(used) < len(paths) or not begins or (last > ends[shards]).any():
        raise ValueError(
            f"{folder}: its {len(paths)} tars are not those of its index: one is missing, cut, longer, or of "
            "another conversion; copy or convert them again"
        )
    return ShardLayout(paths, shards, starts)
