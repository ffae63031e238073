"""A network of your own is a function that takes num_classes: model: configs/digits/tiny.py:tiny."""

from torch import nn


def tiny(num_classes: int) -> nn.Module:
    """Two thin convolutions for 8x8 images [n, 3, 8, 8]: about a thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
