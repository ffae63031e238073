"""The FFCV loader: threads that decode and render a memory-mapped .beton, driven by the plan.

The file is FFCV's, and so is its reader; the loop is our own (images/renderer.py). FFCV's Loader cannot run a plan:
it draws its crops itself, hangs when its thread fails, hands out views of a ring that it overwrites, returns a damaged
JPEG as noise, and touches every GPU.

Sets larger than memory: pages of the mapped file belong to the system's page cache, which gives them up
when memory is short. The system then reads just the images of the batches in the making, asked for ahead: by itself
it reads what is around a page too, up to megabytes that nobody wants yet. With `order: paged` an epoch reads a bounded
window of the file at a time, the same window on every rank, so that slow storage is read nearly in sequence and once a
machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.base import DecodeError, LoaderOptions
from pipelines.files import fits_in_memory
from pipelines.formats.beton import BetonLayout, index_folder, read_layout
from pipelines.formats.stored import CHANGED, BetonSamples
from pipelines.image_folder import same_classes
from pipelines.images import versions
from pipelines.images.rendered_loader import RenderedLoader
from pipelines.images.renderer import StoredImages, turbojpeg
from pipelines.index import DatasetIndex

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled.
FINGERPRINT = {
    "backend": "ffcv",
    "decode": "turbojpeg, accurate DCT",
    "resize": "bilinear, antialiased, uint8",
}


class FFCVLoader(RenderedLoader):
    """Executes plans over a .beton file."""

    backend = "ffcv"

    def __init__(self, path: Path, layout: BetonLayout, index: DatasetIndex, options: LoaderOptions) -> None:
        super().__init__(index, _Beton(path, layout, index), options)
        stored = hashlib.blake2b(digest_size=16)
        for array in (layout.sizes, layout.raw, layout.lengths):
            stored.update(np.ascontiguousarray(array).tobytes())
        self._stored = stored.hexdigest()

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        if not path.is_file():
            raise ValueError(f"{path}: not a .beton file; make one: python tools/convert.py ffcv SRC OUT.beton")
        layout = read_layout(path)
        if turbojpeg() is None:
            raise ValueError(f"{path}: TurboJPEG is not found, which FFCV was built with; reinstall FFCV")
        return cls(path, layout, _read_index(path, layout, options), options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        # of the encoded lengths: another JPEG quality is another data set
        return {**FINGERPRINT, "stored": self._stored}

    @property
    def environment(self) -> Mapping[str, str]:
        return {"libjpeg-turbo": versions.loaded_turbojpeg()}  # the rest is our own kernel


class _Beton:
    """The images of a .beton by id (a rendering.Source)."""

    def __init__(self, path: Path, layout: BetonLayout, index: DatasetIndex) -> None:
        self._samples, self._layout, self._index = BetonSamples(path, layout, index.checksums), layout, index
        self._scarce = not fits_in_memory(self._samples.bytes)
        if self._scarce:
            self._samples.read_sample_by_sample()

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        layout = self._layout
        if self._scarce:
            self._samples.will_need(ids)
        changed = self._samples.damaged(ids)  # not shown: to the kernel they are JPEGs of no bytes
        lengths = np.where(changed, 0, layout.lengths[ids])
        return StoredImages(self._samples.maps[0], layout.pointers[ids], lengths, layout.raw[ids] & ~changed)

    def decode(self, sample_id: int, data: bytes) -> Tensor:
        """Of a JPEG that is not as the converter wrote it."""
        raise DecodeError(sample_id, self._index.names[sample_id], "its JPEG data is damaged" if data else CHANGED)

    def close(self) -> None:
        self._samples.close()


def _read_index(path: Path, layout: BetonLayout, options: LoaderOptions) -> DatasetIndex:
    """The index that the converter left, or one made from the file itself, whoever wrote it."""
    folder = index_folder(path)
    if folder.is_dir():
        index = DatasetIndex.load(folder)
        if not layout.is_of(index):
            raise ValueError(f"{folder}: belongs to another file than {path.name}; copy both, or delete it")
        if not same_classes(options.classes, index.classes):
            raise ValueError(f"{path}: its classes differ from the list given; convert again with --classes")
        return index
    classes = options.classes or tuple(str(label) for label in range(int(layout.labels.max()) + 1))
    if len(classes) <= int(layout.labels.max()) or int(layout.labels.min()) < 0:
        raise ValueError(
            f"{path}: labels from {layout.labels.min()} to {layout.labels.max()}, expected 0 to {len(classes) - 1}"
        )
    return DatasetIndex(
        classes=classes,
        labels=layout.labels,
        sizes=layout.sizes,
        names=[f"{path.name}#{sample}" for sample in range(len(layout.labels))],
    )
