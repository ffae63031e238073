"""The loader of images as they are: class folders, and shards of tools/convert.py, on the CPU.

Whatever Pillow can open is shown as Pillow shows it (docs of the file formats: see docs/backends.md). EXIF rotation is
not applied, as in torchvision's ImageFolder. Resizing is torchvision's antialiased bilinear of uint8 tensors. Threads
and compiled code do it: see images/renderer.py.
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
from pipelines.formats.originals import open_originals
from pipelines.formats.stored import StoredSamples
from pipelines.images import versions
from pipelines.images.decode import decode
from pipelines.images.rendered_loader import RenderedLoader
from pipelines.images.renderer import StoredImages
from pipelines.index import DatasetIndex

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled. The pixels of
# Pillow and TurboJPEG are torchvision.io's.
FINGERPRINT = {"backend": "torch", "decode": "torchvision.io", "resize": "bilinear, antialiased, uint8"}


class TorchLoader(RenderedLoader):
    """Executes plans over an ImageFolder or a folder of shards."""

    backend = "torch"

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        index, samples = open_originals(path, options)
        return cls(index, _Images(samples, index), options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        if self.index.lengths is None:
            return FINGERPRINT
        # of the encoded lengths: another JPEG quality is another data set
        lengths = self.index.lengths.astype("<i8").tobytes()
        return {**FINGERPRINT, "stored": hashlib.blake2b(lengths, digest_size=16).hexdigest()}

    @property
    def environment(self) -> Mapping[str, str]:
        return versions.installed("torchvision", "pillow")  # each brings its own libjpeg-turbo


class _Images:
    """The stored images by id (a rendering.Source)."""

    def __init__(self, samples: StoredSamples, index: DatasetIndex) -> None:
        self._samples, self._index = samples, index

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        return StoredImages.joined([self._read(sample_id) for sample_id in ids.tolist()])

    def _read(self, sample_id: int) -> memoryview:
        try:
            return self._samples.read(sample_id).data
        except (OSError, ValueError):
            return memoryview(b"")  # `decode` says why

    def decode(self, sample_id: int, data: bytes) -> Tensor:
        name, stored = self._index.names[sample_id], tuple(self._index.sizes[sample_id].tolist())
        try:
            image = decode(data or self._samples.read(sample_id).tobytes())
        except (OSError, ValueError) as error:
            raise DecodeError(sample_id, name, str(error).splitlines()[0]) from None
        if tuple(image.shape[1:]) != stored:
            raise DecodeError(
                sample_id,
                name,
                f"it is {image.shape[1]}x{image.shape[2]} pixels now and was {stored[0]}x{stored[1]} when the "
                "index was made: it has been replaced; start again to rebuild the index",
            )
        return image

    def close(self) -> None:
        self._samples.close()
