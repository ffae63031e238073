"""Writing WebDataset tar shards with DALI's index."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from pipelines.conversion.encode import Source, Storage, encode_jpeg
from pipelines.conversion.journal import Reject
from pipelines.files import read_text, replace_file, write_json
from pipelines.formats.checked import Record, parse_record, read_array
from pipelines.formats.shards import BLOCK, IDX_VERSION, INDEX, Summary, read_summary, shard_path
from pipelines.index import DatasetIndex


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
    checksums: list[int] = []
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
            checksums.append(zlib.crc32(record.data))
        file.write(bytes(2 * BLOCK))  # a tar ends with two blocks of zeros
        with replace_file(path.with_suffix(".idx")) as index:
            index.write("\n".join([f"{IDX_VERSION} {len(lines)}", *lines, ""]).encode())
        with replace_file(_checksums_path(path)) as sums:
            np.save(sums, np.array(checksums, np.uint32), allow_pickle=False)
        bad = [[reject.position, reject.name, reject.reason] for reject in rejects]
        write_json(about_path, {"samples": len(lines), "data": digest.hexdigest(), "rejects": bad})
    if not lines:
        path.unlink()
        path.with_suffix(".idx").unlink()
        _checksums_path(path).unlink()
    return len(lines)


def shard_done(folder: Path, number: int) -> bool:
    """Whether a shard is complete. Raises ValueError if what was noted of it is damaged."""
    path = shard_path(folder, number)
    about = path.with_suffix(".json")
    return about.is_file() and path.is_file() == bool(read_summary(about).samples)


def shard_summaries(folder: Path) -> Iterator[Summary]:
    """What write_shard noted of every shard."""
    for path in sorted(folder.glob("shard-*.json")):
        yield read_summary(path)


def _add_member(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file to a tar; return the offset of its bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))
    return offset


class _About(Record):
    """The .json member of a sample."""

    name: str
    height: PositiveInt
    width: PositiveInt


def finish_shards(folder: Path, classes: Sequence[str]) -> DatasetIndex:
    """Index the shards of `folder` from their contents; ids follow shard number and place in the shard.

    Raises ValueError if there are none, or one lacks its .idx or is not as that says.
    """
    paths = sorted(folder.glob("shard-*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no shard-*.tar in it; python tools/convert.py shards SRC {folder}")
    labels, sizes, names, offsets, lengths = [], [], [], [], []
    checksums: list[NDArray[np.uint32]] = []
    start = 0
    for path in paths:
        samples = _read_idx(path)
        with path.open("rb") as file:
            for members in samples:
                about = parse_record(members["json"].read(file, path), _About, path, _AGAIN)
                label = members["cls"].read(file, path)
                if not label.isdigit() or int(label) >= len(classes):
                    raise ValueError(f"{path}: label {label[:20]!r}, expected 0 to {len(classes) - 1}; {_AGAIN}")
                members["jpg"].check(file, path)
                labels.append(int(label))
                sizes.append((about.height, about.width))
                names.append(about.name)
                offsets.append(start + members["jpg"].offset)
                lengths.append(members["jpg"].length)
            checksums.append(_checksums(path, file, [members["jpg"] for members in samples]))
        start += path.stat().st_size
    index = DatasetIndex(
        classes=tuple(classes),
        labels=np.array(labels, np.int64),
        sizes=np.array(sizes, np.int32),
        names=names,
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
        checksums=np.concatenate(checksums),
    )
    index.save(folder / INDEX)
    return index


def remove_notes(folder: Path) -> None:
    """Remove what only `finish_shards` needs, once the conversion is finished."""
    for path in folder.glob(_checksums_path(Path("shard-*.tar")).name):
        path.unlink()


_AGAIN = "remove this shard with its .idx and .json, and convert again"


@dataclass(frozen=True)
class _Member:
    """A file in a tar, as an .idx describes it."""

    name: str
    offset: int
    length: int

    def check(self, file: IO[bytes], path: Path) -> None:
        """Raises ValueError unless the tar's own header of this file, which has a checksum, says the same."""
        file.seek(max(self.offset - BLOCK, 0))
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{path}: damaged, or not as its .idx says ({self.name}: {error}); {_AGAIN}"
            ) from None
        if (header.name, header.size) != (self.name, self.length):
            raise ValueError(
                f"{path}: not as its .idx says (there {self.name} of {self.length:,} bytes, here {header.name} of "
                f"{header.size:,}); {_AGAIN}"
            )

    def read(self, file: IO[bytes], path: Path) -> bytes:
        self.check(file, path)
        return file.read(self.length)


def _read_idx(path: Path) -> list[dict[str, _Member]]:
    """The members of every sample of a shard, by extension. Raises ValueError if its .idx is missing or damaged."""
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        raise ValueError(f"{path}: its index {idx.name} is missing; make it with nvidia-dali's wds2idx")
    head, *lines = read_text(idx).splitlines() or [""]
    if head.split()[1:] != [str(len(lines))]:
        raise ValueError(
            f"{idx}: damaged or cut off ({len(lines)} samples, its head says {head[:40]!r}); {_AGAIN}"
        )
    samples = []
    for line in lines:
        words = line.split(" ")
        fields = [words[k : k + 4] for k in range(0, len(words), 4)]
        members = {
            field[0]: _Member(field[3], int(field[1]), int(field[2]))
            for field in fields
            if len(field) == 4 and all(word.isascii() and word.isdigit() and len(word) < 19 for word in field[1:3])
        }
        if not {"jpg", "cls", "json"} <= members.keys() or len(members) != len(fields):
            raise ValueError(f"{idx}: damaged (line {line[:60]!r}); {_AGAIN}")
        samples.append(members)
    return samples


def _checksums_path(tar: Path) -> Path:
    return tar.with_name(f".{tar.stem}.crc32.npy")


def _checksums(tar: Path, file: IO[bytes], images: Sequence[_Member]) -> NDArray[np.uint32]:
    """CRC-32 of the images of a shard, as noted when it was written; else (version 0.1.0) of what is there now."""
    if _checksums_path(tar).is_file():
        return read_array(_checksums_path(tar), np.uint32, (len(images),), "remove it and convert again")
    return np.array([zlib.crc32(image.read(file, tar)) for image in images], np.uint32)
