"""The resident loader beside a torch DataLoader with the same augmentation, on the same images.

The DataLoader is what CIFAR training code uses: torchvision's dataset of PIL images, RandomCrop(32, padding=4),
RandomHorizontalFlip, and a uint8 tensor out (ours leaves normalisation to the model too). Epochs alternate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import record
from fastdcd import cli
from pipelines.base import LoaderOptions, open_loader
from pipelines.plan import EpochPlan, order
from pipelines.views import PadCrop


class Images(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision.datasets.CIFAR100 gives them: an array in memory, a PIL image a sample, transformed."""

    def __init__(self, folder: Path) -> None:
        self.images = np.ascontiguousarray(np.load(folder / "images.npy"))
        self.labels = np.load(folder / "labels.npy").tolist()
        size = self.images.shape[1]
        self.transform = transforms.Compose(
            [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def main() -> int:
    parser = argparse.ArgumentParser(prog="resident.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="written by convert.py resident")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    theirs = DataLoader(
        Images(arguments.data),
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )
    ours = open_loader("resident", arguments.data, LoaderOptions())
    count = len(ours.index)
    rates: dict[str, list[float]] = {"torch DataLoader": [], "resident": []}
    for epoch in range(arguments.repeats + 1):
        begin = time.perf_counter()
        seen = sum(len(images) for images, _ in theirs)
        middle = time.perf_counter()
        plan = EpochPlan(
            index=ours.index,
            family=PadCrop(),
            view_seed=0,
            view=epoch,
            order=order(count, seed=0, epoch=epoch),
            batch_size=arguments.batch_size,
        )
        seen += sum(
            len(batch.ids) for batch in ours.epoch(plan.for_rank((32,)))
        )  # the plan's time is ours to bear
        end = time.perf_counter()
        assert seen == 2 * count
        if epoch:  # the first starts the workers
            rates["torch DataLoader"].append(count / (middle - begin))
            rates["resident"].append(count / (end - middle))
    ours.close()
    ratios = [a / b for a, b in zip(rates["resident"], rates["torch DataLoader"], strict=True)]
    table = "\n".join(
        [
            "| loader | images per second, as a ratio |",
            "|---|---|",
            f"| torch DataLoader, PIL, {arguments.workers} workers | 1 |",
            f"| resident | {record.text(record.spread(ratios), 1)} |",
        ]
    )
    results = {name: record.spread(values) for name, values in rates.items()}
    record.write(
        "resident-cpu",
        {"images": count, "images_per_second": results, "ratio": record.spread(ratios)},
        table,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
