"""Writing a resident dataset: images.npy, uint8 [N, H, W, 3], and its index.

Images are appended in order, with a journal, so that a killed conversion continues where it stopped.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.conversion.encode import Source
from pipelines.conversion.journal import Journal, Reject, chain, write_manifest, write_rejects
from pipelines.formats.resident import IMAGES
from pipelines.images.decode import Pixels, read_pixels, render
from pipelines.index import DatasetIndex
from pipelines.views import Center

_HEADER = 128  # bytes that NumPy's header takes for any array of images


@dataclass(frozen=True, kw_only=True)
class ResidentRecord:
    """One image: name and label as in Source, pixels uint8 [H, W, 3]."""

    name: str
    label: int
    pixels: Pixels


def encode_record(source: Source, position: int, size: int | None) -> ResidentRecord:
    """Decode an image; with `size`, resize its shorter side to that and crop the centre.

    Raises ValueError with the reason if it cannot be decoded.
    """
    pixels = read_pixels(source.data)
    if size:
        box, _ = Center(crop_ratio=1.0).boxes(0, np.array([0]), 0, np.array([pixels.shape[:2]], np.int32))
        image = render(torch.from_numpy(pixels).permute(2, 0, 1), box[0], False, size)
        pixels = image.permute(1, 2, 0).contiguous().numpy()
    return ResidentRecord(name=source.name, label=source.label, pixels=pixels)


class ResidentWriter:
    """Writes a resident dataset part by part, in order; a new writer on the same folder continues after the last."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Start or resume. Raises ValueError if an unfinished conversion with other `settings` is there."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings = folder, settings
        self._partial = folder / f".{IMAGES}.partial"
        self._journal = Journal(folder / f".{IMAGES}.journal", settings, fresh=not self._partial.exists())
        start: dict[str, Any] = {"sources": 0, "end": _HEADER, "digest": "", "shape": None, "first": ""}
        last = self._journal.parts[-1] if self._journal.parts else start
        self.sources, self._end, self._digest = last["sources"], last["end"], last["digest"]
        self._shape, self._first = last["shape"], last["first"]
        self._journal.parts.clear()
        self._partial.touch()
        self._file = self._partial.open("r+b")
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def append(self, records: Sequence[ResidentRecord], sources: int, rejects: Sequence[Reject] = ()) -> None:
        """Write a part and put it safely on disk: see BetonWriter.append.

        Raises ValueError if an image is of another size than those before it.
        """
        for record in records:
            height, width = record.pixels.shape[:2]
            if self._shape is None:
                self._shape, self._first = [height, width], record.name
            if self._shape != [height, width]:
                raise ValueError(
                    f"images of several sizes: {self._first} has {self._shape[0]}x{self._shape[1]} pixels, "
                    f"{record.name} {height}x{width}; a resident dataset has one: give --size N"
                )
            self._file.write(np.ascontiguousarray(record.pixels).data)
            self._end += record.pixels.size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._digest = chain(self._digest, (record.pixels.tobytes() for record in records))
        self._journal.append(
            {
                "sources": sources,
                "end": self._end,
                "digest": self._digest,
                "shape": self._shape,
                "first": self._first,
                "rows": [[record.label, record.name, zlib.crc32(record.pixels.tobytes())] for record in records],
                "rejects": [[reject.position, reject.name, reject.reason] for reject in rejects],
            }
        )
        self.sources = sources

    def rejects(self) -> Iterator[Reject]:
        """All samples that could not be stored so far."""
        for part in self._journal.read():
            yield from map(Reject.of, part["rejects"])

    def finish(self, classes: Sequence[str]) -> DatasetIndex:
        """Give the file its header and final name; write rejects, manifest and, last, the index.

        Raises ValueError if there is not one image.
        """
        rows = [row for part in self._journal.read() for row in part["rows"]]
        if not rows:
            raise ValueError(f"{self._folder}: no images to write")
        height, width = self._shape
        size = height * width * 3
        checksums = [self._checksum(row, _HEADER + size * number, size) for number, row in enumerate(rows)]
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (len(rows), height, width, 3)}
        )
        assert len(header.getvalue()) == _HEADER and self._end == _HEADER + len(rows) * height * width * 3
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = DatasetIndex(
            classes=tuple(classes),
            labels=np.array([row[0] for row in rows], np.int64),
            sizes=np.full((len(rows), 2), self._shape, np.int32),
            names=[row[1] for row in rows],
            checksums=np.array(checksums, np.uint32),
        )
        rejected = write_rejects(self._folder, self.rejects())
        # the journal stays until the end: with it, but without its data, a crash from here on starts over
        self._partial.replace(self._folder / IMAGES)
        shape = {"height": height, "width": width}
        index.save(self._folder)
        write_manifest(self._folder, index, self._settings, rejected=rejected, **shape, data=self._digest)
        self._journal.remove()
        return index

    def _checksum(self, row: list[Any], start: int, size: int) -> int:
        """CRC-32 of an image, by its row in the journal. Version 0.1.0 noted none: then from the file."""
        return int(row[2]) if len(row) > 2 else zlib.crc32(os.pread(self._file.fileno(), size, start))

    def close(self) -> None:
        """Leave an unfinished dataset to be resumed."""
        self._file.close()
