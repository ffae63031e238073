"""ShuffleNetV1 (Zhang et al. 2017, 3 groups) and V2 (Ma et al. 2018, 1x) for small images, as in the distillation
literature: a 1x1 stem of stride 1 and no max-pooling, so that 32x32 images end at 4x4."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcd.cifar.layers import convolution, pool, shuffle_channels

STEM = 24
GROUPS = 3


class UnitV1(nn.Module):
    """Grouped 1x1, channel shuffle, 3x3 a channel, grouped 1x1, beside a shortcut.

    At stride 2 the shortcut is average pooling and is concatenated, so that outputs includes its inputs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        width = added // 4
        self.groups = 1 if inputs == STEM else GROUPS
        self.reduce = convolution(inputs, width, 1, groups=self.groups)
        self.filter = convolution(width, width, 3, stride, groups=width)
        self.expand = convolution(width, added, 1, groups=GROUPS, relu=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.filter(shuffle_channels(self.reduce(x), self.groups)))
        return F.relu(x + y if self.stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class ShuffleNetV1(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, STEM, 1)]
        inputs = STEM
        for outputs, units in ((240, 4), (480, 8), (960, 4)):
            layers.append(UnitV1(inputs, outputs, 2))
            layers += [UnitV1(outputs, outputs, 1) for _ in range(units - 1)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pool(self.features(images)))


class UnitV2(nn.Module):
    """Half of the channels pass, the other half go through 1x1, 3x3 a channel, 1x1; then a shuffle of two groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            convolution(half, half, 1),
            convolution(half, half, 3, groups=half, relu=False),
            convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = x.chunk(2, 1)
        return shuffle_channels(torch.cat([passed, self.branch(changed)], 1), 2)


class DownUnitV2(nn.Module):
    """Two branches of stride 2 over all channels, concatenated and shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            convolution(inputs, inputs, 3, 2, groups=inputs, relu=False), convolution(inputs, half, 1)
        )
        self.right = nn.Sequential(
            convolution(inputs, half, 1),
            convolution(half, half, 3, 2, groups=half, relu=False),
            convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_channels(torch.cat([self.left(x), self.right(x)], 1), 2)


class ShuffleNetV2(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, STEM, 1)]
        inputs = STEM
        for outputs, units in ((116, 4), (232, 8), (464, 4)):
            layers.append(DownUnitV2(inputs, outputs))
            layers += [UnitV2(outputs) for _ in range(units - 1)]
            inputs = outputs
        layers.append(convolution(inputs, 1024, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1024, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pool(self.features(images)))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {"ShuffleNetV1": ShuffleNetV1, "ShuffleNetV2": ShuffleNetV2}
