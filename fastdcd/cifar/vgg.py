"""VGG with BatchNorm for small images (Simonyan, Zisserman 2014), one linear layer, as in the distillation literature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastdcd.cifar.layers import initialize, pool

WIDTHS = (64, 128, 256, 512, 512)
# 3x3 convolutions in each of the five stages; the depth counts three linear layers of the original.
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 8x8 up.

    The first three stages end in 2x2 max-pooling, the last two see the same size, then comes the mean.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True)):
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            if stage < 3:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pool(self.features(images)))


def _build(depth: int, classes: int) -> nn.Module:
    return VGG(depth, classes)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {f"vgg{depth}": partial(_build, depth) for depth in CONVOLUTIONS}
