"""Writing .beton files part by part, so that a conversion survives kill -9."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.encode import Source, Storage, shrink
from pipelines.conversion.journal import Journal, Reject, chain, write_manifest, write_rejects
from pipelines.formats.beton import IMAGE, LABEL, RAW, import_ffcv, index_folder
from pipelines.images.decode import read_pixels
from pipelines.index import DatasetIndex
from pipelines.views import hash_key, uniform

PAGE_SIZE = 1 << 23  # 8 MiB, the default of FFCV's DatasetWriter; a sample must fit into a page


@dataclass(frozen=True, kw_only=True)
class BetonRecord:
    """One encoded sample.

    Attributes:
        name, label: as in Source.
        height, width: of the stored image.
        mode: 0 JPEG, 1 raw pixels.
        payload: uint8 [n], the bytes in the file.
    """

    name: str
    label: int
    height: int
    width: int
    mode: int
    payload: NDArray[np.uint8]


def beton_settings(
    capacity: int, storage: Storage, *, page_size: int = PAGE_SIZE, source: str = ""
) -> dict[str, Any]:
    """What decides the bytes of a .beton, for its journal and manifest."""
    return {"source": source, "capacity": capacity, "page_size": page_size, **asdict(storage)}


def encode_record(source: Source, position: int, storage: Storage) -> BetonRecord:
    """Encode a sample with FFCV's field encoder; `position`, its place in the source, decides JPEG or raw.

    Raises ValueError with the reason if it cannot be decoded.
    """
    fields = import_ffcv().fields
    pixels = shrink(read_pixels(source.data), storage.max_size)
    draw = uniform(hash_key(storage.seed, np.array([position]), 0), 0)[0]
    field = fields.RGBImageField(write_mode="jpg" if draw < storage.jpeg else "raw", jpeg_quality=storage.quality)
    payloads: list[NDArray[np.uint8]] = []

    def allocate(size: int) -> tuple[int, NDArray[np.uint8]]:
        payloads.append(np.empty(size, np.uint8))
        return 0, payloads[-1]

    destination = np.zeros(1, field.metadata_type)
    field.encode(destination, pixels, allocate)
    return BetonRecord(
        name=source.name,
        label=source.label,
        height=int(destination["height"][0]),
        width=int(destination["width"][0]),
        mode=int(destination["mode"][0]),
        payload=payloads[0],
    )


class BetonWriter:
    """Writes a .beton part by part, in order; a new writer on the same path continues after the last part.

    While it runs, the file is a hidden .NAME.partial beside the final one, with a .NAME.journal that names
    the parts safely on disk. Memory does not grow with the data set until `finish`.

        writer = BetonWriter(path, capacity=len(sources), storage=storage)
        for chunk in chunks_of(sources[writer.sources:]):
            writer.append(records_of(chunk), sources=number of sources so far, rejected ones included)
        writer.finish(classes)
    """

    def __init__(
        self,
        path: Path,
        *,
        capacity: int,
        storage: Storage,
        page_size: int = PAGE_SIZE,
        source: str = "",
    ) -> None:
        """Start or resume.

        Args:
            path: the final .beton.
            capacity: the largest possible number of samples: that many metadata records are set aside.
            storage, source: settings and the source's digest, so that a run with others does not resume this one.

        Raises:
            ValueError: an unfinished file with other settings lies there.
        """
        self._path, self._capacity, self._page_size = path, capacity, page_size
        self._types = import_ffcv().types
        self._metadata_start = self._types.HeaderType.itemsize + 2 * self._types.FieldDescType.itemsize
        self._metadata_type = self._types.get_metadata_type(self._fields())
        start = self._metadata_start + capacity * self._metadata_type.itemsize
        self._partial = path.with_name(f".{path.name}.partial")
        self._settings = beton_settings(capacity, storage, page_size=page_size, source=source)
        journal = path.with_name(f".{path.name}.journal")
        self._journal = Journal(journal, self._settings, fresh=not self._partial.exists())
        last = self._journal.parts[-1:] or [{"sources": 0, "end": start + -start % page_size, "digest": ""}]
        self.sources, self._end, self._digest = (last[0][key] for key in ("sources", "end", "digest"))
        self._journal.parts.clear()
        self._partial.touch()
        self._file = self._partial.open("r+b")
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _fields(self) -> list[Any]:
        fields = import_ffcv().fields
        return [fields.RGBImageField(), fields.IntField()]

    def append(self, records: Sequence[BetonRecord], sources: int, rejects: Sequence[Reject] = ()) -> None:
        """Write a part and put it safely on disk.

        Args:
            records: the good samples among the sources of this part, in order.
            sources: how many sources are done with this part, bad ones included: `self.sources` after a resume.
            rejects: the bad ones.

        Raises:
            ValueError: a sample does not fit into a page.
            OSError: the disk is full; what was written before stays resumable.
        """
        rows = []
        for record in records:
            size = len(record.payload)
            if size > self._page_size:
                raise ValueError(
                    f"{record.name}: {size:,} bytes do not fit into a page of {self._page_size:,}; "
                    "shrink images (max_size) or store them as JPEG"
                )
            left = self._page_size - self._end % self._page_size
            if size > left:
                self._file.write(bytes(left))
                self._end += left
            checksum = zlib.crc32(record.payload.data)
            rows.append(
                [record.label, record.mode, record.height, record.width, self._end, size, record.name, checksum]
            )
            self._file.write(record.payload.data)
            self._end += size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._digest = chain(self._digest, (record.payload.data for record in records))
        bad = [[reject.position, reject.name, reject.reason] for reject in rejects]
        part = {"sources": sources, "end": self._end, "digest": self._digest, "rows": rows, "rejects": bad}
        self._journal.append(part)
        self.sources = sources

    def rejects(self) -> Iterator[Reject]:
        """All samples that could not be stored so far."""
        for part in self._journal.read():
            yield from map(Reject.of, part["rejects"])

    def finish(self, classes: Sequence[str]) -> DatasetIndex:
        """Write metadata, table and header, then index, rejects and manifest, and give the file its final name.

        Raises ValueError if there is not one sample.
        """
        # part by part into arrays: rows of Python numbers would take ten times the memory
        parts = [np.array([row[:6] for row in part["rows"]], np.int64) for part in self._journal.read()]
        names = [row[6] for part in self._journal.read() for row in part["rows"]]
        if not names:
            raise ValueError(f"{self._path}: no samples to write")
        rows = (row for part in self._journal.read() for row in part["rows"])
        checksums = np.fromiter(map(self._checksum, rows), np.uint32, len(names))
        assert len(names) <= self._capacity
        labels, modes, heights, widths, pointers, sizes = np.concatenate([part for part in parts if len(part)]).T
        self._file.write(bytes(-self._end % self._page_size))
        table = np.zeros(len(names), self._types.ALLOC_TABLE_TYPE)
        table["sample_id"], table["ptr"], table["size"] = np.arange(len(names)), pointers, sizes
        table_start = self._file.tell()
        self._file.write(table.tobytes())

        metadata = np.zeros(len(names), self._metadata_type)
        image = metadata["f0"]
        image["mode"], image["height"], image["width"], image["data_ptr"] = modes, heights, widths, pointers
        metadata["f1"] = labels
        self._file.seek(0)
        self._file.write(self._header(len(names), table_start) + self._descriptors() + metadata.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = DatasetIndex(
            classes=tuple(classes),
            labels=labels.copy(),
            sizes=np.stack([heights, widths], 1).astype(np.int32),
            names=names,
            offsets=pointers.copy(),
            lengths=sizes.copy(),
            checksums=checksums,
        )
        folder = index_folder(self._path)
        index.save(folder)
        rejected = write_rejects(folder, self.rejects())
        write_manifest(
            folder, index, self._settings, rejected=rejected, raw=int((modes == RAW).sum()), data=self._digest
        )
        self._partial.replace(self._path)
        self._journal.remove()
        return index

    def _checksum(self, row: list[Any]) -> int:
        """CRC-32 of a sample's bytes, by its row in the journal. Version 0.1.0 noted none: then from the file."""
        if len(row) > 7:
            return int(row[7])
        return zlib.crc32(os.pread(self._file.fileno(), row[5], row[4]))

    def _header(self, count: int, table_start: int) -> bytes:
        header = np.zeros(1, self._types.HeaderType)
        header["version"], header["num_samples"] = self._types.CURRENT_VERSION, count
        header["num_fields"], header["page_size"] = 2, self._page_size
        header["alloc_table_ptr"] = table_start
        return header.tobytes()

    def _descriptors(self) -> bytes:
        type_ids = {handler: number for number, handler in self._types.TYPE_ID_HANDLER.items()}
        descriptors = np.zeros(2, self._types.FieldDescType)
        for row, (name, field) in enumerate(zip((IMAGE, LABEL), self._fields(), strict=True)):
            descriptors[row]["type_id"] = type_ids[type(field)]
            descriptors[row]["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            descriptors[row]["arguments"][:] = np.frombuffer(field.to_binary().tobytes(), np.uint8)
        return descriptors.tobytes()

    def close(self) -> None:
        """Leave an unfinished file to be resumed."""
        self._file.close()
