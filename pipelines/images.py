"""Images: decode, crop and resize as the reference does, and what a JPEG's header says."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from pipelines.resize import resize

# torchvision.io knows these by their first bytes; everything else goes to Pillow.
_TORCHVISION_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")


def decode(data: bytes) -> Tensor:
    """Decode an encoded image to uint8 [3, H, W] RGB, without EXIF rotation.

    Raises RuntimeError, OSError or ValueError (of the decoding library) for damaged data.
    """
    if data.startswith(_TORCHVISION_MAGIC):
        # a copy, since torch wants writable memory
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        if image.ndim == 3 and image.dtype == torch.uint8:
            return image
    return decode_with_pillow(data)


def decode_with_pillow(data: bytes) -> Tensor:
    """The same by Pillow: slower, knows more formats, and the oracle that tests hold decoders against."""
    import io

    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def render(image: Tensor, box: NDArray[np.int32], flip: bool, size: int) -> Tensor:
    """Crop `box` (top, left, height, width) of uint8 [3, H, W], resize to [3, size, size], mirror."""
    top, left, height, width = (int(value) for value in box)
    crop = F.crop_image(image, top, left, height, width)  # fills with 0 outside the image
    if (height, width) != (size, size):
        crop = resize(crop, size)
    return F.horizontal_flip_image(crop) if flip else crop


Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
Encoded = NDArray[np.uint8]  # [length] an encoded file


_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def read_pixels(data: bytes | Pixels) -> Pixels:
    """Decode an image to uint8 [H, W, 3] RGB. Raises ValueError with the reason if it cannot be decoded."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or not data.size:
            raise ValueError(f"got {data.dtype} {data.shape}, expected uint8 [H, W, 3]")
        return data
    try:
        return np.ascontiguousarray(decode(data).permute(1, 2, 0).numpy())
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None  # Pillow's message holds a memory address
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from None


def is_upright_rgb_jpeg(data: bytes) -> bool:
    """A color JPEG that no reader would rotate: one that every decoder shows the same way."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1


_SOS, _ADOBE = 0xDA, 0xEE  # JPEG markers
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_YCBCR = 1  # Adobe's colour transform of ordinary colour JPEGs


def is_plain_jpeg(data: Encoded) -> bool:
    """A colour JPEG with the ordinary colour transform: every decoder shows it the same way.

    Walks the headers (ITU T.81, annex B), some microseconds.
    """
    head = data[:2].tobytes()
    if head != b"\xff\xd8":
        return False
    at, length = 2, len(data)
    while at + 10 < length:
        marker = int(data[at + 1])
        if data[at] != 0xFF or marker == _SOS:
            return False
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _FRAMES:
            return int(data[at + 9]) == 3 and int(data[at + 4]) == 8
        adobe = marker == _ADOBE and data[at + 4 : at + 9].tobytes() == b"Adobe"
        if adobe and int(data[min(at + 15, length - 1)]) != _YCBCR:
            return False
        at += 2 + (int(data[at + 2]) << 8) + int(data[at + 3])
    return False
