"""What the families share."""

from __future__ import annotations

from torch import Tensor, nn


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution that keeps the size at stride 1, BatchNorm, and ReLU unless `relu` is false."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channels [n, g * c, H, W] dealt out as [n, c * g, H, W], so that the next groups mix (ShuffleNet)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def pool(x: Tensor) -> Tensor:
    """Means [n, c] over the pixels of [n, c, H, W]."""
    return x.mean((2, 3))


def initialize(network: nn.Module, *, classifier_std: float | None = None) -> None:
    """He initialisation of every convolution by its outputs; biases 0; the final layer normal if a std is given."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and classifier_std is not None:
            nn.init.normal_(module.weight, 0, classifier_std)
            nn.init.zeros_(module.bias)
