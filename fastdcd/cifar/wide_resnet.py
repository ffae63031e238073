"""Wide ResNets (Zagoruyko, Komodakis 2016): wrn-D-W has depth D = 6n + 4 and widths 16W, 32W, 64W."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastdcd.cifar.layers import initialize, pool


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        for stage in range(3):
            inputs, outputs = widths[stage], widths[stage + 1]
            first = PreActivationBlock(inputs, outputs, 1 if stage == 0 else 2)
            layers.append(
                nn.Sequential(first, *(PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
            )
        self.layer1, self.layer2, self.layer3 = layers
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(pool(F.relu(self.bn1(x))))


def _build(depth: int, width: int, classes: int) -> nn.Module:
    return WideResNet(depth, width, classes)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    f"wrn-{depth}-{width}": partial(_build, depth, width)
    for depth in (10, 16, 22, 28, 40)
    for width in (1, 2, 4, 8, 10)
}
