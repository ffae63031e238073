"""Data sets as they are published: a training and a test set from one folder, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.formats.resident import IMAGES
from pipelines.index import DatasetIndex
from pipelines.loaders.resident_loader import ResidentLoader


class Pair(NamedTuple):
    """Loaders of the same classes. Close both."""

    train: Loader
    test: Loader


class Layout(NamedTuple):
    """One way to lay out a data set."""

    description: str
    recognised: Callable[[Path], bool]
    open: Callable[[Path, LoaderOptions], Pair]


def open_pair(path: Path, options: LoaderOptions) -> Pair:
    """The training and test set in the folder `path`. Labels of both follow the training set's classes.

    Raises ValueError if its layout is none of LAYOUTS, or if its files are not what the layout says.
    """
    for layout in LAYOUTS:
        if layout.recognised(path):
            return layout.open(path, options)
    known = ", ".join(layout.description for layout in LAYOUTS)
    raise ValueError(f"{path}: {'not a known layout' if path.is_dir() else 'no such folder'}; expected {known}")


# ---- STL-10: binary files of 96x96 images (Coates, Ng, Lee 2011)

_STL10_SHAPE = (3, 96, 96)  # channel, column, row: stored column by column


def _stl10_root(path: Path) -> Path:
    inner = path / "stl10_binary"  # what the archive unpacks to
    return inner if inner.is_dir() else path


def _stl10_recognised(path: Path) -> bool:
    return (_stl10_root(path) / "train_X.bin").is_file()


def _stl10(path: Path, options: LoaderOptions) -> Pair:
    root = _stl10_root(path)
    classes = tuple((root / "class_names.txt").read_text(encoding="utf-8").split())
    return Pair(*(_stl10_part(root, part, classes, options) for part in ("train", "test")))


def _stl10_part(root: Path, part: str, classes: tuple[str, ...], options: LoaderOptions) -> Loader:
    labels = np.fromfile(root / f"{part}_y.bin", np.uint8).astype(np.int64) - 1  # stored from 1
    pixels = np.fromfile(root / f"{part}_X.bin", np.uint8)
    if pixels.size != len(labels) * np.prod(_STL10_SHAPE):
        raise ValueError(
            f"{root / part}_X.bin: got {pixels.size} bytes, expected {len(labels)} images of 96x96 as {part}_y.bin "
            "says; unpack the archive again"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"{root / part}_y.bin: expected labels from 1 to {len(classes)}; unpack the archive again"
        )
    images: NDArray[np.uint8] = np.ascontiguousarray(pixels.reshape(-1, *_STL10_SHAPE).transpose(0, 3, 2, 1))
    index = DatasetIndex(
        classes=classes,
        labels=labels,
        sizes=np.full((len(labels), 2), 96, np.int32),
        names=[f"{part}/{number:05d}" for number in range(len(labels))],
    )
    return ResidentLoader(index, images, options.device)


# ---- two folders of one format


def _test_folder(path: Path) -> Path:
    return next((path / name for name in ("val", "test") if (path / name).is_dir()), path / "val")


def _two_folders(path: Path) -> bool:
    return (path / "train").is_dir() and _test_folder(path).is_dir()


def _resident_recognised(path: Path) -> bool:
    return _two_folders(path) and (path / "train" / IMAGES).is_file()


def _same_classes(backend: str) -> Callable[[Path, LoaderOptions], Pair]:
    def open_both(path: Path, options: LoaderOptions) -> Pair:
        train = open_loader(backend, path / "train", options)
        try:
            return Pair(
                train, open_loader(backend, _test_folder(path), replace(options, classes=train.index.classes))
            )
        except ValueError:
            train.close()
            raise

    return open_both


LAYOUTS = (
    Layout("STL-10's binary files (train_X.bin)", _stl10_recognised, _stl10),
    Layout("a converted set (train/images.npy, val/images.npy)", _resident_recognised, _same_classes("resident")),
    Layout("class folders in train/ and val/ or test/, or Tiny ImageNet's", _two_folders, _same_classes("torch")),
)
