"""Images: decode, crop and resize as the reference does, and what a JPEG's header says."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipelines.images.resize import resize

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
Encoded = NDArray[np.uint8]  # [length] an encoded file

MAX_PIXELS = 178_956_970  # where Pillow refuses an image by default (DecompressionBombError)
MAX_SIDE = 65_500  # of a JPEG in libjpeg; a .beton holds 65,535

# What an image may be, whatever its name. Pillow knows more, and runs a program for one of them (EPS: ghostscript).
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")


@cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode(data: bytes) -> Tensor:
    """Decode an encoded image to uint8 [3, H, W] RGB, without EXIF rotation.

    Pillow decodes, whose JPEGs are pixel for pixel those of torchvision.io, TurboJPEG and OpenCV. (torchvision.io will
    be removed, and its PNG decoder ends the process on some damaged files.) Transparency is dropped; of 16-bit values
    the high byte is kept.

    Raises ValueError with a reason of one line for damaged data, unknown formats, more than MAX_PIXELS, and pixels
    without an agreed range (floating point, 32-bit integers).
    """
    if data.startswith(_PNG):
        data = _png_pixels(data)
    with _reasons(), Image.open(io.BytesIO(data), formats=_formats()) as image:
        check_size(image.height, image.width)
        return torch.from_numpy(_rgb(image)).permute(2, 0, 1)


def image_size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Raises ValueError with a reason of one line if `decode` would refuse it for what the header says.
    """
    start = file.read(33)
    file.seek(0)
    if start.startswith(_PNG):  # Pillow would read all text before the pixels
        if len(start) < 33 or start[12:16] != b"IHDR":
            raise ValueError("a PNG without a header")
        width, height = struct.unpack(">II", start[16:24])
    else:
        with _reasons(), Image.open(file, formats=_formats()) as image:
            width, height = image.size
    check_size(height, width)
    return height, width


def check_size(height: int, width: int) -> None:
    """Raises ValueError for an image that takes too much memory to decode, or that no format can store."""
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE or min(height, width) < 1:
        raise ValueError(
            f"{height}x{width} pixels, expected at most {MAX_PIXELS:,} and {MAX_SIDE:,} a side: make it smaller"
        )


@contextmanager
def _reasons() -> Iterator[None]:
    """Pillow raises almost anything for a damaged file: ValueError with a reason of one line."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None  # Pillow's message holds a memory address
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels: make it smaller") from None
    except Exception as error:
        raise ValueError(_first_line(error)) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _rgb(image: Image.Image) -> Pixels:
    """An open image as RGB; of 16-bit gray the high byte, as Pillow keeps it of 16-bit colors.

    Image.convert clips 16-bit gray to 255: white.
    """
    if image.mode[0] not in "IF":
        return np.array(image.convert("RGB"))
    tags = getattr(image, "tag_v2", {})  # TIFF: bits per sample, sample format
    known = image.format in ("PNG", "PPM", "TIFF") and image.mode != "F"
    if not known or (image.format == "TIFF" and (tags.get(258), tags.get(339, (1,))) != ((16,), (1,))):
        raise ValueError(
            f"a {image.format} of mode {image.mode}: its range is not known; save it with 8 or 16 bits"
        )
    gray = (np.asarray(image) >> 8).astype(np.uint8)
    if image.format == "TIFF" and tags.get(262) == 0:  # WhiteIsZero, which Pillow minds in 8 bits only
        gray = 255 - gray
    return np.stack([gray] * 3, axis=2)


def _png_pixels(data: bytes) -> bytes:
    """A PNG with its pixels inflated and checked, and without all that does not change them: text and color profiles
    of many megabytes, animations. Pillow looks neither at checksums nor at missing rows.

    Raises ValueError for damage.
    """
    kept, pixels, at, name = [_PNG], list[bytes](), len(_PNG), b""
    while name != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ValueError("image file is truncated")
        if not name[0] & 0x20:  # a critical chunk: its first letter is a capital
            if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError(f"wrong checksum of a PNG chunk ({name.decode('latin-1')!r})")
            if name == b"IDAT":
                pixels.append(data[at + 8 : end - 4])
            elif name != b"IEND":
                kept.append(data[at:end])
        at = end
    header = kept[1][8:-4] if len(kept) > 1 else b""
    expected = _raw_bytes(header)
    try:
        rows = _inflate(pixels, expected)
    except zlib.error as error:
        raise ValueError(f"damaged pixels ({error})") from None
    if rows:  # inflated once is enough: as a stored stream, which Pillow only copies
        pixels = [zlib.compress(rows, 0)]
    for part in pixels:
        kept.append(_chunk(b"IDAT", part))
    return b"".join([*kept, _chunk(b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(data, zlib.crc32(name)).to_bytes(4, "big")


_PIECE, _KEPT = 1 << 20, 1 << 26


def _inflate(parts: list[bytes], expected: int) -> bytes:
    """A compressed stream of `expected` bytes; nothing if that is much, so that memory stays small.

    Raises ValueError for more or fewer, without inflating all of a bomb; zlib.error for damage.
    """
    stream, count, pieces = zlib.decompressobj(), 0, list[bytes]()
    for part in parts:
        while part and count <= expected:
            piece = stream.decompress(part, _PIECE)
            part = stream.unconsumed_tail
            count += len(piece)
            if expected <= _KEPT:
                pieces.append(piece)
    if count != expected or not stream.eof:
        raise ValueError("a PNG with more or fewer rows than its header says")
    return b"".join(pieces)


# PNG 11.2.2: channels by color type; 8.1: where the seven passes of Adam7 start, and their steps.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def _raw_bytes(header: bytes) -> int:
    """Bytes of a PNG's filtered rows, from its IHDR. Raises ValueError for a header that is none."""
    if len(header) != 13 or header[9] not in _CHANNELS:
        raise ValueError("a PNG without a header")
    width, height, bits, color = struct.unpack(">IIBB", header[:10])
    check_size(height, width)
    total = 0
    for top, left, down, right in _ADAM7 if header[12] else ((0, 0, 1, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            total += rows * (1 + -(-columns * bits * _CHANNELS[color] // 8))
    return total


def render(image: Tensor, box: NDArray[np.int32], flip: bool, size: int) -> Tensor:
    """Crop `box` (top, left, height, width) of uint8 [3, H, W], resize to [3, size, size], mirror."""
    top, left, height, width = (int(value) for value in box)
    crop = image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if crop.shape[1:] != (height, width):  # the box reaches outside, where all is black
        inside, crop = crop, torch.zeros(3, height, width, dtype=torch.uint8)
        row, column = max(-top, 0), max(-left, 0)
        crop[:, row : row + inside.shape[1], column : column + inside.shape[2]] = inside
    if (height, width) != (size, size):
        crop = resize(crop, size)
    return crop.flip(2) if flip else crop


_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def read_pixels(data: bytes | Pixels) -> Pixels:
    """Decode an image to uint8 [H, W, 3] RGB. Raises ValueError with the reason if it cannot be decoded."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or not data.size:
            raise ValueError(f"got {data.dtype} {data.shape}, expected uint8 [H, W, 3]")
        return data
    return np.ascontiguousarray(decode(data).permute(1, 2, 0).numpy())


def is_upright_rgb_jpeg(data: bytes) -> bool:
    """A color JPEG that no reader would rotate: one that every decoder shows the same way."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        with _reasons(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            return image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1
    except ValueError:  # damaged EXIF
        return False


_SOS, _ADOBE = 0xDA, 0xEE  # JPEG markers
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_YCBCR = 1  # Adobe's colour transform of ordinary colour JPEGs


def is_plain_jpeg(data: Encoded, size: Sequence[int]) -> bool:
    """A colour JPEG of `size` (height, width) with the ordinary colour transform: every decoder shows it the same way.

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
            found = [(int(data[at + k]) << 8) + int(data[at + k + 1]) for k in (5, 7)]
            return int(data[at + 9]) == 3 and int(data[at + 4]) == 8 and found == [*size]
        adobe = marker == _ADOBE and data[at + 4 : at + 9].tobytes() == b"Adobe"
        if adobe and int(data[min(at + 15, length - 1)]) != _YCBCR:
            return False
        at += 2 + (int(data[at + 2]) << 8) + int(data[at + 3])
    return False
