"""Image operations on batches of uint8 images, each row with its own numbers, as torchvision.transforms.v2 computes them.

torchvision's functions take one number for a whole batch; these take one a row, and give every row the value that
torchvision gives it alone, whatever rows are beside it: nothing is summed in floating point but what is exact, and
where torchvision's kernels multiply and add in one rounding, float64 does here (`_multiply_add`).

Every operation is a function (images uint8 [n, 3, H, W] RGB, numbers float64 [n, NUMBERS]) -> uint8 [n, 3, H, W], both on
one device. OPS lists them; `numbers` says what each reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

# Columns of `numbers`: the most that an operation reads.
NUMBERS = 8


def _each(numbers: Tensor, column: int) -> Tensor:
    """A column as [n, 1, 1, 1]."""
    return numbers[:, column, None, None, None]


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 in one rounding, as fused multiply-adds are on every device."""
    return torch.addcmul(c.double(), a.double(), b.double()).float()


def _to_uint8(images: Tensor) -> Tensor:
    return images.clamp_(0, 255).to(torch.uint8)


def _blend(images: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """images * ratio + other * (1 - ratio), cut off below the point; ratio float64 [n, 1, 1, 1], other float32."""
    return _to_uint8(_multiply_add(other, (1 - ratio).float(), images * ratio.float()))


def _gray(images: Tensor) -> Tensor:
    """Luma float32 [n, 1, H, W], whole numbers."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def brightness(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_brightness: the factor."""
    return _to_uint8(images * _each(numbers, 0).float())


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_contrast: the factor."""
    # the sum of whole numbers below 2**53 does not depend on its order
    mean = _gray(images).double().mean((1, 2, 3), keepdim=True).float()
    return _blend(images, mean, _each(numbers, 0))


def saturation(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_saturation: the factor."""
    return _blend(images, _gray(images), _each(numbers, 0))


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_sharpness: the factor. A pixel at the edge stays."""
    if min(images.shape[2:]) <= 2:
        return images
    whole = images.float()
    inner = whole[:, :, 1:-1, 1:-1]
    rows = whole[:, :, :, :-2] + whole[:, :, :, 1:-1] + whole[:, :, :, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner  # weights 1, and 5 in the middle
    blurred = (total / 13).round_()  # a whole number over 13 is never halfway between two whole numbers
    whole[:, :, 1:-1, 1:-1] = _multiply_add(blurred - inner, (1 - _each(numbers, 0)).float(), inner)
    return _to_uint8(whole)


def hue(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_hue: the shift, -0.5 to 0.5 of a turn."""
    red, green, _ = scaled = torchvision.to_dtype(images, torch.float32, scale=True).unbind(1)
    low, high = torch.stack(scaled).aminmax(dim=0)
    gray = high == low
    span = high - low
    divisor = span.masked_fill(gray, 1.0)
    saturated = span / high.masked_fill(gray, 1.0)
    from_red, from_green, from_blue = ((high - each) / divisor for each in scaled)
    is_red = high == red
    is_green = (high == green) & ~is_red
    sixths = torch.where(
        is_red, from_blue - from_green, torch.where(is_green, from_red + 2 - from_blue, from_green + 4 - from_red)
    )
    turn = ((sixths * (1 / 6) + 1).fmod_(1) + numbers[:, 0, None, None].float()).remainder_(1)
    part = turn * 6
    sector = part.floor()
    part = part - sector
    partial, rest = saturated * part, 1 - saturated
    falling = ((1 - partial) * high).clamp_(0, 1)
    rising = ((partial + rest) * high).clamp_(0, 1)
    values = torch.stack([high, rest * high, falling, rising], 1)
    # which of high, low, falling and rising is red, green and blue in each sixth of a turn
    places = torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]], device=images.device)
    chosen = places[:, sector.long().remainder_(6)].transpose(0, 1)
    return torchvision.to_dtype(values.gather(1, chosen), torch.uint8, scale=True)


def posterize(images: Tensor, numbers: Tensor) -> Tensor:
    """posterize: bits that are kept, 0 to 8."""
    return images & (256 - torch.exp2(8 - _each(numbers, 0))).to(torch.uint8)


def solarize(images: Tensor, numbers: Tensor) -> Tensor:
    """solarize: the value from which on pixels are inverted."""
    return torch.where(images >= _each(numbers, 0).float(), 255 - images, images)


def solarize_add(images: Tensor, numbers: Tensor) -> Tensor:
    """timm's solarize_add: what is added to pixels below 128."""
    brighter = (images.short() + _each(numbers, 0).short()).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def autocontrast(images: Tensor, numbers: Tensor) -> Tensor:
    """autocontrast; reads no number."""
    return torchvision.autocontrast(images)


def equalize(images: Tensor, numbers: Tensor) -> Tensor:
    """equalize; reads no number."""
    return torchvision.equalize(images)


def invert(images: Tensor, numbers: Tensor) -> Tensor:
    """invert; reads no number."""
    return torchvision.invert(images)


def grayscale(images: Tensor, numbers: Tensor) -> Tensor:
    """rgb_to_grayscale with three channels; reads no number."""
    return torchvision.rgb_to_grayscale(images, num_output_channels=3)


def affine(images: Tensor, numbers: Tensor, *, mode: str, fill: tuple[int, int, int]) -> Tensor:
    """affine and rotate of square images: the inverse map.

    numbers: the matrix m00, m01, m10, m11 from output to input; 1 if it maps about the top left corner, 0 about the
    centre; translation right and down, pixels. `mode` is nearest or bilinear; fill is the colour from outside (black:
    blended as padding with zeros).
    """
    size = images.shape[-1]
    assert images.shape[-2] == size
    m00, m01, m10, m11, corner, right, down, _ = numbers.unbind(1)
    centre = corner * (-0.5 * size)  # of the map, seen from the image's centre
    third_x = centre - m00 * (centre + right) - m01 * (centre + down)
    third_y = centre - m10 * (centre + right) - m11 * (centre + down)
    half = torch.tensor(0.5 * size, dtype=torch.float32, device=images.device)
    x = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, device=images.device)

    def position(by_x: Tensor, by_y: Tensor, offset: Tensor) -> Tensor:
        by_x, by_y, offset = (each.float()[:, None, None] / half for each in (by_x, by_y, offset))
        return x * by_x + x[:, None] * by_y + offset  # [n, H, W]

    grid = torch.stack([position(m00, m01, third_x), position(m10, m11, third_y)], -1)
    pixels = images.float()
    if not any(fill):
        pixels = F.grid_sample(pixels, grid, mode=mode, padding_mode="zeros", align_corners=False)
        return pixels.round_().to(torch.uint8)
    inside = torch.ones_like(pixels[:, :1])
    pixels = F.grid_sample(
        torch.cat([pixels, inside], 1), grid, mode=mode, padding_mode="zeros", align_corners=False
    )
    pixels, inside = pixels[:, :3], pixels[:, 3:]
    colour = torch.tensor(fill, dtype=torch.float32, device=images.device)[:, None, None]
    if mode == "nearest":
        pixels = torch.where(inside < 0.5, colour, pixels)
    else:
        pixels = pixels.sub_(colour).mul_(inside).add_(colour)
    return pixels.round_().to(torch.uint8)


def erase(images: Tensor, numbers: Tensor) -> Tensor:
    """erase: top, left, height and width in pixels, then the colour's red, green and blue."""
    return torch.where(_inside(images, numbers), numbers[:, 4:7, None, None].to(torch.uint8), images)


def mix(images: Tensor, partners: Tensor, own: Tensor, box: Tensor) -> Tensor:
    """timm's mixup and cutmix of uint8 images: `own` of each image, the rest of its partner's; and a box of the partner's.

    own: float32 [n]. box: float64 or int64 [n, 4] top, left, height, width in pixels; of size 0 for none.
    """
    own = own[:, None, None, None]
    blended = (images.float() * own).add_(partners.float() * (1 - own)).round_().to(torch.uint8)
    return torch.where(_inside(images, box), partners, blended)


def _inside(images: Tensor, box: Tensor) -> Tensor:
    """Which pixels lie in each row's box, bool [n, 1, H, W]."""
    top, left, height, width = (each[:, None] for each in box.unbind(1)[:4])
    down = torch.arange(images.shape[-2], device=images.device)
    right = torch.arange(images.shape[-1], device=images.device)
    rows = (down >= top) & (down < top + height)  # [n, H]
    columns = (right >= left) & (right < left + width)  # [n, W]
    return rows[:, None, :, None] & columns[:, None, None, :]


Op = Callable[[Tensor, Tensor], Tensor]

# The place of an operation in a plan's table is its number there.
OPS: dict[str, Op] = {
    each.__name__: each
    for each in (
        brightness,
        contrast,
        saturation,
        sharpness,
        hue,
        posterize,
        solarize,
        solarize_add,
        autocontrast,
        equalize,
        invert,
        grayscale,
        erase,
    )
}
