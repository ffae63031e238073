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

import hashlib
import json
import resource
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encode import Source, Storage, encode_jpeg
from pipelines.files import map_file, replace_file, will_need, write_json
from pipelines.index import DatasetIndex
from pipelines.ledger import Reject

INDEX = "index"
_IDX_VERSION = "v1.2"  # nvidia-dali's wds2idx.IndexCreator.index_file_version
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One encoded sample.

    Attributes:
        position: its place in the source, counted over all shards; names the tar's members.
        name, label: as in Source.
        height, width: of the stored image.
        data: a JPEG file.
    """

    position: int
    name: str
    label: int
    height: int
    width: int
    data: bytes


def encode_record(source: Source, position: int, storage: Storage) -> ShardRecord:
    """Encode a sample for a shard. Raises ValueError with the reason if it cannot be decoded."""
    data, height, width = encode_jpeg(source, storage)
    return ShardRecord(
        position=position, name=source.name, label=source.label, height=height, width=width, data=data
    )


def shard_path(folder: Path, number: int) -> Path:
    """The tar of shard `number`."""
    return folder / f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, records: Iterable[ShardRecord], rejects: Sequence[Reject] = ()) -> int:
    """Write a shard's .idx and .json and then, complete under its final name, its .tar.

    Equal records give equal bytes. A shard whose .tar exists is complete.

    Args:
        folder, number: where; see shard_path.
        records: consumed one by one.
        rejects: the samples that have no place in this shard, read after the last record. A shard of rejects
            alone gets no .tar (DALI cannot read an empty one), only its .json.

    Returns the number of samples.
    """
    path = shard_path(folder, number)
    lines: list[str] = []
    about_path = path.with_suffix(".json")
    with replace_file(path) as file:
        digest = hashlib.blake2b(digest_size=16)
        for record in records:
            key = f"{record.position:09d}"
            about = {"name": record.name, "height": record.height, "width": record.width}
            members = {
                "jpg": record.data,
                "cls": str(record.label).encode(),
                "json": json.dumps(about, ensure_ascii=False).encode(),
            }
            # wds2idx: for each member its extension, the offset of its bytes, their number, its name
            line = []
            for extension, data in members.items():
                name = f"{key}.{extension}"
                line.append(f"{extension} {_add_member(file, name, data)} {len(data)} {name}")
                digest.update(data)
            lines.append(" ".join(line))
        file.write(bytes(2 * _BLOCK))  # a tar ends with two blocks of zeros
        with replace_file(path.with_suffix(".idx")) as index:
            index.write("\n".join([f"{_IDX_VERSION} {len(lines)}", *lines, ""]).encode())
        bad = [[reject.position, reject.name, reject.reason] for reject in rejects]
        write_json(about_path, {"samples": len(lines), "data": digest.hexdigest(), "rejects": bad})
    if not lines:
        path.unlink()
        path.with_suffix(".idx").unlink()
    return len(lines)


def shard_done(folder: Path, number: int) -> bool:
    """Whether a shard is complete."""
    path = shard_path(folder, number)
    about = path.with_suffix(".json")
    return about.is_file() and path.is_file() == bool(json.loads(about.read_text())["samples"])


def shard_summaries(folder: Path) -> Iterator[dict[str, Any]]:
    """What write_shard noted of every shard: samples, data (a digest), rejects."""
    for path in sorted(folder.glob("shard-*.json")):
        yield json.loads(path.read_text())


def _add_member(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file to a tar; return the offset of its bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % _BLOCK))
    return offset


def finish_shards(folder: Path, classes: Sequence[str]) -> DatasetIndex:
    """Index the shards of `folder` from what stands in them; ids follow shard number and place in the shard.

    Raises ValueError if there are none or one lacks its .idx.
    """
    paths = sorted(folder.glob("shard-*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no shard-*.tar in it; python tools/convert.py shards SRC {folder}")
    labels, sizes, names, offsets, lengths = [], [], [], [], []
    start = 0
    for path in paths:
        with path.open("rb") as file:
            for members in _read_idx(path):
                (offset, length) = members["jpg"]
                about = json.loads(_read_at(file, *members["json"]))
                labels.append(int(_read_at(file, *members["cls"])))
                sizes.append((about["height"], about["width"]))
                names.append(about["name"])
                offsets.append(start + offset)
                lengths.append(length)
        start += path.stat().st_size
    index = DatasetIndex(
        classes=tuple(classes),
        labels=np.array(labels, np.int64),
        sizes=np.array(sizes, np.int32),
        names=names,
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
    )
    index.save(folder / INDEX)
    return index


def _read_idx(path: Path) -> list[dict[str, tuple[int, int]]]:
    """The members of every sample of a shard by extension: offset and length of its bytes."""
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        raise ValueError(f"{path}: its index {idx.name} is missing; make it with nvidia-dali's wds2idx")
    samples = []
    for line in idx.read_text().splitlines()[1:]:
        words = line.split()
        samples.append({ext: (int(o), int(n)) for ext, o, n in zip(*(words[i::4] for i in range(3)), strict=True)})
    return samples


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


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
        if len(used) < len(paths) or (self._start[first] != _BLOCK).any():  # every tar begins with an image
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
