"""Resident datasets: an index and images.npy, uint8 [N, H, W, 3], in one folder."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.formats.checked import read_array
from pipelines.index import DatasetIndex

IMAGES = "images.npy"


def read_resident(path: Path) -> tuple[DatasetIndex, NDArray[np.uint8]]:
    """Open a resident dataset: its index and its pixels, in memory.

    Raises ValueError if it is none, or not as it was written.
    """
    if not (path / IMAGES).is_file():
        raise ValueError(
            f"{path}: not a resident dataset (no {IMAGES}); make one: python tools/convert.py resident {path} OUT"
        )
    index = DatasetIndex.load(path)
    # read, not mapped: a first epoch that waits for storage page by page would look like a slow trainer
    images = read_array(path / IMAGES, np.uint8, (len(index), None, None, 3), "copy or convert it again")
    if (index.sizes != images.shape[1:3]).any():
        raise ValueError(f"{path / IMAGES}: its sizes are not those of its index; copy or convert both again")
    damaged = damaged_images(index, images)
    if len(damaged):
        names = ", ".join(index.names[sample] for sample in damaged[:3])
        raise ValueError(
            f"{path / IMAGES}: {len(damaged):,} of {len(index):,} images fail their checksum ({names}"
            f"{', ...' if len(damaged) > 3 else ''}); copy or convert it again"
        )
    return index, images


def damaged_images(index: DatasetIndex, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The images whose checksum differs from the index's: none if it has no checksums."""
    if index.checksums is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(checksums(images) != index.checksums)


def checksums(images: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 [N] of images uint8 [N, H, W, 3]."""
    return np.fromiter((zlib.crc32(image) for image in images), np.uint32, len(images))
