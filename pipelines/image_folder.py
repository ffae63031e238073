"""Class folders of images (torchvision's ImageFolder layout): listing, indexing, class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pipelines.index import DatasetIndex

# What torchvision's ImageFolder accepts (torchvision.datasets.folder.IMG_EXTENSIONS).
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])


# Folders that hold sets of samples rather than classes: a folder or archive of these is several datasets.
SETS = frozenset(["train", "training", "val", "valid", "validation", "test"])


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
