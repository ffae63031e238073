"""The dataset index: what a loader must know of every sample before it reads one.

A sample's id is its row here: labels, stored height and width, name, and where its bytes lie. The id
never changes for a dataset; the digest names the whole and guards every teacher cache built on it.
On disk an index is a folder of index.json (written last), labels.npy, sizes.npy, names.txt and, for
container files, offsets.npy and lengths.npy; crc32.npy, where the samples' stored bytes were summed. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.files import read_file, replace_file, write_json
from pipelines.formats.checked import Record, read_array, read_record

FORMAT = "fastdcd-index-1"
CHECKSUMS = "crc32.npy"


class _Description(Record):
    """index.json."""

    format: str
    count: int
    digest: str
    arrays: list[Literal["labels", "sizes", "offsets", "lengths"]]
    classes: list[str]


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """All samples of a dataset, by id (their row).

    Attributes:
        classes: class names; a label is a position here.
        labels: int64 [N].
        sizes: int32 [N, 2], height and width of the image as stored, before any EXIF rotation.
        names: one relative path a sample, for messages and for reading single files.
        offsets, lengths: int64 [N], where a sample's bytes lie in its container file; None if it has none.
        checksums: uint32 [N], CRC-32 of each sample's stored bytes; None if they were never summed (image folders,
            and what version 0.1.0 converted). No part of the digest.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    names: Sequence[str]
    offsets: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None
    checksums: NDArray[np.uint32] | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        assert self.sizes.shape == (count, 2) and len(self.names) == count

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over classes, labels, stored sizes and names: equal for equal sets of samples."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\n".join(self.classes).encode() + b"\0")
        state.update(self.labels.astype("<i8").tobytes() + self.sizes.astype("<i4").tobytes())
        state.update("\n".join(self.names).encode())
        return state.hexdigest()

    @cached_property
    def pixels_digest(self) -> str | None:
        """32 hex digits over the checksums: other stored bytes, another digest. None without checksums."""
        if self.checksums is None:
            return None
        return hashlib.blake2b(self.checksums.astype("<u4").tobytes(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the index into `folder`; index.json last, so that a half-written index is never opened."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any] | None] = {
            "labels": self.labels,
            "sizes": self.sizes,
            "offsets": self.offsets,
            "lengths": self.lengths,
        }
        for name, array in [*arrays.items(), (CHECKSUMS.removesuffix(".npy"), self.checksums)]:
            if array is not None:
                with replace_file(folder / f"{name}.npy") as file:
                    np.save(file, array, allow_pickle=False)
        if self.checksums is None:
            (folder / CHECKSUMS).unlink(missing_ok=True)  # of another dataset
        with replace_file(folder / "names.txt") as file:
            file.write("\n".join(self.names).encode())
        description = {
            "format": FORMAT,
            "count": len(self),
            "digest": self.digest,
            "arrays": [name for name, array in arrays.items() if array is not None],
            "classes": list(self.classes),
        }
        write_json(folder / "index.json", description)

    @classmethod
    def load(cls, folder: Path) -> DatasetIndex:
        """Open an index written by `save`. Raises ValueError if it is missing, damaged or of another format."""
        path, fix = folder / "index.json", "convert the dataset again"
        if not path.is_file():
            raise ValueError(f"{folder}: no index.json; expected a folder written by tools/convert.py")
        found = read_record(path, _Description, fix)
        if found.format != FORMAT:
            raise ValueError(f"{path}: format {found.format!r}, expected {FORMAT!r}; {fix}")
        damaged = f"{folder}: the index is damaged or cut off"
        if found.count < 0 or not {"labels", "sizes"}.issubset(found.arrays):
            raise ValueError(f"{damaged} ({path.name}: {found.count} samples, {found.arrays}); {fix}")
        kinds: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "labels": (np.int64, (found.count,)),
            "sizes": (np.int32, (found.count, 2)),
            "offsets": (np.int64, (found.count,)),
            "lengths": (np.int64, (found.count,)),
        }
        arrays: dict[str, NDArray[Any]]
        arrays = {name: read_array(folder / f"{name}.npy", *kinds[name], fix) for name in found.arrays}
        if (folder / CHECKSUMS).is_file():
            arrays["checksums"] = read_array(folder / CHECKSUMS, np.uint32, (found.count,), fix)
        try:
            names = read_file(folder / "names.txt", 1 << 32).decode().split("\n") if found.count else []
        except ValueError as error:
            raise ValueError(f"{damaged} (names.txt: {error}); {fix}") from None
        if len(names) != found.count:
            raise ValueError(f"{damaged} (names.txt: {len(names):,} names of {found.count:,} samples); {fix}")
        index = cls(classes=tuple(found.classes), names=names, **arrays)
        if index.digest != found.digest:
            raise ValueError(f"{damaged} (digest mismatch); {fix}")
        index._check_values(folder, fix)
        return index

    def _check_values(self, folder: Path, fix: str) -> None:
        """Raises ValueError for numbers that mean nothing, whoever wrote them."""
        if not len(self):
            return
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.classes):
            raise ValueError(
                f"{folder}: labels from {self.labels.min()} to {self.labels.max()}, expected 0 to "
                f"{len(self.classes) - 1}; {fix}"
            )
        if int(self.sizes.min()) < 1:
            raise ValueError(f"{folder}: images of {self.sizes.min()} pixels; {fix}")
        for name, array in (("offsets", self.offsets), ("lengths", self.lengths)):
            if array is not None and (int(array.min()) < 0 or int(array.max()) >= 1 << 62):
                raise ValueError(f"{folder}: {name} from {array.min()} to {array.max()}; {fix}")
