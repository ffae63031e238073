"""The dataset index: what a loader must know of every sample before it reads one.

A sample's id is its row here: labels, stored height and width, name, and where its bytes lie. The id
never changes for a dataset; the digest names the whole and guards every teacher cache built on it.
On disk an index is a folder of index.json (written last), labels.npy, sizes.npy, names.txt and, for
container files, offsets.npy and lengths.npy. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.files import replace_file, write_json

FORMAT = "fastdcd-index-1"


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """All samples of a dataset, by id (their row).

    Attributes:
        classes: class names; a label is a position here.
        labels: int64 [N].
        sizes: int32 [N, 2], height and width of the image as stored, before any EXIF rotation.
        names: one relative path a sample, for messages and for reading single files.
        offsets, lengths: int64 [N], where a sample's bytes lie in its container file; None if it has none.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    names: Sequence[str]
    offsets: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None

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

    def save(self, folder: Path) -> None:
        """Write the index into `folder`; index.json last, so that a half-written index is never opened."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any] | None] = {
            "labels": self.labels,
            "sizes": self.sizes,
            "offsets": self.offsets,
            "lengths": self.lengths,
        }
        for name, array in arrays.items():
            if array is not None:
                with replace_file(folder / f"{name}.npy") as file:
                    np.save(file, array, allow_pickle=False)
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
        path = folder / "index.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no index.json; expected a folder written by tools/convert.py")
        damaged = f"{folder}: the index is damaged or cut off"
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{damaged} ({path.name}: {error}); convert the dataset again") from None
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {description.get('format')!r}, expected {FORMAT!r}; convert the dataset again"
            )
        try:
            arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in description["arrays"]}
        except (ValueError, EOFError) as error:
            raise ValueError(f"{damaged} ({error}); convert the dataset again") from None
        names = (folder / "names.txt").read_text(encoding="utf-8").split("\n") if description["count"] else []
        if len(names) != description["count"]:
            raise ValueError(f"{damaged} (names.txt); convert the dataset again")
        index = cls(classes=tuple(description["classes"]), names=names, **arrays)
        if index.digest != description["digest"]:
            raise ValueError(f"{damaged} (digest mismatch); convert the dataset again")
        return index
