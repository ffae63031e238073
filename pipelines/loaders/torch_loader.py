"""The torchvision executor: decode and resize as tensors in worker processes.

Reads an ImageFolder tree. JPEGs are decoded by torchvision.io, the rest by Pillow;
both give the same pixels for a JPEG (docs of the file formats: see docs/backends.md). EXIF rotation is
not applied, as in torchvision's ImageFolder. Resizing is torchvision's antialiased bilinear.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines import versions
from pipelines.base import Batch, DecodeError, Loader, LoaderOptions
from pipelines.files import path_of, read_file
from pipelines.image_folder import index_image_folder
from pipelines.images import decode, render
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled.
FINGERPRINT = {"backend": "torch", "decode": "torchvision.io", "resize": "bilinear, antialiased, uint8"}


class _Request(NamedTuple):
    """One batch to make: all a worker needs to know, so that workers hold no state of an epoch."""

    ids: NDArray[np.int64]
    views: list[tuple[NDArray[np.int32], NDArray[np.bool_], int]]  # boxes [n, 4], flips [n], size


class TorchLoader(Loader):
    """Executes plans over an ImageFolder with torchvision in worker processes."""

    backend = "torch"

    def __init__(self, root: Path, index: DatasetIndex, options: LoaderOptions) -> None:
        self.index, self._options = index, options
        self._requests = _Requests()
        self._loader = DataLoader(
            _Executor(root, index),
            batch_size=None,  # a request is a whole batch: one worker decodes it, no collation
            sampler=self._requests,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            pin_memory=options.device.type == "cuda",
        )

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        index = index_image_folder(
            path,
            classes=options.classes,
            cache=options.index_cache,
            on_decode_error=options.on_decode_error,
        )
        return cls(path, index, options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return FINGERPRINT

    @property
    def environment(self) -> Mapping[str, str]:
        return versions.installed("torchvision", "pillow")  # each brings its own libjpeg-turbo

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        self._requests.rank_plan = rank_plan
        for images, labels, ids, errors in self._loader:
            for error in errors:
                self._handle(error, self._options)
            yield Batch(images=tuple(images), labels=labels, ids=ids)

    def close(self) -> None:
        super().close()
        iterator = self._loader._iterator  # persistent workers live as long as this iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None


class _Requests(Sampler[_Request]):
    """The batches of the current epoch, as the sampler of a DataLoader that outlives epochs."""

    rank_plan: RankPlan | None = None

    def __iter__(self) -> Iterator[_Request]:
        rank_plan = self.rank_plan
        assert rank_plan is not None
        for number in range(rank_plan.batches):
            rows = rank_plan.rows(number)
            if len(rank_plan.ids[rows]):
                views = [(r.boxes[rows], r.flips[rows], r.size) for r in rank_plan.crops]
                yield _Request(rank_plan.ids[rows], views)


# Renderings, labels, ids, and what could not be decoded. Errors travel as values: a DataLoader turns an
# exception with more than one argument into a RuntimeError that has lost the sample's id.
_Made = tuple[list[Tensor], Tensor, Tensor, list[DecodeError]]


class _Executor(Dataset[_Made]):
    def __init__(self, root: Path, index: DatasetIndex) -> None:
        self._root, self._index = root, index

    def __getitem__(self, request: _Request) -> _Made:
        ids, views = request
        images = [torch.empty(len(ids), size, size, 3, dtype=torch.uint8) for _, _, size in views]
        errors: list[DecodeError] = []
        for row, sample_id in enumerate(ids):
            try:
                image = self._decode(int(sample_id))
            except DecodeError as error:
                errors.append(error)
                image = torch.zeros(3, *self._index.sizes[sample_id].tolist(), dtype=torch.uint8)
            for out, (boxes, flips, size) in zip(images, views, strict=True):
                out[row] = render(image, boxes[row], bool(flips[row]), size).permute(1, 2, 0)
        labels = torch.from_numpy(self._index.labels[ids])
        return [image.permute(0, 3, 1, 2) for image in images], labels, torch.from_numpy(ids), errors

    def _decode(self, sample_id: int) -> Tensor:
        name = self._index.names[sample_id]
        try:
            image = decode(read_file(path_of(self._root, name)))
        except (OSError, ValueError) as error:
            raise DecodeError(sample_id, name, str(error).splitlines()[0]) from None
        stored = tuple(self._index.sizes[sample_id])
        if tuple(image.shape[1:]) != stored:
            raise DecodeError(
                sample_id,
                name,
                f"it is {image.shape[1]}x{image.shape[2]} pixels now and was {stored[0]}x{stored[1]} when the "
                "index was made: it has been replaced; a new start makes the index anew",
            )
        return image
