"""Writing a resident dataset: images.npy, uint8 [N, H, W, 3], and its index, from an ImageFolder tree."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.base import DecodeError
from pipelines.files import replace_file, write_json
from pipelines.index import DatasetIndex, index_image_folder
from pipelines.resident_loader import IMAGES
from pipelines.torch_loader import decode, render
from pipelines.views import Center

# Rows between two marks of progress: what a conversion that is killed has to do again.
BLOCK = 1024


def write_resident(
    source: Path,
    out: Path,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    limit: int | None = None,
    workers: int = 2,
) -> DatasetIndex:
    """Decode an ImageFolder tree into `out`. Killed at any moment, it goes on where it was when started again.

    Args:
        source: root/class/**/image.
        out: folder to make; an earlier, complete conversion of the same source is left as it is.
        classes: class names in label order; sorted folder names if None.
        size: resize the shorter side to this and crop the centre, pixels; None keeps images as they are.
        limit: keep this many samples, spread evenly over the sorted paths, so that classes stay balanced.
        workers: decoding threads.

    Raises ValueError: not an ImageFolder, images of several sizes without `size`, an image that cannot be
    decoded, or an `out` that holds something else.
    """
    stored = index_image_folder(source, classes=classes)
    if limit is not None and limit < len(stored):
        stored = _subset(stored, limit)
    index = replace(stored, sizes=np.full_like(stored.sizes, size)) if size else stored
    shape = _common_shape(index, source)
    if (out / "index.json").is_file():
        if DatasetIndex.load(out).digest == index.digest:
            return index  # finished earlier
        raise ValueError(f"{out}: another dataset is there; remove it or choose another folder")

    out.mkdir(parents=True, exist_ok=True)
    partial, progress = out / f"{IMAGES}.partial", out / f"progress-{index.digest}.npy"
    done = _resume(partial, progress, index, shape)
    images = np.lib.format.open_memmap(partial, mode="r+")
    todo = [row for row in range(len(index)) if not done[row]]
    bar = tqdm(
        desc=f"convert {source.name}", total=len(index), initial=len(index) - len(todo), unit="img", disable=None
    )
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(todo), BLOCK):
            rows = todo[start : start + BLOCK]
            for row, pixels in zip(
                rows, pool.map(lambda row: _pixels(source, stored, row, size), rows), strict=True
            ):
                images[row] = pixels
                bar.update()
            images.flush()  # pixels reach the disk before the mark that says so
            done[rows] = True
            _save(progress, done)
    bar.close()
    del images
    partial.replace(out / IMAGES)
    progress.unlink()
    counts = np.bincount(index.labels, minlength=len(index.classes))
    manifest = {
        "images": len(index),
        "height": shape[0],
        "width": shape[1],
        "index": index.digest,
        "images_a_class": dict(zip(index.classes, counts.tolist(), strict=True)),
    }
    write_json(out / "manifest.json", manifest)
    index.save(out)
    return index


def _subset(index: DatasetIndex, limit: int) -> DatasetIndex:
    rows = np.arange(limit) * len(index) // limit
    names = [index.names[row] for row in rows.tolist()]
    return replace(index, labels=index.labels[rows], sizes=index.sizes[rows], names=names)


def _common_shape(index: DatasetIndex, source: Path) -> tuple[int, int]:
    shapes = np.unique(index.sizes, axis=0)
    if len(shapes) > 1:
        raise ValueError(
            f"{source}: images of {len(shapes)} sizes, from {shapes[0][0]}x{shapes[0][1]} to "
            f"{shapes[-1][0]}x{shapes[-1][1]}; a resident dataset has one: give --size N"
        )
    return int(shapes[0][0]), int(shapes[0][1])


def _resume(partial: Path, progress: Path, index: DatasetIndex, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which rows an interrupted conversion has done; starts the file if there is none of this source."""
    if partial.is_file() and progress.is_file():
        return np.load(progress, allow_pickle=False)
    for old in partial.parent.glob("progress-*.npy"):
        old.unlink()
    wanted = (len(index), *shape, 3)
    np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=wanted).flush()
    done = np.zeros(len(index), np.bool_)
    _save(progress, done)
    return done


def _save(path: Path, array: NDArray[np.bool_]) -> None:
    with replace_file(path) as file:
        np.save(file, array, allow_pickle=False)


def _pixels(source: Path, stored: DatasetIndex, row: int, size: int | None) -> NDArray[np.uint8]:
    """One image as uint8 [H, W, 3]."""
    try:
        image = decode((source / stored.names[row]).read_bytes())  # [3, H, W]
    except (OSError, RuntimeError, ValueError) as error:
        raise DecodeError(row, stored.names[row], str(error).splitlines()[0]) from None
    if size:
        box, _ = Center(crop_ratio=1.0).boxes(0, np.array([row]), 0, stored.sizes[row : row + 1])
        image = render(image, box[0], False, size)
    return image.permute(1, 2, 0).numpy()
