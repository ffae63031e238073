"""The executor of images as they are: class folders, and shards of tools/convert.py, on the CPU.

Whatever Pillow can open is shown as Pillow shows it (docs of the file formats: see docs/backends.md). EXIF rotation is
not applied, as in torchvision's ImageFolder. Resizing is torchvision's antialiased bilinear of uint8 tensors. Threads
and compiled code do it: see rendering.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import versions
from pipelines.base import Batch, DecodeError, Loader, LoaderOptions
from pipelines.files import path_of, read_file
from pipelines.formats.shards import INDEX, ShardReader
from pipelines.image_folder import index_image_folder, same_classes
from pipelines.images import decode
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan
from pipelines.rendering import Renderer, StoredImages

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled. The pixels of
# TurboJPEG are torchvision.io's.
FINGERPRINT = {"backend": "torch", "decode": "torchvision.io", "resize": "bilinear, antialiased, uint8"}


class TorchLoader(Loader):
    """Executes plans over an ImageFolder or a folder of shards."""

    backend = "torch"

    def __init__(self, store: _Store, options: LoaderOptions) -> None:
        self.index, self._store, self._options = store.index, store, options
        self._labels = torch.from_numpy(store.index.labels)
        self._renderer = Renderer(store, store.index.sizes, workers=options.workers, device=options.device)

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        if (path / INDEX / "index.json").is_file():
            reader = ShardReader(path)
            if not same_classes(options.classes, reader.index.classes):
                raise ValueError(f"{path}: its classes differ from the list given; convert again with --classes")
            return cls(_Shards(reader), options)
        if any(path.glob("shard-*.tar")):
            raise ValueError(f"{path}: shards without an index; finish: python tools/convert.py shards SRC {path}")
        index = index_image_folder(
            path,
            classes=options.classes,
            cache=options.index_cache,
            on_decode_error=options.on_decode_error,
        )
        return cls.of_folder(path, index, options)

    @classmethod
    def of_folder(cls, root: Path, index: DatasetIndex, options: LoaderOptions) -> Self:
        """Execute plans over the files of `index`, whose names are relative to `root`."""
        return cls(_Folder(root, index), options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {**FINGERPRINT, **self._store.fingerprint}

    @property
    def environment(self) -> Mapping[str, str]:
        return versions.installed("torchvision", "pillow")  # each brings its own libjpeg-turbo

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        batches = self._renderer.run(rank_plan)
        try:
            for rendered in batches:
                for error in rendered.errors:
                    self._handle(error, self._options)
                yield Batch(images=rendered.images, labels=self._labels[rendered.ids], ids=rendered.ids)
        finally:
            batches.close()

    def close(self) -> None:
        super().close()
        self._renderer.close()
        self._store.close()


class _Store:
    """Encoded images by id (a rendering.Source)."""

    fingerprint: Mapping[str, str] = {}

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        raise NotImplementedError

    def decode(self, sample_id: int, data: bytes) -> Tensor:
        name, stored = self.index.names[sample_id], tuple(self.index.sizes[sample_id].tolist())
        try:
            image = decode(data or self._again(sample_id))
        except (OSError, ValueError) as error:
            raise DecodeError(sample_id, name, str(error).splitlines()[0]) from None
        if tuple(image.shape[1:]) != stored:
            raise DecodeError(
                sample_id,
                name,
                f"it is {image.shape[1]}x{image.shape[2]} pixels now and was {stored[0]}x{stored[1]} when the "
                "index was made: it has been replaced; a new start makes the index anew",
            )
        return image

    def _again(self, sample_id: int) -> bytes:
        """What could not be read. Raises OSError or ValueError with the reason."""
        raise ValueError("an empty file")

    def close(self) -> None:
        pass


class _Folder(_Store):
    def __init__(self, root: Path, index: DatasetIndex) -> None:
        super().__init__(index)
        self._root = root

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        return StoredImages.joined([memoryview(self._read(sample_id)) for sample_id in ids.tolist()])

    def _read(self, sample_id: int) -> bytes:
        try:
            return self._again(sample_id)
        except (OSError, ValueError):
            return b""  # `decode` says why

    def _again(self, sample_id: int) -> bytes:
        return read_file(path_of(self._root, self.index.names[sample_id]))


class _Shards(_Store):
    def __init__(self, reader: ShardReader) -> None:
        super().__init__(reader.index)
        self._reader = reader
        assert reader.index.lengths is not None
        # of the encoded lengths: another JPEG quality is another data set
        lengths = reader.index.lengths.astype("<i8").tobytes()
        self.fingerprint = {"stored": hashlib.blake2b(lengths, digest_size=16).hexdigest()}

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        return StoredImages.joined([each.data for each in self._reader(ids)])

    def close(self) -> None:
        self._reader.close()
