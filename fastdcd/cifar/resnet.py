"""CIFAR ResNets (He et al. 2015, section 4.2), their 4x wide forms, and ResNet-50, as in the distillation literature.

resnetD has depth D = 6n + 2 and widths 16, 32, 64; resnetDx4 has 64, 128, 256 (a stem of 32). resnet50 is
ImageNet's network of bottlenecks with a 3x3 stem of stride 1 and no max-pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastdcd.cifar.layers import convolution, initialize, pool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, and a shortcut, projected where the shape changes."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return convolution(inputs, outputs, 1, stride, relu=False)


class ResNet(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        stem: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
    ) -> None:
        """Stage i has blocks[i] blocks of widths[i]; every stage but the first halves the image."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        inputs, stages = stem, list[nn.Module]()
        for width, count in zip(widths, blocks, strict=True):
            layers: list[nn.Module] = []
            for number in range(count):
                layers.append(block(inputs, width, 2 if stages and number == 0 else 1))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*layers))
            self.add_module(f"layer{len(stages)}", stages[-1])
        self.stages = len(stages)
        self.fc = nn.Linear(inputs, classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(pool(x))


def _basic(depth: int, stem: int, widths: Sequence[int], classes: int) -> nn.Module:
    return ResNet(BasicBlock, stem, widths, [(depth - 2) // 6] * 3, classes)


def _resnet50(classes: int) -> nn.Module:
    return ResNet(Bottleneck, 64, (64, 128, 256, 512), (3, 4, 6, 3), classes)


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(_basic, depth, 16, (16, 32, 64)) for depth in _DEPTHS},
    **{f"resnet{depth}x4": partial(_basic, depth, 32, (64, 128, 256)) for depth in _DEPTHS},
    "resnet50": _resnet50,
}
