"""CIFAR ResNets (He et al. 2015, section 4.2) and their 4x wide forms from the distillation literature.

resnetD has depth D = 6n + 2 and widths 16, 32, 64; resnetDx4 has 32, 64, 128, 256 (a stem of 32).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        layers: list[nn.Module] = []
        for stage, width in enumerate(stages):
            inputs = widths[stage]
            first = BasicBlock(inputs, width, 1 if stage == 0 else 2)
            layers.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = layers
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _build(depth: int, widths: tuple[int, int, int, int], classes: int) -> nn.Module:
    return ResNet(depth, widths, classes)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(_build, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_build, depth, (32, 64, 128, 256)) for depth in (8, 14, 20, 32, 44, 56, 110)},
}
