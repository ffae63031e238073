"""Planned augmentation: torchvision's and timm's own operations, pure plans, pairs, and what a batch shows."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, kstest
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, mixup
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment as TorchvisionRandAugment
from torchvision.transforms.v2 import functional as torchvision

from pipelines.augment import OPS, Augment, RandAugment, Slot, ViewAugment, partners, pixel_ops
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan, epoch_order
from pipelines.views import PadCrop

ROWS = 40
SIZES = (8, 33, 160)


def photographs(size: int, rows: int = ROWS) -> Tensor:
    """Parts of two real photographs, uint8 [rows, 3, size, size], channels last; two of them of one colour."""
    images, rng = load_sample_images().images, np.random.default_rng(size)
    parts = []
    for row in range(rows):
        image = images[row % 2]
        top, left = (rng.integers(0, extent - size) for extent in image.shape[:2])
        parts.append(image[top : top + size, left : left + size])
    pixels = np.stack(parts)
    pixels[:2] = 77
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def numbers(*columns: Any) -> Tensor:
    out = torch.zeros(ROWS, pixel_ops.NUMBERS, dtype=torch.float64)
    for place, column in enumerate(columns):
        out[:, place] = torch.from_numpy(np.broadcast_to(np.asarray(column, np.float64), ROWS).copy())
    return out


def one_by_one(images: Tensor, call: Any) -> Tensor:
    return torch.stack([call(image, row) for row, image in enumerate(images)])


FACTORS = np.random.default_rng(0).uniform(0, 2, ROWS)
FACTORS[:4] = (0, 1, 2, 0.1)
WITH_FACTOR = {
    "brightness": (torchvision.adjust_brightness, FACTORS),
    "contrast": (torchvision.adjust_contrast, FACTORS),
    "saturation": (torchvision.adjust_saturation, FACTORS),
    "sharpness": (torchvision.adjust_sharpness, FACTORS),
    "hue": (torchvision.adjust_hue, (FACTORS - 1) / 2),
    "solarize": (torchvision.solarize, FACTORS * 127.5),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WITH_FACTOR)
def test_an_operation_with_a_number_is_torchvisions(name: str, size: int) -> None:
    call, values = WITH_FACTOR[name]
    images = photographs(size)
    expected = one_by_one(images, lambda image, row: call(image, float(values[row])))
    assert torch.equal(pixel_ops.OPS[name](images, numbers(values)), expected)


@pytest.mark.parametrize("size", SIZES)
def test_operations_on_whole_numbers_are_the_libraries(size: int) -> None:
    images = photographs(size)
    bits, added = np.arange(ROWS) % 9, np.arange(ROWS) * 3
    expected = one_by_one(images, lambda image, row: torchvision.posterize(image, int(bits[row])))
    assert torch.equal(pixel_ops.posterize(images, numbers(bits)), expected)
    gray = one_by_one(images, lambda image, row: torchvision.rgb_to_grayscale(image, num_output_channels=3))
    assert torch.equal(pixel_ops.grayscale(images, numbers()), gray)
    for name in ("autocontrast", "equalize", "invert"):
        call = getattr(torchvision, name)
        assert torch.equal(
            pixel_ops.OPS[name](images, numbers()),
            one_by_one(images, lambda image, _: call(image)),  # noqa: B023
        )
    # these are timm's own to the last bit, too
    for name, theirs, column in (
        ("solarize_add", lambda image, row: auto_augment.solarize_add(image, int(added[row])), added),
        ("posterize", lambda image, row: auto_augment.posterize(image, int(bits[row])), bits),
        ("solarize", lambda image, row: auto_augment.solarize(image, int(added[row])), added),
        ("invert", lambda image, row: auto_augment.invert(image), 0),
        ("equalize", lambda image, row: auto_augment.equalize(image), 0),
    ):
        found = pixel_ops.OPS[name](images, numbers(column)).permute(0, 2, 3, 1)
        if name == "posterize":  # Pillow keeps 1 to 8 bits
            found, keep = found[bits > 0], np.flatnonzero(bits > 0)
        else:
            keep = np.arange(ROWS)
        for mine, row in zip(found, keep, strict=True):
            pillow = Image.fromarray(images[row].permute(1, 2, 0).contiguous().numpy())
            assert (np.asarray(theirs(pillow, row)) == mine.numpy()).all(), (name, row)


ANGLES = np.random.default_rng(1).uniform(-45, 45, ROWS)
ANGLES[:3] = (9, -9, 30)
SLOPES = np.random.default_rng(2).uniform(-0.3, 0.3, ROWS)
SLOPES[:3] = (0.09, -0.09, 0.3)


@pytest.mark.parametrize("fill", [(0, 0, 0), (124, 116, 104)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_geometry_is_torchvisions(size: int, mode: str, fill: tuple[int, int, int]) -> None:
    images = photographs(size)
    options: dict[str, Any] = {"interpolation": InterpolationMode(mode), "fill": list(fill) if any(fill) else None}

    def affine(image: Tensor, *, shear: list[float], translate: list[int], center: Any = None) -> Tensor:
        return torchvision.affine(
            image, angle=0.0, translate=translate, scale=1.0, shear=shear, center=center, **options
        )

    slopes = np.array([math.tan(math.radians(math.degrees(math.atan(each)))) for each in SLOPES])
    degrees = [math.degrees(math.atan(each)) for each in SLOPES]
    pixels = np.trunc(SLOPES * size)
    radians = [math.radians(-(angle % 360)) for angle in ANGLES]
    cos, sin = np.array([math.cos(each) for each in radians]), np.array([math.sin(each) for each in radians])
    for columns, theirs in (
        (
            (1, slopes, 0, 1, 1),
            lambda image, row: affine(image, shear=[degrees[row], 0.0], translate=[0, 0], center=[0, 0]),
        ),
        (
            (1, 0, slopes, 1, 1),
            lambda image, row: affine(image, shear=[0.0, degrees[row]], translate=[0, 0], center=[0, 0]),
        ),
        (
            (1, 0, 0, 1, 0, pixels, 0),
            lambda image, row: affine(image, shear=[0.0, 0.0], translate=[int(pixels[row]), 0]),
        ),
        (
            (1, 0, 0, 1, 0, 0, pixels),
            lambda image, row: affine(image, shear=[0.0, 0.0], translate=[0, int(pixels[row])]),
        ),
        ((cos, sin, -sin, cos), lambda image, row: torchvision.rotate(image, float(ANGLES[row]), **options)),
    ):
        found = pixel_ops.affine(images, numbers(*columns), mode=mode, fill=fill)
        assert torch.equal(found, one_by_one(images, theirs))


def test_erasing_and_mixing_are_the_libraries() -> None:
    images, rng = photographs(33), np.random.default_rng(3)
    top, left, height, width = rng.integers(0, 16, (4, ROWS))
    colour = rng.integers(0, 256, (3, ROWS))
    found = pixel_ops.erase(images, numbers(top, left, height, width, *colour))
    expected = one_by_one(
        images,
        lambda image, row: torchvision.erase(
            image,
            int(top[row]),
            int(left[row]),
            int(height[row]),
            int(width[row]),
            torch.from_numpy(colour[:, row].astype(np.uint8))[:, None, None],
        ),
    )
    assert torch.equal(found, expected)
    # timm's FastCollateMixup, elem, mixes row i with row n - 1 - i: with our shares and boxes in place of its own
    plan = Augment(mixup=0.8, cutmix=1.0).mix(5, np.arange(ROWS), 2, 33)
    collate = mixup.FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem")
    cut = plan.blend == 1
    collate._params_per_elem = lambda rows: (np.where(cut, 0.5, plan.blend).astype(np.float32), cut)
    boxes = iter(plan.box[cut])

    def their_box(*_: Any, **__: Any) -> tuple[tuple[int, int, int, int], float]:
        y, x, h, w = next(boxes).tolist()
        return (y, y + h, x, x + w), 1 - h * w / 33**2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixup, "cutmix_bbox_and_lam", their_box)
        pairs = [(image.numpy(), 0) for image in images]
        theirs, _ = collate(pairs)
    mine = pixel_ops.mix(images, images.flip(0), torch.from_numpy(plan.blend), torch.from_numpy(plan.box))
    assert torch.equal(mine, theirs)


# ---- what is drawn


def level_numbers(settings: RandAugment, name: str) -> list[float]:
    """The first number that varies of an operation at this magnitude, both signs."""
    slots = settings.slots(np.arange(20_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), 224)
    found = {tuple(row) for slot in slots for row in slot.numbers[slot.ops == OPS.index(name)].round(9).tolist()}
    return sorted({row[0] for row in found})


def test_torchvisions_randaugment_has_its_ranges() -> None:
    space = TorchvisionRandAugment._AUGMENTATION_SPACE
    for magnitude in (0, 9, 17, 30):
        settings = RandAugment(magnitude=magnitude)
        for theirs, ours in (("Brightness", "brightness"), ("Color", "saturation"), ("Sharpness", "sharpness")):
            value = float(space[theirs][0](31, 224, 224)[magnitude])
            assert level_numbers(settings, ours) == pytest.approx(sorted({1 - value, 1 + value}), abs=1e-6)
        bits = int(space["Posterize"][0](31, 224, 224)[magnitude])
        assert level_numbers(settings, "posterize") == [bits]
        assert level_numbers(settings, "solarize") == pytest.approx(
            [255 * float(space["Solarize"][0](31, 224, 224)[magnitude])], abs=1e-4
        )
        slot = Slot(
            *(
                np.concatenate(each)
                for each in zip(
                    *settings.slots(np.arange(50_000, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03), 224),
                    strict=True,
                )
            )
        )
        geometry = slot.numbers[slot.ops == OPS.index("affine")]
        assert geometry[:, 5].max() == int(space["TranslateX"][0](31, 224, 224)[magnitude])
        slope = float(space["ShearX"][0](31, 224, 224)[magnitude])
        assert geometry[geometry[:, 4] == 1][:, 1].max() == pytest.approx(slope, abs=1e-6)
        angle = float(space["Rotate"][0](31, 224, 224)[magnitude])
        assert np.abs(geometry[(geometry[:, 0] < 1)][:, 1]).max(initial=0) == pytest.approx(
            math.sin(math.radians(angle)), abs=1e-6
        )


@pytest.mark.parametrize("increasing", [True, False])
def test_timms_randaugment_has_its_ranges(increasing: bool) -> None:
    hparams = {"translate_pct": 0.45}
    for magnitude in (0.0, 5.5, 9.0, 10.0):
        settings = RandAugment(space="timm", magnitude=magnitude, increasing=increasing)
        suffix = "Increasing" if increasing else ""
        for theirs, ours in (("Brightness", "brightness"), ("Posterize", "posterize"), ("Solarize", "solarize")):
            level = auto_augment.LEVEL_TO_ARG[theirs + suffix]
            values = sorted({round(level(magnitude, hparams)[0], 9) for _ in range(40)})
            assert level_numbers(settings, ours) == pytest.approx(values, abs=1e-9), (theirs, magnitude)
        added = auto_augment.LEVEL_TO_ARG["SolarizeAdd"](magnitude, hparams)[0]
        assert level_numbers(settings, "solarize_add") == [added]
    names = [name for name, _ in RandAugment(space="timm").table]
    assert len(names) == len(auto_augment._RAND_INCREASING_TRANSFORMS) == 15


def test_draws_have_their_distributions() -> None:
    count = 20_000
    ids = np.arange(count)
    settings = Augment(
        randaugment=RandAugment(space="timm", magnitude=5, magnitude_std=0.5),
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        grayscale=0.2,
        erasing=0.25,
        mixup=0.2,
        cutmix=1.0,
    )
    first, second, *jitter, gray, erased = settings.slots(0, ids, 0, 224)
    near = 4 / count**0.5
    assert abs((first.ops >= 0).mean() - 0.5) < near and abs((gray.ops >= 0).mean() - 0.2) < near
    assert abs((erased.ops >= 0).mean() - 0.25) < near
    assert abs(np.corrcoef(first.ops, second.ops)[0, 1]) < near
    for slot in jitter:  # every operation in every place
        assert np.bincount(slot.ops).max() / count == pytest.approx(0.25, abs=near)
        assert sorted(np.unique(slot.ops)) == [
            OPS.index(n) for n in ("brightness", "contrast", "saturation", "hue")
        ]
    factors = np.concatenate([slot.numbers[slot.ops == OPS.index("contrast")][:, 0] for slot in jitter])
    assert kstest(factors, "uniform", (0.6, 0.8)).pvalue > 1e-3
    boxes = erased.numbers[erased.ops >= 0]
    area = boxes[:, 2] * boxes[:, 3] / 224**2
    assert area.min() > 0.018 and area.max() < 0.34
    assert (boxes[:, 0] + boxes[:, 2] <= 224).all() and (boxes[:, :2] >= 0).all()
    for alpha in (0.2, 0.8, 1.0, 2.0):
        share = Augment(mixup=alpha).mix(0, ids, 0, 224).share.astype(np.float64)
        low = share[share < 0.5]  # near 1 float32 is too coarse for alpha = 0.2
        assert abs(len(low) / count - 0.5) < near
        assert kstest(low, lambda x: 2 * beta(alpha, alpha).cdf(x)).pvalue > 1e-3, alpha  # noqa: B023
    cut = settings.mix(0, ids, 0, 224)
    assert abs((cut.blend == 1).mean() - 0.5) < near
    assert abs((Augment(mixup=1.0, mix_probability=0.3).mix(0, ids, 0, 32).share == 1).mean() - 0.7) < near


EVERYTHING = Augment(
    randaugment=RandAugment(space="timm", magnitude=9, magnitude_std=0.5),
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    grayscale=0.2,
    erasing=0.5,
    erasing_fill="random",
    mixup=0.8,
    cutmix=1.0,
)


def test_golden_draws() -> None:
    """Written down once. If this fails, every cache of augmented views would be wrong: do not change them."""
    slots = EVERYTHING.slots(42, np.array([0, 1, 7, 1_281_166]), 3, 224)
    assert [slot.ops.tolist() for slot in slots] == GOLDEN_OPS
    assert [round(float(slot.numbers.sum()), 4) for slot in slots] == GOLDEN_SUMS
    mix = EVERYTHING.mix(42, np.array([0, 1, 7, 1_281_166]), 3, 224)
    assert mix.share.round(5).tolist() == pytest.approx(GOLDEN_SHARES) and mix.box.tolist() == GOLDEN_BOXES
    assert partners(9, 42, 3).tolist() == GOLDEN_PARTNERS


GOLDEN_OPS = [
    [13, 7, -1, -1],
    [-1, 7, 1, -1],
    [2, 4, 1, 0],
    [4, 2, 4, 2],
    [1, 0, 0, 4],
    [0, 1, 2, 1],
    [-1, 11, -1, -1],
    [12, 12, -1, 12],
]
GOLDEN_SUMS = [13.8557, 97.2757, 3.5586, 2.1497, 2.8907, 3.7539, 0.0, 1728.0]
GOLDEN_SHARES = [0.75032, 0.50967, 0.85104, 0.73308]
GOLDEN_BOXES = [[80, 137, 144, 87], [0, 85, 177, 139], [115, 0, 101, 74], [103, 55, 0, 0]]
GOLDEN_PARTNERS = [0, 8, 3, 2, 6, 7, 4, 5, 1]


def test_rows_depend_on_their_own_inputs_only() -> None:
    """In any order, beside any rows, in batches of any size: the same pixels."""
    images, ids = photographs(33), np.arange(ROWS) * 3
    view = ViewAugment(settings=replace(EVERYTHING, mixup=0.0, cutmix=0.0), seed=7, view=1)
    whole = view.pixels(images, ids)
    assert (whole != images).any() and torch.equal(images, photographs(33)), "in a copy"
    mixed = np.random.default_rng(0).permutation(ROWS)
    assert torch.equal(view.pixels(images[mixed], ids[mixed]), whole[mixed])
    for row in range(0, ROWS, 7):
        assert torch.equal(view.pixels(images[row : row + 1].contiguous(), ids[row : row + 1])[0], whole[row])
    assert not torch.equal(replace(view, view=2).pixels(images, ids), whole)
    assert not torch.equal(replace(view, seed=8).pixels(images, ids), whole)
    assert view.pixels(images[:0], ids[:0]).shape == (0, 3, 33, 33)


# ---- pairs


@pytest.mark.parametrize("count", [1, 2, 9, 500])
def test_partners_are_a_matching_that_changes_with_the_view(count: int) -> None:
    found = partners(count, 0, 0)
    assert (found[found] == np.arange(count)).all()
    assert (found == np.arange(count)).sum() == count % 2
    if count == 500:
        assert (partners(count, 0, 1) == found).mean() < 0.02 and (partners(count, 1, 0) == found).mean() < 0.02


@pytest.mark.parametrize("kind", ["random", "paged", "sequential"])
@pytest.mark.parametrize("count", [500, 501])
def test_partners_stand_together_whatever_the_order(count: int, kind: str) -> None:
    found = epoch_order(count, seed=1, epoch=2, kind=kind, augment=Augment(mixup=1.0), view_seed=3, view=4)
    assert (np.sort(found) == np.arange(count)).all()
    partner, even = partners(count, 3, 4), count // 2 * 2
    assert (partner[found[0:even:2]] == found[1:even:2]).all()
    assert count == even or partner[found[-1]] == found[-1]


def plan_of(count: int, batch_size: int, augment: Augment) -> EpochPlan:
    index = DatasetIndex(
        classes=("a", "b"),
        names=[str(number) for number in range(count)],
        labels=np.arange(count) % 2,
        sizes=np.full((count, 2), 16, np.int32),
    )
    order = epoch_order(count, seed=0, epoch=0, kind="random", augment=augment, view_seed=0, view=0)
    return EpochPlan(
        index=index, family=PadCrop(), view_seed=0, view=0, order=order, batch_size=batch_size, augment=augment
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [48, 61, 62])
def test_ranks_share_pairs_and_together_show_every_batch(count: int, ranks: int) -> None:
    plan = plan_of(count, 12, Augment(mixup=1.0))
    partner = partners(count, 0, 0)
    for start in (0, 2, plan.steps - 1):
        shares = [plan.for_rank((16,), rank=rank, world_size=ranks, start_step=start) for rank in range(ranks)]
        assert {share.batches for share in shares} == {plan.steps - start}
        for batch in range(plan.steps - start):
            parts = [share.ids[share.rows(batch)] for share in shares]
            assert (np.concatenate(parts) == plan.order[(start + batch) * 12 :][:12]).all()
            for part in parts:
                even = len(part) // 2 * 2
                assert (partner[part[0:even:2]] == part[1:even:2]).all()
                assert len(part) == even or partner[part[-1]] == part[-1]
    unmixed = plan_of(count, 12, Augment(grayscale=0.5))
    assert len(unmixed.for_rank((16,), rank=0, world_size=ranks).ids) >= count // ranks - 12


def test_batches_that_cannot_be_shared_by_pairs_are_refused() -> None:
    plan = plan_of(60, 6, Augment(mixup=1.0))
    with pytest.raises(ValueError, match="got 6 for 4 processes, expected an even number, at least two rows"):
        plan.for_rank((16,), rank=0, world_size=4)
    with pytest.raises(ValueError, match="got 5 for 1 processes, expected an even number"):
        plan_of(60, 5, Augment(mixup=1.0)).for_rank((16,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grayscale": 1.5}, "grayscale"),
        ({"mixup": -0.1}, "mixup"),
        ({"cutmix": 3.0}, "cutmix"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter"),
        ({"erasing_scale": (0.5, 0.1)}, "erasing_scale"),
        ({"erasing_ratio": (0.0, 1.0)}, "erasing_ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}: got .*expected"):
        Augment(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"magnitude": 31},
        {"space": "timm", "magnitude": 11},
        {"layers": 0},
        {"probability": 2.0},
        {"fill": (0, 0, 256)},
    ],
)
def test_randaugments_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        RandAugment(**settings)


def test_alternating_flips_mirror_every_second_view() -> None:
    ids, sizes = np.arange(4000), np.full((4000, 2), 32, np.int32)
    flips = [PadCrop(flip="alternating").boxes(3, ids, view, sizes)[1] for view in range(4)]
    assert abs(flips[0].mean() - 0.5) < 0.03
    assert (flips[0] != flips[1]).all() and (flips[0] == flips[2]).all() and (flips[1] == flips[3]).all()
    plain = PadCrop().boxes(3, ids, 0, sizes)
    assert (plain[0] == PadCrop(flip="alternating").boxes(3, ids, 0, sizes)[0]).all(), "the same boxes"
