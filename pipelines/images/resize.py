"""The resize that every cache and every loader is held to: antialiased bilinear, in integers, on any processor.

It is ATen's resize of uint8 images (UpSampleKernel.cpp, after Pillow's Resample.c): a triangle filter whose support
grows when shrinking, its weights rounded to 16 bits, along the width first, rounded in between. In integers no
processor rounds otherwise than another. torchvision takes this resize on some processors only: on an x86 without AVX2
it resizes in float32, and its bytes differ.

`resize_reference` defines the bytes, and tests/test_resize.py pins them. `resize` gives the same ones faster.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

# Bits after the binary point of a weight, at most. For each axis there are as many as 16-bit weights can hold.
MAX_BITS = 22


def filter_weights(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """The triangle filter that resizes `length` pixels to `size`.

    Returns:
        first: int64 [size], the first pixel that each output pixel is made of.
        weights: int32 [size, taps], of that pixel and those after it; 0 where there is none.
        bits: how many bits of a weight are after the binary point.
    """
    scale = length / size
    support = max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    # not rounded but cut, as C does; a negative start is pixel 0
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), length)
    taps = np.arange(int((end - first).max()))
    exact = np.maximum(1.0 - np.abs((taps + first[:, None] - centre[:, None] + 0.5) / support), 0.0)
    exact[taps >= (end - first)[:, None]] = 0.0
    # cumsum adds from left to right; the order of sum() depends on the processor
    exact /= np.cumsum(exact, axis=1)[:, -1:]
    largest = float(exact.max())
    bits = 0
    while bits < MAX_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, (0.5 + exact * (1 << bits)).astype(np.int32), bits


def resize_reference(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, H, W] to [3, size, size]: in NumPy's integers, the same bytes everywhere."""
    pixels = image.numpy()
    return torch.from_numpy(_resize_rows(_resize_rows(pixels, size).swapaxes(1, 2), size).swapaxes(1, 2).copy())


def _resize_rows(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize the last axis of uint8 [C, H, W] to `size`."""
    first, weights, bits = filter_weights(pixels.shape[2], size)
    total = np.full((*pixels.shape[:2], size), 1 << (bits - 1), np.int32)
    for tap in range(weights.shape[1]):
        total += pixels[:, :, np.minimum(first + tap, pixels.shape[2] - 1)] * weights[:, tap]
    return (total >> bits).astype(np.uint8)


def resize(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, H, W] to [3, size, size], as resize_reference does."""
    if min(*image.shape[1:], size) > 1 and _aten_gives_the_same():  # ATen's AVX2 code fails on single pixels
        return _resize_aten(image, size)
    return resize_reference(image, size)


def _resize_aten(image: Tensor, size: int) -> Tensor:
    return interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


@cache
def _aten_gives_the_same() -> bool:
    """Whether ATen gives the reference's bytes for images of several shapes: a tenth of a second, once per process.

    It has code of its own for each kind of processor, and a later version may round otherwise.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (3, 512, 512), np.uint8)
    for height, width, size in ((512, 512, 224), (37, 411, 224), (300, 97, 160), (224, 500, 32), (71, 64, 128)):
        crop = torch.from_numpy(pixels[:, :height, :width])
        for image in (crop.contiguous(), crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            if not torch.equal(_resize_aten(image, size), resize_reference(image, size)):
                return False
    return True
