"""The dataset index: what a loader must know of every sample before it reads one.

A sample's id is its row here: labels, stored height and width, name, and where its bytes lie. The id
never changes for a dataset; the digest names the whole and guards every teacher cache built on it.
On disk an index is a folder of index.json (written last), labels.npy, sizes.npy, names.txt and, for
container files, offsets.npy and lengths.npy. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pipelines.files import replace_file, write_json

FORMAT = "fastdcd-index-1"
# What torchvision's ImageFolder accepts (torchvision.datasets.folder.IMG_EXTENSIONS).
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])
# Folders that hold sets of samples rather than classes: a folder or archive of these is several datasets.
SETS = frozenset(["train", "training", "val", "valid", "validation", "test"])


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
            description = json.loads(path.read_text())
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
        names = (folder / "names.txt").read_text().split("\n") if description["count"] else []
        if len(names) != description["count"]:
            raise ValueError(f"{damaged} (names.txt); convert the dataset again")
        index = cls(classes=tuple(description["classes"]), names=names, **arrays)
        if index.digest != description["digest"]:
            raise ValueError(f"{damaged} (digest mismatch); convert the dataset again")
        return index


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a file of one name a line, in label order (the first word of each line)."""
    lines = [line.split() for line in path.read_text().splitlines()]
    classes = tuple(words[0] for words in lines if words)
    if not classes:
        raise ValueError(f"{path}: no class names in it; expected one a line, in label order")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path}: a class name stands in it twice")
    return classes


def list_image_folder(root: Path, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], list[str]]:
    """Class names and relative image paths of an ImageFolder tree (root/class/**/image), sorted.

    Without `classes`, the class folders in sorted order are the classes, as in torchvision's ImageFolder.
    With it, labels follow that list, which may name classes the tree lacks.

    Raises ValueError for a missing tree, one without class folders, one of sets (train/, val/), an empty class
    folder, or a class folder that `classes` does not list.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected class folders of images (root/class/image.jpg)")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if not folders:
        raise ValueError(f"{root}: no class folders in it; expected root/class/image.jpg")
    if SETS.issuperset(folders):
        choices = " or ".join(str(root / name) for name in folders)
        raise ValueError(f"{root}: holds {' and '.join(folders)}, not classes; choose: {choices}")
    unknown = sorted(set(folders) - set(classes or folders))
    if unknown:
        raise ValueError(
            f"{root}: class folder {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes"
        )
    names: list[str] = []
    for folder in folders:
        found = sorted(_images_below(root / folder, folder))
        if not found:
            raise ValueError(
                f"{root / folder}: no images in this class folder; add some or remove the folder "
                f"(accepted: {' '.join(sorted(IMAGE_SUFFIXES))})"
            )
        names += found
    return tuple(classes or folders), names


def _images_below(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _images_below(Path(entry.path), f"{prefix}/{entry.name}")
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            if "\n" in entry.name:
                raise ValueError(f"{entry.path!r}: a line break in a file name; rename the file")
            yield f"{prefix}/{entry.name}"


def index_image_folder(
    root: Path, *, classes: Sequence[str] | None = None, cache: Path | None = None, threads: int = 8
) -> DatasetIndex:
    """Index an ImageFolder tree; ids follow the sorted paths. Reads each image's header for its size.

    Args:
        root: root/class/**/image.
        classes: class names in label order; sorted folder names if None.
        cache: folder to keep the index in; used again as long as names and file sizes are the same.
        threads: header readers (the work waits for storage).

    Raises:
        ValueError: the tree is not an ImageFolder, or a file in it is not an image.
    """
    names_of_classes, names = list_image_folder(root, classes)
    signature = hashlib.blake2b(digest_size=16)
    signature.update("\n".join(names_of_classes).encode() + b"\0")
    for name in names:
        signature.update(f"{name}\t{(root / name).stat().st_size}\n".encode())
    entry = cache / signature.hexdigest() if cache else None
    if entry and (entry / "index.json").is_file():
        return DatasetIndex.load(entry)

    label_of = {name: label for label, name in enumerate(names_of_classes)}
    sizes = np.empty((len(names), 2), np.int32)
    with ThreadPoolExecutor(threads) as pool:
        read = pool.map(lambda name: _stored_size(root / name), names)
        for row, size in enumerate(tqdm(read, f"index {root.name}", len(names), disable=None, unit="img")):
            sizes[row] = size
    labels = np.array([label_of[name.split("/", 1)[0]] for name in names], np.int64)
    index = DatasetIndex(classes=names_of_classes, labels=labels, sizes=sizes, names=names)
    if entry:
        index.save(entry)
    return index


def _stored_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable image ({_first_line(error)}); repair or remove it") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def user_cache() -> Path:
    """Where indexes of image folders are kept: $XDG_CACHE_HOME/fastdcd, by default ~/.cache/fastdcd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcd" / "indexes"
