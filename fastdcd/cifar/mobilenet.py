"""MobileNetV2 (Sandler et al. 2018) at half width for small images, as in the distillation literature."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastdcd.cifar.layers import convolution, initialize, pool

# Expansion, channels at full width, blocks, stride of the first block: the paper's table 2, but the second
# stage keeps the size. With the stem's stride, 32x32 images end at 2x2.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by a 1x1, filter each channel by a 3x3, project by a linear 1x1; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.layers = nn.Sequential(
            convolution(inputs, width, 1),
            convolution(width, width, 3, stride, groups=width),
            convolution(width, outputs, 1, relu=False),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """Images [n, 3, H, W] to logits [n, classes]; made for 32x32, works from 16x16 up."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        inputs = 32 // 2
        layers: list[nn.Module] = [convolution(3, inputs, 3, 2)]
        for expansion, channels, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(InvertedResidual(inputs, channels // 2, stride if number == 0 else 1, expansion))
                inputs = channels // 2
        layers.append(convolution(inputs, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pool(self.features(images)))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {"MobileNetV2": MobileNetV2}
