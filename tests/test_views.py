"""View families: torchvision's distribution, a scalar reference, and golden values that guard every cache."""

import math
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from torchvision.transforms import RandomCrop
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from pipelines import views
from pipelines.views import Center, PadCrop, RandomResizedCrop, table_digest

MASK = 2**64 - 1


def sizes_of(count: int, seed: int = 0) -> NDArray[np.int32]:
    """Stored sizes [count, 2] like ImageNet's, with some extreme ones."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(80, 640, (count, 2)).astype(np.int32)
    sizes[::50] = (1, 900)
    sizes[1::50] = (900, 3)
    sizes[2::50] = (1, 1)
    return sizes


# ---- a reference in plain Python, one sample at a time, written from the description in views.py


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


class Draws:
    def __init__(self, seed: int, sample: int, view: int) -> None:
        start = mix(((seed & MASK) * 0x9E3779B97F4A7C15 + 0x8CB92BA72F3D8DD7) & MASK)
        key = mix((start + (sample + 1) * 0xD1B54A32D192ED03) & MASK)
        self.key = mix((key + (view + 1) * 0x8CB92BA72F3D8DD7) & MASK)

    def uniform(self, number: int) -> float:
        return (mix((self.key + (number + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def reference_crop(
    draws: Draws, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, line by line, from numbered draws."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws.uniform(4 * attempt))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * draws.uniform(4 * attempt + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws.uniform(4 * attempt + 2) * (height - h + 1))
            left = int(draws.uniform(4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.35, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (1.0, 1.0))]
)
def test_random_resized_crop_is_its_scalar_reference(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    sizes = sizes_of(3000)
    ids = np.random.default_rng(1).permutation(len(sizes))
    family = RandomResizedCrop(scale=scale, ratio=ratio, flip=0.3)
    boxes, flips = family.boxes(-5, ids, 7, sizes[ids])
    for row, sample in enumerate(ids.tolist()):
        draws = Draws(-5, sample, 7)
        height, width = sizes[sample].tolist()
        assert tuple(boxes[row]) == reference_crop(draws, height, width, scale, ratio), sample
        assert flips[row] == (draws.uniform(40) < 0.3)


def test_pad_crop_is_its_scalar_reference() -> None:
    sizes = np.full((500, 2), 32, np.int32)
    boxes, flips = PadCrop(padding=4, flip=0.5).boxes(9, np.arange(500), 2, sizes)
    for sample in range(500):
        draws = Draws(9, sample, 2)
        expected = (int(draws.uniform(50) * 9) - 4, int(draws.uniform(51) * 9) - 4, 32, 32)
        assert tuple(boxes[sample]) == expected and flips[sample] == (draws.uniform(40) < 0.5)


# ---- the distribution is torchvision's


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 64), (100, 400)])
def test_random_resized_crop_has_torchvisions_distribution(shape: tuple[int, int]) -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([TorchvisionCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    sizes = np.broadcast_to(np.array(shape, np.int32), (count, 2))
    ours, flips = RandomResizedCrop().boxes(0, np.arange(count), 0, sizes)
    features = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0] / np.maximum(shape[0] - box[:, 2], 1),
        "left": lambda box: box[:, 1] / np.maximum(shape[1] - box[:, 3], 1),
    }
    for name, feature in features.items():
        assert ks_2samp(feature(ours), feature(theirs)).pvalue > 1e-3, name
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / count**0.5


def test_pad_crop_has_torchvisions_distribution() -> None:
    count = 4000
    torch.manual_seed(0)
    padded = torch.empty(3, 40, 40)
    theirs = np.array([RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(count)]) - 4
    ours, _ = PadCrop().boxes(0, np.arange(count), 0, np.full((count, 2), 32, np.int32))
    for axis in (0, 1):
        assert set(np.unique(ours[:, axis])) == set(range(-4, 5))
        assert ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 1e-3


def test_views_and_samples_are_independent() -> None:
    """Neighbouring ids, views and seeds share nothing that a correlation would show."""
    count = 20_000
    sizes = np.full((count, 2), 1000, np.int32)
    family = RandomResizedCrop()
    a = family.boxes(0, np.arange(count), 0, sizes)[0].astype(float)
    limit = 5 / count**0.5
    for other in (
        family.boxes(0, np.arange(count), 1, sizes)[0],
        family.boxes(1, np.arange(count), 0, sizes)[0],
        family.boxes(0, np.arange(count) + 1, 0, sizes)[0],
    ):
        for column in range(4):
            assert abs(np.corrcoef(a[:, column], other[:, column])[0, 1]) < limit


# ---- pure


def test_rows_depend_on_their_own_inputs_only() -> None:
    sizes = sizes_of(70_000)  # more than one chunk
    family = RandomResizedCrop()
    whole = family.boxes(3, np.arange(len(sizes)), 2, sizes)
    some = np.random.default_rng(0).choice(len(sizes), 5000)
    part = family.boxes(3, some, 2, sizes[some])
    assert (part[0] == whole[0][some]).all() and (part[1] == whole[1][some]).all()


def test_boxes_lie_within_the_image() -> None:
    sizes = sizes_of(20_000)
    for family in (RandomResizedCrop(), RandomResizedCrop(scale=(1.0, 1.0)), Center(), Center(crop_ratio=1.0)):
        boxes, _ = family.boxes(0, np.arange(len(sizes)), 0, sizes)
        assert boxes.dtype == np.int32 and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_center_is_resize_and_center_crop() -> None:
    """Center's box is the region that Resize(256) + CenterCrop(224) shows, to one stored pixel."""
    sizes = sizes_of(1000)
    sizes = sizes[sizes.min(1) >= 80]
    boxes, flips = Center(crop_ratio=224 / 256).boxes(0, np.arange(len(sizes)), 0, sizes)
    assert not flips.any()
    factor = sizes.min(1) / 256
    for axis in (0, 1):
        resized = sizes[:, axis] / factor
        assert (np.abs(boxes[:, axis] - (resized - 224) / 2 * factor) <= 1).all()
        assert (np.abs(boxes[:, 2 + axis] - 224 * factor) <= 1).all()
    assert Center(flip=1.0).boxes(0, np.arange(3), 0, sizes[:3])[1].all()


def test_golden_values() -> None:
    """Written down once. If this fails, every teacher cache ever filled would be wrong: do not change them."""
    sizes = np.array([[375, 500], [500, 375], [333, 500], [64, 64], [1, 900]], np.int32)
    ids = np.array([0, 1, 2, 1_281_166, 7])
    boxes, flips = RandomResizedCrop().boxes(0, ids, 0, sizes)
    assert boxes.tolist() == GOLDEN_RRC
    assert flips.tolist() == GOLDEN_RRC_FLIPS
    boxes, flips = PadCrop().boxes(2407, ids, 3, np.full((5, 2), 32, np.int32))
    assert boxes.tolist() == GOLDEN_PAD
    assert flips.tolist() == GOLDEN_PAD_FLIPS
    assert table_digest(RandomResizedCrop(scale=(0.35, 1)), 42, sizes_of(100_000)) == GOLDEN_TABLE


GOLDEN_RRC = [[1, 41, 366, 396], [5, 94, 285, 237], [140, 56, 128, 149], [3, 2, 56, 62], [0, 449, 1, 1]]
GOLDEN_RRC_FLIPS = [True, False, True, True, True]
GOLDEN_PAD = [[-3, -3, 32, 32], [-2, 0, 32, 32], [-3, 0, 32, 32], [0, 4, 32, 32], [-4, 2, 32, 32]]
GOLDEN_PAD_FLIPS = [True, False, True, False, True]
GOLDEN_TABLE = "c47ab5ba34a739296b3cd2d42add5d15"


def test_an_imagenet_epoch_takes_about_a_second() -> None:
    sizes = sizes_of(1_281_167)
    begin = time.process_time()
    boxes, _ = RandomResizedCrop().boxes(0, np.arange(len(sizes)), 0, sizes)
    assert time.process_time() - begin < 2.0  # 0.3 s on an idle core
    assert boxes.nbytes + len(boxes) < 18 * len(boxes)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (RandomResizedCrop, {"scale": (0.0, 1.0)}, "scale"),
        (RandomResizedCrop, {"scale": (0.5, 0.2)}, "scale"),
        (RandomResizedCrop, {"ratio": (2.0, 1.0)}, "ratio"),
        (RandomResizedCrop, {"flip": 1.5}, "flip"),
        (PadCrop, {"padding": -1}, "padding"),
        (Center, {"crop_ratio": 0.0}, "crop_ratio"),
        (Center, {"flip": 0.5}, "flip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(family: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}: got .*expected"):
        family(**settings)


def test_every_family_is_described_by_all_its_settings() -> None:
    for name, family in views.FAMILIES.items():
        assert views.describe(family()).pop("family") == name
