"""Train a linear classifier on a network's frozen features, by the transfer protocol of the DCD paper."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from fastdcd import cli, config_file, linear_probe
from fastdcd.evaluate import Accuracy
from pipelines.base import LoaderOptions
from pipelines.files import user_path
from pipelines.image_folder import user_cache
from pipelines.published_datasets import open_pair


class Row(NamedTuple):
    """What the table says of one checkpoint on one data set."""

    checkpoint: Path
    data: Path
    train_images: int
    test_images: int
    classes: int
    features: int
    accuracy: Accuracy
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a linear classifier on a network's frozen features and print its accuracy. The settings "
        "are those of the DCD paper's transfer experiments: SGD, 120 epochs.",
        epilog="example: python tools/linear_probe.py --checkpoint runs/cifar100/resnet8x4/student.safetensors "
        "--data data/stl10_binary data/tiny-imagenet-200",
    )
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="weights: .safetensors or .pth",
    )
    parser.add_argument(
        "--data",
        type=user_path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="train/ and val/ or test/ of class folders or converted, STL-10's binary files, or Tiny ImageNet",
    )
    config_file.add_overrides(parser)
    arguments = parser.parse_args()
    jobs = [(path, linear_probe.settings(path, arguments.set)) for path in arguments.checkpoint]
    rows = [run(path, data, cfg) for data in arguments.data for path, cfg in jobs]
    print(table(rows))
    return 0


def run(checkpoint: Path, data: Path, cfg: linear_probe.Probe) -> Row:
    started = time.perf_counter()
    device = torch.device(cfg.data.device if cfg.data.device != "auto" else _best_device())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("data.device: got cuda, but torch finds no GPU; set data.device=cpu or auto")
    frozen = linear_probe.load_frozen(cfg.student, checkpoint, device)
    train, test = open_pair(data, LoaderOptions(workers=cfg.data.workers, device=device, index_cache=user_cache()))
    with train, test:
        parts = [
            linear_probe.extract(frozen, loader, crop_ratio=cfg.data.crop_ratio, device=device)
            for loader in (train, test)
        ]
        classes = len(train.index.classes)
    classifier = linear_probe.fit(parts[0], classes=classes, cfg=cfg)
    return Row(
        checkpoint=checkpoint,
        data=data,
        train_images=len(parts[0].labels),
        test_images=len(parts[1].labels),
        classes=classes,
        features=parts[0].features.shape[1],
        accuracy=linear_probe.accuracy(classifier, parts[1]),
        seconds=time.perf_counter() - started,
    )


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def table(rows: list[Row]) -> str:
    """A Markdown table that is aligned, too."""
    cells: list[tuple[str, ...]] = [
        ("checkpoint", "data", "train / test images", "classes", "features", "top-1 %", "top-5 %", "seconds")
    ]
    cells += [
        (
            str(row.checkpoint),
            str(row.data),
            f"{row.train_images} / {row.test_images}",
            str(row.classes),
            str(row.features),
            f"{row.accuracy.top1:.2f}",
            f"{row.accuracy.top5:.2f}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


if __name__ == "__main__":
    cli.run(main)
