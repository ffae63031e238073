"""View families: which part of a stored image a sample shows, as a pure function.

A view of sample i is a box (top, left, height, width) in the coordinates of the *stored* image and a
flip. Row i depends on (seed, sample id, view number, stored height and width) only: there is no
generator state, so any subset in any order, on any rank, gives the same rows.

A box may reach outside its image (pad-and-crop does); outside, every loader reads 0 (black), as
torchvision's RandomCrop(padding=...) does.

Changing a number that these functions return invalidates every teacher cache in the world: the golden
values in tests/test_views.py pin them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.int32]  # [N, 4] top, left, height, width
Flips = NDArray[np.bool_]  # [N]
Flip = (
    float | Literal["alternating"]
)  # the probability of mirroring a view, or mirror every second view of a sample

# Odd 64-bit constants of splitmix64 (Steele, Lea, Flood 2014) and of two more well-mixed streams.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM_ID = np.uint64(0xD1B54A32D192ED03)
_STREAM_VIEW = np.uint64(0x8CB92BA72F3D8DD7)
# Rows are computed in pieces that stay in the processor's cache: 3x faster at ImageNet's size.
_CHUNK = 1 << 16


def mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words that scatters neighbouring inputs."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_key(seed: int, ids: NDArray[np.int64], stream: int) -> NDArray[np.uint64]:
    """One 64-bit key [N] for each (seed, id, stream); a stream is a view number or an epoch."""
    with np.errstate(over="ignore"):
        start = mix64(np.array([seed % 2**64], np.uint64) * _GOLDEN + _STREAM_VIEW)
        key = mix64(start + (ids.astype(np.uint64) + np.uint64(1)) * _STREAM_ID)
        return mix64(key + np.uint64(stream + 1) * _STREAM_VIEW)


def uniform(key: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """Draw number `draw` of every key: float64 [N] in [0, 1) with 53 random bits."""
    with np.errstate(over="ignore"):
        word = mix64(key + np.uint64(draw + 1) * _GOLDEN)
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _integer_below(key: NDArray[np.uint64], draw: int, bound: NDArray[np.int64]) -> NDArray[np.int64]:
    """A draw in 0 .. bound - 1. The bias, below 2**-37 for images under 65,536 pixels, is ignored."""
    return (uniform(key, draw) * bound).astype(np.int64)


class ViewFamily(Protocol):
    """A way to choose boxes and flips. Frozen dataclasses: their fields are part of a cache's fingerprint."""

    name: ClassVar[str]

    def boxes(self, seed: int, ids: NDArray[np.int64], view: int, sizes: NDArray[np.int32]) -> tuple[Boxes, Flips]:
        """Boxes int32 [N, 4] and flips bool [N] of view `view` for samples `ids` of stored `sizes` [N, 2]."""
        ...


# Draw numbers are part of the format: never renumber. Try t of a crop uses 4t .. 4t + 3.
_TRIES = 10
_DRAW_FLIP = 4 * _TRIES
_DRAW_PAD_TOP, _DRAW_PAD_LEFT = 50, 51


# A number that no view has: alternating flips depend on the sample and not on its view.
_VIEW_ALTERNATING = 0x464C_4950


def _flips(key: NDArray[np.uint64], flip: Flip, seed: int, ids: NDArray[np.int64], view: int) -> Flips:
    """`key` is that of the view. Alternating (arXiv 2404.00498): half of the samples in even views, the rest in odd."""
    if flip == "alternating":
        return _flips(hash_key(seed, ids, _VIEW_ALTERNATING), 0.5, seed, ids, view) ^ (view % 2 == 1)
    return uniform(key, _DRAW_FLIP) < flip


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn by counter instead of by state.

    Area uniform in `scale`, log aspect ratio uniform in log `ratio`; ten tries, then the largest centred
    crop whose aspect ratio lies within `ratio` (torchvision.transforms.RandomResizedCrop.get_params).
    """

    name: ClassVar[str] = "random_resized_crop"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Flip = 0.5

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale: got {self.scale}, expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: got {self.ratio}, expected 0 < low <= high")
        _check_flip(self.flip)

    def boxes(self, seed: int, ids: NDArray[np.int64], view: int, sizes: NDArray[np.int32]) -> tuple[Boxes, Flips]:
        boxes = np.empty((len(ids), 4), np.int32)
        flips = np.empty(len(ids), np.bool_)
        for start in range(0, len(ids), _CHUNK):
            rows = slice(start, start + _CHUNK)
            key = hash_key(seed, ids[rows], view)
            boxes[rows] = self._crop(key, sizes[rows].astype(np.int64))
            flips[rows] = _flips(key, self.flip, seed, ids[rows], view)
        return boxes, flips

    def _crop(self, key: NDArray[np.uint64], sizes: NDArray[np.int64]) -> Boxes:
        out = np.empty((len(key), 4), np.int32)
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        low, high = self.scale
        left_to_do = np.arange(len(key))
        for attempt in range(_TRIES):
            image_h, image_w = sizes[:, 0], sizes[:, 1]
            draw = 4 * attempt
            area = image_h * image_w * (low + (high - low) * uniform(key, draw))
            aspect = np.exp(log_low + (log_high - log_low) * uniform(key, draw + 1))
            # rint rounds half to even, as Python's round() in torchvision does
            width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
            height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
            fits = (width > 0) & (width <= image_w) & (height > 0) & (height <= image_h)
            rows, height, width = left_to_do[fits], height[fits], width[fits]
            out[rows, 0] = _integer_below(key[fits], draw + 2, image_h[fits] - height + 1)
            out[rows, 1] = _integer_below(key[fits], draw + 3, image_w[fits] - width + 1)
            out[rows, 2], out[rows, 3] = height, width
            again = ~fits
            left_to_do, key, sizes = left_to_do[again], key[again], sizes[again]
            if not len(left_to_do):
                return out
        image_h, image_w = sizes[:, 0], sizes[:, 1]
        aspect = image_w / image_h
        wide, narrow = aspect > self.ratio[1], aspect < self.ratio[0]
        width = np.where(wide, np.rint(image_h * self.ratio[1]).astype(np.int64), image_w)
        height = np.where(narrow, np.rint(image_w / self.ratio[0]).astype(np.int64), image_h)
        out[left_to_do] = _centred(image_h, image_w, height, width)
        return out


@dataclass(frozen=True, kw_only=True)
class PadCrop:
    """The small-image recipe (CIFAR): pad by `padding` black pixels, crop the image's own size, flip.

    Equals torchvision's RandomCrop(size, padding=padding) + RandomHorizontalFlip(flip).
    """

    name: ClassVar[str] = "pad_crop"
    padding: int = 4
    flip: Flip = 0.5

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding: got {self.padding}, expected 0 or more pixels")
        _check_flip(self.flip)

    def boxes(self, seed: int, ids: NDArray[np.int64], view: int, sizes: NDArray[np.int32]) -> tuple[Boxes, Flips]:
        key = hash_key(seed, ids, view)
        offsets = np.full(len(ids), 2 * self.padding + 1, np.int64)
        boxes = np.empty((len(ids), 4), np.int32)
        boxes[:, 0] = _integer_below(key, _DRAW_PAD_TOP, offsets) - self.padding
        boxes[:, 1] = _integer_below(key, _DRAW_PAD_LEFT, offsets) - self.padding
        boxes[:, 2:] = sizes
        return boxes, _flips(key, self.flip, seed, ids, view)


@dataclass(frozen=True, kw_only=True)
class Center:
    """The evaluation view: a centred square of `crop_ratio` times the shorter side, unflipped.

    Resize(s / crop_ratio) + CenterCrop(s) of torchvision, as one box in the stored image: the same
    region up to one stored pixel. crop_ratio is timm's crop_pct: 0.875 is 224 of 256.
    """

    name: ClassVar[str] = "center"
    crop_ratio: float = 0.875
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio: got {self.crop_ratio}, expected 0 < crop_ratio <= 1")
        if self.flip not in (0.0, 1.0):
            raise ValueError(f"flip: got {self.flip}, expected 0 (as stored) or 1 (all mirrored)")

    def boxes(self, seed: int, ids: NDArray[np.int64], view: int, sizes: NDArray[np.int32]) -> tuple[Boxes, Flips]:
        image_h, image_w = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
        side = np.maximum(np.rint(np.minimum(image_h, image_w) * self.crop_ratio).astype(np.int64), 1)
        return _centred(image_h, image_w, side, side), np.full(len(ids), self.flip == 1.0)


def _centred(
    image_h: NDArray[np.int64],
    image_w: NDArray[np.int64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> Boxes:
    return np.stack([(image_h - height) // 2, (image_w - width) // 2, height, width], 1).astype(np.int32)


def _check_flip(flip: Flip) -> None:
    if flip != "alternating" and not (isinstance(flip, int | float) and 0 <= flip <= 1):
        raise ValueError(f"flip: got {flip!r}, expected a probability from 0 to 1, or alternating")


FAMILIES: dict[str, Callable[..., ViewFamily]] = {
    family.name: family for family in (RandomResizedCrop, PadCrop, Center)
}


def describe(family: ViewFamily) -> dict[str, object]:
    """A family's name and settings, for fingerprints and messages."""
    return {"family": family.name, **asdict(family)}  # type: ignore[call-overload]


def table_digest(family: ViewFamily, seed: int, sizes: NDArray[np.int32]) -> str:
    """32 hex digits over view 0 of all samples, stored sizes [N, 2]: two machines that draw different boxes
    (another rounding of exp, say) are told apart by it."""
    boxes, flips = family.boxes(seed, np.arange(len(sizes)), 0, sizes)
    return hashlib.blake2b(boxes.astype("<i4").tobytes() + flips.tobytes(), digest_size=16).hexdigest()
