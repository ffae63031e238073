"""How a source image becomes a stored one: decoded, shrunk, encoded. The same for every file format.

Odd files are settled here once, the way the torch loader reads originals: CMYK, grayscale and palette
images become RGB, transparency is dropped, a file's type is decided by its bytes, not its name, and an
EXIF rotation is not applied (torchvision's ImageFolder does not apply it either).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.images.decode import Pixels, is_upright_rgb_jpeg, read_pixels


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to store.

    Attributes:
        name: relative path or other name, for messages; without a line break.
        label: position in the list of classes.
        data: an encoded file (bytes), or decoded pixels uint8 [H, W, 3].
    """

    name: str
    label: int
    data: bytes | Pixels


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How to store images.

    Attributes:
        max_size: longest side of a stored image, pixels; larger ones are shrunk. None: as they are.
            FFCV's ImageNet recipe uses 500 or 400.
        quality: JPEG quality, 1 to 100 (FFCV's recipe: 90).
        jpeg: share of images stored as JPEG in a .beton, the others as raw pixels: larger, but nothing
            to decode (FFCV calls it compress_probability). Shards are all JPEG.
        seed: of the choice which images are JPEG.
    """

    max_size: int | None = 500
    quality: int = 90
    jpeg: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"max_size: got {self.max_size}, expected 1 or more pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: got {self.quality}, expected 1 to 100")
        if not 0 <= self.jpeg <= 1:
            raise ValueError(f"jpeg: got {self.jpeg}, expected a share from 0 to 1")


def shrink(pixels: Pixels, max_size: int | None) -> Pixels:
    """Average an image (box filter, as FFCV's writer) down to a longest side of `max_size`; never enlarge."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if max_size is None or longest <= max_size:
        return pixels
    size = (max(round(width * max_size / longest), 1), max(round(height * max_size / longest), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def encode_jpeg(source: Source, storage: Storage) -> tuple[bytes, int, int]:
    """Store an image as JPEG: bytes, height, width. A plain JPEG of the right size keeps its own bytes.

    Raises ValueError with the reason if the source cannot be decoded: every byte is decoded once.
    """
    pixels = read_pixels(source.data)
    height, width = pixels.shape[:2]
    fits = storage.max_size is None or max(height, width) <= storage.max_size
    if fits and isinstance(source.data, bytes) and is_upright_rgb_jpeg(source.data):
        return source.data, height, width
    pixels = shrink(pixels, storage.max_size)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=storage.quality)
    return file.getvalue(), *pixels.shape[:2]
