"""Planned augmentation beyond crop and flip: RandAugment, colour jitter, grayscale, erasing, mixup and cutmix.

What happens to a sample in a view is a pure function of (seed, sample id, view), drawn from the hash of views.py: the
teacher that filled a cache and the student that reads it years later look at the same pixels. Loaders know nothing of it:
`execute` changes a batch on the device it trains on, after any loader and before any network.

Mixing needs a second image. A partner out of "the batch", as in timm and torchvision, would depend on the order of the
epoch, the number of processes and the step a run resumed at, and a fill has other batches than training. Any other
sample, drawn by hash, would have to be decoded besides. So the samples of a view are matched in pairs, by hash; an
epoch's order keeps the two of a pair beside each other (`aligned`), and a rank's share of a batch is whole pairs.
Each is the other's partner, with a share of its own: that is timm's `Mixup`, which mixes a batch with its reverse, in its
mode "elem". Every image is decoded once, by any loader. With an odd number of samples one stays as it is.

Draw numbers are part of the format of teacher caches: never renumber.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import pixel_ops
from pipelines.views import hash_key, uniform

Floats = NDArray[np.float64]
Colour = tuple[int, int, int]

# Streams apart from those of boxes and flips.
_SEED_PIXELS, _SEED_PAIRS = 0x4155_474D, 0x5041_4952

# Draw numbers. Layer l of RandAugment uses 16 l to 16 l + 4.
_LAYER, _CHOICE, _APPLY, _SIGN, _NORMAL_A, _NORMAL_B = 16, 0, 1, 2, 3, 4
_MOST_LAYERS = 8
_JITTER, _JITTER_FACTORS, _JITTER_ORDER, _GRAYSCALE = 128, 129, 134, 140
_ERASE, _ERASE_TOP, _ERASE_LEFT, _ERASE_COLOUR, _ERASE_TRIES = 150, 152, 153, 154, 160
_MIX, _MIX_CUT, _MIX_Y, _MIX_X, _MIX_TRIES = 200, 201, 202, 203, 256
_TRIES_ERASE, _TRIES_BETA = 10, 64
MOST_ALPHA = 2.0

# Of every dataclass here; pydantic reads it where they are sections of a config.
_STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}: got {value}, expected {expected}")


def _check_fraction(name: str, value: float) -> None:
    _check(name, value, 0 <= value <= 1, "a probability from 0 to 1")


class Slot(NamedTuple):
    """One operation for each row, or none."""

    ops: NDArray[np.int64]  # [n], places in OPS; -1: none
    numbers: Floats  # [n, pixel_ops.NUMBERS]


class Mix(NamedTuple):
    """How each row is mixed with its partner.

    Attributes:
        share: float32 [n], of the row's own label; that of its pixels, too, in mixup.
        blend: float32 [n], of the row's own pixels where mixup blends; 1 where cutmix copies.
        box: int64 [n, 4] top, left, height, width that cutmix copies from the partner; of size 0 in mixup.
    """

    share: NDArray[np.float32]
    blend: NDArray[np.float32]
    box: NDArray[np.int64]


# ---- RandAugment

_Arguments = tuple[NDArray[Any] | float, ...]
# (level, sign -1 or 1, image size) -> operation and its numbers; level is 0 to 1 of the library's scale
_Layer = Callable[[Floats, Floats, int], _Arguments]

OPS: list[str] = [*pixel_ops.OPS, "affine"]


def _shear(level: Floats, sign: Floats, size: int, *, vertical: bool) -> _Arguments:
    slope = sign * 0.3 * level  # tan of the angle; about the top left corner
    return (1, 0, slope, 1, 1) if vertical else (1, slope, 0, 1, 1)


def _rotate(level: Floats, sign: Floats, size: int) -> _Arguments:
    radians = np.radians(-((sign * 30 * level) % 360))
    return np.cos(radians), np.sin(radians), -np.sin(radians), np.cos(radians)


def _translate(level: Floats, sign: Floats, size: int, *, most: float, whole: bool, vertical: bool) -> _Arguments:
    pixels = sign * most * level * size
    if whole:
        pixels = np.trunc(pixels)
    return (1, 0, 0, 1, 0, 0, pixels) if vertical else (1, 0, 0, 1, 0, pixels, 0)


def _nothing(level: Floats, sign: Floats, size: int) -> _Arguments:
    return ()


def _factor(level: Floats, sign: Floats, size: int) -> _Arguments:
    return (1 + sign * 0.9 * level,)


_ENHANCE = ("brightness", "saturation", "contrast", "sharpness")

# Operations by torchvision.transforms.v2.RandAugment, in its order.
_TORCHVISION: list[tuple[str, _Layer]] = [
    ("identity", _nothing),
    ("affine", partial(_shear, vertical=False)),
    ("affine", partial(_shear, vertical=True)),
    ("affine", partial(_translate, most=150 / 331, whole=True, vertical=False)),
    ("affine", partial(_translate, most=150 / 331, whole=True, vertical=True)),
    ("affine", _rotate),
    *((name, _factor) for name in _ENHANCE),
    ("posterize", lambda level, sign, size: (8 - np.rint(4 * level),)),
    ("solarize", lambda level, sign, size: (255 * (1 - level),)),
    ("autocontrast", _nothing),
    ("equalize", _nothing),
]

# timm's, rand-... without and with -inc1.
_TIMM_COMMON: list[tuple[str, _Layer]] = [
    ("autocontrast", _nothing),
    ("equalize", _nothing),
    ("invert", _nothing),
    ("affine", _rotate),
    ("affine", partial(_shear, vertical=False)),
    ("affine", partial(_shear, vertical=True)),
    ("affine", partial(_translate, most=0.45, whole=False, vertical=False)),
    ("affine", partial(_translate, most=0.45, whole=False, vertical=True)),
    ("solarize_add", lambda level, sign, size: (np.minimum(128, np.trunc(110 * level)),)),
]
_TIMM: list[tuple[str, _Layer]] = [
    *_TIMM_COMMON,
    ("posterize", lambda level, sign, size: (np.trunc(4 * level),)),
    ("solarize", lambda level, sign, size: (np.minimum(256, np.trunc(256 * level)),)),
    *((name, lambda level, sign, size: (0.1 + 1.8 * level,)) for name in _ENHANCE),
]
_TIMM_INCREASING: list[tuple[str, _Layer]] = [
    *_TIMM_COMMON,
    ("posterize", lambda level, sign, size: (4 - np.trunc(4 * level),)),
    ("solarize", lambda level, sign, size: (256 - np.minimum(256, np.trunc(256 * level)),)),
    *((name, lambda level, sign, size: (np.maximum(0.1, 1 + sign * 0.9 * level),)) for name in _ENHANCE),
]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment (arXiv 1909.13719) with the operations and ranges of torchvision or of timm.

    timm's rand-m9-mstd0.5-inc1 is {space: timm, magnitude: 9, magnitude_std: 0.5, increasing: true}. Pixels are
    computed as torchvision's tensor operations do; timm's own are Pillow's, which round otherwise by 1.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    space: Literal["torchvision", "timm"] = "torchvision"
    layers: int = 2
    """Operations an image (torchvision's num_ops, timm's n)."""
    magnitude: float = 9.0
    """torchvision: 0 to 30. timm: 0 to 10."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude, drawn for each operation (timm's mstd)."""
    probability: float | None = None
    """Of each operation; 1 for torchvision and 0.5 for timm if not given."""
    increasing: bool = True
    """timm: operations that grow stronger with the magnitude (timm's inc1)."""
    interpolation: Literal["nearest", "bilinear"] | None = None
    """Of rotation, shear and translation; nearest for torchvision and bilinear for timm if not given."""
    fill: Colour | None = None
    """Colour from outside the image; black for torchvision and (124, 116, 104) for timm if not given."""

    def __post_init__(self) -> None:
        _check("layers", self.layers, 1 <= self.layers <= _MOST_LAYERS, f"1 to {_MOST_LAYERS}")
        _check(
            "magnitude", self.magnitude, 0 <= self.magnitude <= self.scale, f"0 to {self.scale:g} ({self.space})"
        )
        _check("magnitude_std", self.magnitude_std, self.magnitude_std >= 0, "0 or more")
        if self.probability is not None:
            _check_fraction("probability", self.probability)
        if self.fill is not None:
            _check("fill", self.fill, all(0 <= each <= 255 for each in self.fill), "three values from 0 to 255")

    @property
    def scale(self) -> float:
        """The largest magnitude."""
        return 30.0 if self.space == "torchvision" else 10.0

    @property
    def mode(self) -> str:
        """interpolation, or what the library takes."""
        return self.interpolation or {"torchvision": "nearest", "timm": "bilinear"}[self.space]

    @property
    def colour(self) -> Colour:
        """fill, or what the library takes."""
        return self.fill or {"torchvision": (0, 0, 0), "timm": (124, 116, 104)}[self.space]

    @property
    def table(self) -> list[tuple[str, _Layer]]:
        """Operations to choose from, and what makes their numbers."""
        return _TORCHVISION if self.space == "torchvision" else _TIMM_INCREASING if self.increasing else _TIMM

    def describe(self) -> str:
        """Everything that decides a pixel, on one line."""
        probability = self.probability if self.probability is not None else self._default_probability
        return (
            f"{self.space}, layers {self.layers}, magnitude {self.magnitude:g} +- {self.magnitude_std:g}, probability "
            f"{probability:g}, increasing {self.increasing}, {self.mode}, fill {list(self.colour)}"
        )

    @property
    def _default_probability(self) -> float:
        return 1.0 if self.space == "torchvision" else 0.5

    def slots(self, key: NDArray[np.uint64], size: int) -> list[Slot]:
        """A slot for each layer of rows with these keys [n]."""
        return [self._slot(key, size, _LAYER * layer) for layer in range(self.layers)]

    def _slot(self, key: NDArray[np.uint64], size: int, draw: int) -> Slot:
        table = self.table
        chosen = (uniform(key, draw + _CHOICE) * len(table)).astype(np.int64)
        probability = self._default_probability if self.probability is None else self.probability
        chosen[uniform(key, draw + _APPLY) >= probability] = -1
        sign = np.where(uniform(key, draw + _SIGN) < 0.5, -1.0, 1.0)
        level = np.full(len(key), float(self.magnitude))
        if self.magnitude_std:
            radius = np.sqrt(-2 * np.log1p(-uniform(key, draw + _NORMAL_A)))
            level += self.magnitude_std * radius * np.cos(2 * np.pi * uniform(key, draw + _NORMAL_B))
        level = np.clip(level, 0, self.scale) / self.scale
        slot = _empty_slot(len(key))
        for number, (name, numbers) in enumerate(table):
            rows = np.flatnonzero(chosen == number)
            if name != "identity" and len(rows):
                _put(slot, rows, name, *numbers(level[rows], sign[rows], size))
        return slot


def _empty_slot(rows: int) -> Slot:
    return Slot(np.full(rows, -1, np.int64), np.zeros((rows, pixel_ops.NUMBERS)))


def _put(slot: Slot, rows: NDArray[np.int64], name: str, *numbers: NDArray[Any] | float) -> None:
    slot.ops[rows] = OPS.index(name)
    for column, each in enumerate(numbers):
        slot.numbers[rows, column] = each


# ---- all of it


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to a crop, in this order: RandAugment, colour jitter, grayscale, erasing, mixup or cutmix.

    The section views.augment of a config. Everything is off by default.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    randaugment: RandAugment | None = None
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """torchvision's ColorJitter: brightness, contrast, saturation (factors from 1 - x to 1 + x), hue (0 to 0.5)."""
    color_jitter_probability: float = 1.0
    grayscale: float = 0.0
    """Probability (torchvision's RandomGrayscale)."""
    erasing: float = 0.0
    """Probability of erasing a box (torchvision's RandomErasing, timm's reprob)."""
    erasing_scale: tuple[float, float] = (0.02, 1 / 3)
    """Share of the image's area."""
    erasing_ratio: tuple[float, float] = (0.3, 10 / 3)
    """Height over width."""
    erasing_fill: Literal["random"] | Colour = (124, 116, 104)
    """Colour of the box: one of its own for each, or always this one (ImageNet's mean, 0 when normalised)."""
    mixup: float = 0.0
    """alpha of Beta(alpha, alpha), from which an image's own share is drawn (timm's mixup_alpha, elem); 0: off."""
    cutmix: float = 0.0
    """The same of cutmix."""
    mix_probability: float = 1.0
    """Share of images that are mixed at all (timm's mixup_prob)."""
    mix_switch: float = 0.5
    """With both, the share of mixed images that get cutmix (timm's mixup_switch_prob)."""

    def __post_init__(self) -> None:
        for name in ("color_jitter_probability", "grayscale", "erasing", "mix_probability", "mix_switch"):
            _check_fraction(name, getattr(self, name))
        jitter = self.color_jitter
        _check(
            "color_jitter", jitter, min(jitter) >= 0 and jitter[3] <= 0.5, "no negative value, and hue up to 0.5"
        )
        low, high = self.erasing_scale
        _check("erasing_scale", self.erasing_scale, 0 < low <= high <= 1, "0 < low <= high <= 1")
        _check(
            "erasing_ratio",
            self.erasing_ratio,
            0 < self.erasing_ratio[0] <= self.erasing_ratio[1],
            "0 < low <= high",
        )
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _check(name, value, 0 <= value <= MOST_ALPHA, f"an alpha from 0 (off) to {MOST_ALPHA:g}")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with partners."""
        return bool(self.mixup or self.cutmix) and self.mix_probability > 0

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        jitters = any(self.color_jitter) and self.color_jitter_probability > 0
        return self.mixes or self.randaugment is not None or jitters or self.grayscale > 0 or self.erasing > 0

    def describe(self) -> dict[str, str]:
        """What is switched on, by key, for fingerprints; empty if nothing is."""
        found: dict[str, str] = {}
        if self.randaugment is not None:
            found["randaugment"] = self.randaugment.describe()
        if any(self.color_jitter):
            found["color_jitter"] = f"{list(self.color_jitter)}, probability {self.color_jitter_probability:g}"
        if self.grayscale:
            found["grayscale"] = f"{self.grayscale:g}"
        if self.erasing:
            scale, ratio = ([round(each, 6) for each in pair] for pair in (self.erasing_scale, self.erasing_ratio))
            fill = self.erasing_fill if isinstance(self.erasing_fill, str) else list(self.erasing_fill)
            found["erasing"] = f"{self.erasing:g}, scale {scale}, ratio {ratio}, fill {fill}"
        if self.mixes:
            found["mix"] = (
                f"mixup {self.mixup:g}, cutmix {self.cutmix:g}, probability {self.mix_probability:g}, switch "
                f"{self.mix_switch:g}"
            )
        return found

    def slots(self, seed: int, ids: NDArray[np.int64], view: int, size: int) -> list[Slot]:
        """Operations of samples `ids` [n] in a view, on images of size x size, in order."""
        key = hash_key(seed ^ _SEED_PIXELS, ids, view)
        found = self.randaugment.slots(key, size) if self.randaugment is not None else []
        if any(self.color_jitter):
            found += self._jitter(key)
        if self.grayscale:
            slot = _empty_slot(len(key))
            _put(slot, np.flatnonzero(uniform(key, _GRAYSCALE) < self.grayscale), "grayscale")
            found.append(slot)
        if self.erasing:
            found.append(self._erase(key, size))
        return found

    def _jitter(self, key: NDArray[np.uint64]) -> list[Slot]:
        """Brightness, contrast, saturation and hue in an order that is each row's own."""
        used = uniform(key, _JITTER) < self.color_jitter_probability
        order = np.argsort(np.stack([uniform(key, _JITTER_ORDER + place) for place in range(4)], 1), axis=1)
        found = [_empty_slot(len(key)) for _ in range(4)]
        for number, (name, reach) in enumerate(
            zip(("brightness", "contrast", "saturation", "hue"), self.color_jitter, strict=True)
        ):
            if not reach:
                continue
            low, high = (-reach, reach) if name == "hue" else (max(0.0, 1 - reach), 1 + reach)
            factor = low + (high - low) * uniform(key, _JITTER_FACTORS + number)
            for place, slot in enumerate(found):
                rows = np.flatnonzero(used & (order[:, place] == number))
                _put(slot, rows, name, factor[rows])
        return found

    def _erase(self, key: NDArray[np.uint64], size: int) -> Slot:
        """torchvision's tries, in shares of the image so that every size erases the same part."""
        slot = _empty_slot(len(key))
        left = np.flatnonzero(uniform(key, _ERASE) < self.erasing)
        (low, high), (flat, tall) = self.erasing_scale, map(math.log, self.erasing_ratio)
        for attempt in range(_TRIES_ERASE):
            draw = _ERASE_TRIES + 2 * attempt
            area = low + (high - low) * uniform(key[left], draw)
            aspect = np.exp(flat + (tall - flat) * uniform(key[left], draw + 1))
            height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
            fits = (height < 1) & (width < 1)
            rows, own = left[fits], key[left[fits]]
            tall_pixels, wide_pixels = np.rint(height[fits] * size), np.rint(width[fits] * size)
            top = np.trunc(uniform(own, _ERASE_TOP) * (size - tall_pixels + 1))
            start = np.trunc(uniform(own, _ERASE_LEFT) * (size - wide_pixels + 1))
            colour: tuple[NDArray[Any] | float, ...]
            if isinstance(self.erasing_fill, str):
                colour = tuple(np.trunc(256 * uniform(own, _ERASE_COLOUR + channel)) for channel in range(3))
            else:
                colour = self.erasing_fill
            _put(slot, rows, "erase", top, start, tall_pixels, wide_pixels, *colour)
            left = left[~fits]
        return slot

    def mix(self, seed: int, ids: NDArray[np.int64], view: int, size: int) -> Mix:
        """Shares and boxes of samples `ids` [n], as timm's Mixup draws them in its mode elem."""
        key = hash_key(seed ^ _SEED_PIXELS, ids, view)
        switch = self.mix_switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = uniform(key, _MIX_CUT) < switch
        share = _beta(key, np.where(cut, self.cutmix, self.mixup))
        share[uniform(key, _MIX) >= self.mix_probability] = 1.0
        side = np.where(cut, np.trunc(size * np.sqrt(1 - share)), 0).astype(np.int64)
        box = np.zeros((len(key), 4), np.int64)
        for column, draw in enumerate((_MIX_Y, _MIX_X)):
            centre = (uniform(key, draw) * size).astype(np.int64)
            first, last = centre - side // 2, centre + (side + 1) // 2
            box[:, column] = np.clip(first, 0, size)
            box[:, 2 + column] = np.clip(last, 0, size) - box[:, column]
        blend = np.where(cut, 1.0, share)
        share = np.where(cut, 1 - box[:, 2] * box[:, 3] / size**2, share)
        return Mix(share.astype(np.float32), blend.astype(np.float32), box)


def _beta(key: NDArray[np.uint64], alpha: Floats) -> Floats:
    """Beta(alpha, alpha) [n] by Joehnk's rejection, each row with alpha of its own, 0 < alpha <= 2.

    Past the last try, once in more than 100,000 rows at alpha = 2 and never below 1, it is 1/2.
    """
    out, left = np.full(len(key), 0.5), np.arange(len(key))
    for attempt in range(_TRIES_BETA):
        draw = _MIX_TRIES + 2 * attempt
        power = 1 / alpha[left]
        a, b = uniform(key[left], draw) ** power, uniform(key[left], draw + 1) ** power
        taken = (a + b <= 1) & (a + b > 0)
        out[left[taken]] = a[taken] / (a + b)[taken]
        left = left[~taken]
        if not len(left):
            break
    return out


# ---- pairs


def partners(count: int, seed: int, view: int) -> NDArray[np.int64]:
    """The partner of each of `count` samples in a view, int64 [count]: a matching, drawn by hash. Of an odd number one
    sample is its own partner."""
    key = hash_key(seed ^ _SEED_PAIRS, np.arange(count), view)
    shuffled = np.argsort(key, kind="stable")
    found = np.arange(count)
    even = count // 2 * 2
    found[shuffled[0:even:2]] = shuffled[1:even:2]
    found[shuffled[1:even:2]] = shuffled[0:even:2]
    return found


def aligned(order: NDArray[np.int64], partner: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of ids in which each pair stands together, where its first stood; one without a partner comes last.

    Rows 2 i and 2 i + 1 are then partners. A shuffled order stays one: of pairs, and within them. The partners of
    all of `order` must be in it.
    """
    place = np.empty(len(partner), np.int64)
    place[order] = np.arange(len(order))
    first = np.minimum(place[order], place[partner[order]])
    first[partner[order] == order] = len(order)
    return order[np.lexsort((place[order], first))]


# ---- execution


class Mixed(NamedTuple):
    """Labels of mixed rows: each is `share` its own label and 1 - share that of its partner."""

    partner_labels: Tensor  # int64 [n]
    share: Tensor  # float32 [n]


@dataclass(frozen=True, kw_only=True)
class ViewAugment:
    """Augmentation of the rows of one view: what a plan asks of a batch's device."""

    settings: Augment
    seed: int
    view: int

    def pixels(self, images: Tensor, ids: NDArray[np.int64]) -> Tensor:
        """Images uint8 [n, 3, size, size] of samples `ids` [n], augmented; `images` are left as they are."""
        size = images.shape[-1]
        slots = self.settings.slots(self.seed, ids, self.view, size)
        if slots and len(ids):
            images = images.clone()
            numbers = _to(np.stack([slot.numbers for slot in slots]), images.device)
            order = [np.argsort(slot.ops, kind="stable") for slot in slots]
            rows = _to(np.stack(order), images.device)
            for slot, own_rows, own_numbers in zip(slots, rows, numbers, strict=True):
                ends = np.cumsum(np.bincount(slot.ops + 1, minlength=len(OPS) + 1))
                for op, (start, end) in enumerate(pairwise(ends)):
                    if start < end:
                        chosen = own_rows[start:end]
                        images[chosen] = self._op(op)(images[chosen], own_numbers[chosen])
        if self.settings.mixes:
            images = self._mix(images, ids)
        return images

    def _op(self, op: int) -> pixel_ops.Op:
        if OPS[op] != "affine":
            return pixel_ops.OPS[OPS[op]]
        randaugment = self.settings.randaugment
        assert randaugment is not None
        return partial(pixel_ops.affine, mode=randaugment.mode, fill=randaugment.colour)

    def _mix(self, images: Tensor, ids: NDArray[np.int64]) -> Tensor:
        found = self.settings.mix(self.seed, ids, self.view, images.shape[-1])
        blend, box = (_to(each, images.device) for each in (found.blend, found.box))
        return pixel_ops.mix(images, _partner_rows(images), blend, box)

    def labels(self, labels: Tensor, ids: NDArray[np.int64], size: int) -> Mixed | None:
        """The labels of mixed rows, at the size of image whose pixels cutmix counts; None if nothing is mixed."""
        if not self.settings.mixes:
            return None
        share = self.settings.mix(self.seed, ids, self.view, size).share
        return Mixed(_partner_rows(labels), _to(share, labels.device))


def _partner_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] with those of each pair exchanged; the last of an odd number stays."""
    even = len(rows) // 2 * 2
    pairs = rows[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.cat([pairs, rows[even:]])


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
