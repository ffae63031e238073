"""The resident loader: the whole set as one uint8 tensor on the device, augmented a batch at a time.

For CIFAR, Tiny ImageNet, STL-10 and anything else whose pixels fit beside the model. Reads a folder
written by `tools/convert.py resident`: an index and images.npy, uint8 [N, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.base import Batch, Loader, LoaderOptions
from pipelines.formats.resident import read_resident
from pipelines.image_folder import same_classes
from pipelines.index import DatasetIndex
from pipelines.plan import Crops, RankPlan

# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled.
FINGERPRINT = {"backend": "resident", "resize": "bilinear, antialiased, float32"}


class ResidentLoader(Loader):
    """Executes plans over images that stay on the device."""

    backend = "resident"

    def __init__(self, index: DatasetIndex, images: NDArray[np.uint8], device: torch.device) -> None:
        """Keep `images`, uint8 [N, H, W, 3], on `device`."""
        assert images.shape[0] == len(index) and images.shape[3] == 3
        self.index, self._device = index, device
        self._labels = torch.from_numpy(index.labels).to(device)
        self._images = torch.from_numpy(images).to(device)  # [N, H + 2 margin, W + 2 margin, 3]
        self._margin = 0

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        index, images = read_resident(path)
        if not same_classes(options.classes, index.classes):
            raise ValueError(f"{path}: its classes differ from the list given; convert again with --classes")
        return cls(index, images, options.device)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return FINGERPRINT

    @property
    def environment(self) -> Mapping[str, str]:
        return {"device": self._device.type}  # resizing sums in another order on a GPU

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        views = [self._prepare(each) for each in rank_plan.crops]
        ids = torch.from_numpy(rank_plan.ids)
        device_ids = ids.to(self._device)
        for number in range(rank_plan.batches):
            rows = rank_plan.rows(number)
            if len(ids[rows]):
                images = tuple(view(device_ids[rows], rows) for view in views)
                yield Batch(images=images, labels=self._labels[device_ids[rows]], ids=ids[rows])

    def close(self) -> None:
        super().close()
        self._images = self._images[:0].clone()

    def _prepare(self, each: Crops) -> _Crop | _Resize:
        """Move an epoch's boxes to the device once, and choose the exact crop where nothing is resized."""
        height, width = self.index.sizes[0]
        reach = _reach(each.boxes, height, width)
        if reach > self._margin:
            self._pad(reach)
        boxes = torch.from_numpy(each.boxes).to(self._device, torch.int64)  # [M, 4]
        boxes[:, :2] += self._margin
        flips = torch.from_numpy(each.flips).to(self._device)
        exact = bool((each.boxes[:, 2:] == each.size).all())
        return (_Crop if exact else _Resize)(self._images, boxes, flips, each.size)

    def _pad(self, margin: int) -> None:
        """Surround every image by `margin` black pixels, so that every box lies inside."""
        more = margin - self._margin
        self._images = torch.nn.functional.pad(self._images, (0, 0, more, more, more, more))
        self._margin = margin


def _reach(boxes: NDArray[np.int32], height: int, width: int) -> int:
    """How many pixels the boxes reach outside a [height, width] image, at most."""
    if not len(boxes):
        return 0
    bottom, right = boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    return int(max(0, -boxes[:, :2].min(), bottom.max() - height, right.max() - width))


class _Crop:
    """Boxes of the output's own size: every crop is a window of the padded images, copied once."""

    def __init__(self, images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> None:
        count, height, width, channels = images.shape
        per_image, per_row, per_pixel, _ = images.stride()
        # every window of every image: [N, tops, lefts, size, size * 3], without copying anything
        self._windows = images.as_strided(
            (count, height - size + 1, width - size + 1, size, size * channels),
            (per_image, per_row, per_pixel, per_row, 1),
        )
        self._tops, self._lefts = boxes[:, 0], boxes[:, 1]
        self._flips, self._size = flips, size

    def __call__(self, ids: Tensor, rows: slice) -> Tensor:
        where = (ids, self._tops[rows], self._lefts[rows])
        shape = (len(ids), self._size, self._size, 3)
        if ids.is_cuda:
            images = self._windows[where].view(shape)
            # everything mirrored, half of it kept: a mask would make the host wait for the device
            images = torch.where(self._flips[rows, None, None, None], images.flip(2), images)
        else:  # NumPy copies rows of pixels where torch copies bytes: twice as fast in all
            pixels = self._windows.numpy()[tuple(each.numpy() for each in where)].reshape(shape)
            flips = self._flips[rows].numpy()
            pixels[flips] = torch.from_numpy(pixels[flips]).flip(2).numpy()
            images = torch.from_numpy(pixels)
        return images.permute(0, 3, 1, 2)


class _Resize:
    """Boxes of any size: crop, antialiased bilinear resize and flip as two batched matrix products."""

    def __init__(self, images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> None:
        self._images, self._boxes, self._flips, self._size = images, boxes, flips, size

    def __call__(self, ids: Tensor, rows: slice) -> Tensor:
        boxes = self._boxes[rows]
        height, width = self._images.shape[1:3]
        vertical = resize_weights(boxes[:, 0], boxes[:, 2], height, self._size)  # [n, size, H]
        horizontal = resize_weights(boxes[:, 1], boxes[:, 3], width, self._size)  # [n, size, W]
        flips = self._flips[rows, None, None]
        horizontal = torch.where(flips, horizontal.flip(1), horizontal)
        images = self._images[ids].permute(0, 3, 1, 2).float()  # [n, 3, H, W]
        # torchvision resizes along the width first and rounds in between; so do we
        images = torch.matmul(images, horizontal.transpose(1, 2)[:, None]).round_()
        images = torch.matmul(vertical[:, None], images).round_()
        return images.to(torch.uint8)


def resize_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights [n, size, source] that crop [start, start + length) and resize it to `size`.

    The triangle filter of Pillow's and torchvision's antialiased bilinear resize: its support grows with
    the scale when shrinking, and it is normalised over the crop. start, length: int64 [n].
    """
    scale = length[:, None, None].float() / size  # [n, 1, 1]
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # [n, size, 1], in the crop
    position = torch.arange(source, device=start.device) - start[:, None, None]  # [n, 1, source], in the crop
    inside = (position >= 0) & (position < length[:, None, None])
    weights = (1 - (position + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(2, keepdim=True)
