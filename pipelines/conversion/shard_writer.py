"""Writing WebDataset tar shards with DALI's index."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipelines.conversion.encode import Source, Storage, encode_jpeg
from pipelines.conversion.journal import Reject
from pipelines.files import replace_file, write_json
from pipelines.formats.shards import BLOCK, INDEX, shard_path
from pipelines.index import DatasetIndex

_IDX_VERSION = "v1.2"  # nvidia-dali's wds2idx.IndexCreator.index_file_version


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
        file.write(bytes(2 * BLOCK))  # a tar ends with two blocks of zeros
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
    return about.is_file() and path.is_file() == bool(json.loads(about.read_text(encoding="utf-8"))["samples"])


def shard_summaries(folder: Path) -> Iterator[dict[str, Any]]:
    """What write_shard noted of every shard: samples, data (a digest), rejects."""
    for path in sorted(folder.glob("shard-*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def _add_member(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file to a tar; return the offset of its bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))
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
    for line in idx.read_text(encoding="utf-8").splitlines()[1:]:
        words = line.split()
        samples.append({ext: (int(o), int(n)) for ext, o, n in zip(*(words[i::4] for i in range(3)), strict=True)})
    return samples


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
