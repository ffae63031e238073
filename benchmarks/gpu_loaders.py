"""Images per second that reach the GPU, by loader, image size and share of the JPEG engine. One run, epochs in turns.

Every variant brings training crops of uint8 to the device and does nothing with them. DALI decodes there, by its
engine (`hw`: the share of JPEGs it gets; it decodes whole images) and by CUDA kernels (only the part around the box);
FFCV and torch decode on CPU cores. The ceiling beside them is torchvision's batched decoder on the GPU: all files in
memory, decoded only, and decoded, cropped and resized. A variant that cannot run here is named with its reason.

    python benchmarks/gpu_loaders.py --source IMAGENET_CLASS_FOLDERS
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from benchmarks import loaders, record
from fastdcd import cli
from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.plan import EpochPlan, RankPlan, order
from pipelines.prefetch import prefetch
from pipelines.views import RandomResizedCrop

Epoch = Callable[[], int]  # brings all images to the device; how many they were
SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)  # of the JPEG engine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_loaders.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--images", type=int, default=8192, help="of an epoch; linked under other names if fewer")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 160])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the JPEG engine")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="gpu-loaders", help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as exits:
        epochs: dict[str, Epoch] = {}
        for name, make in variants(arguments, Path(scratch), device, exits):
            try:  # open, warm up, compile
                epochs[name] = make()
                epochs[name]()
            except (ValueError, RuntimeError) as error:
                epochs.pop(name, None)
                failed[name] = str(error).splitlines()[0]
        turns = random.Random(0)
        for _ in tqdm(range(arguments.rounds), "rounds", disable=None):
            for name in turns.sample(list(epochs), len(epochs)):
                begin = time.perf_counter()
                seen = epochs[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates.setdefault(name, []).append(seen / (time.perf_counter() - begin))
    write(arguments, rates, failed)
    return 0


def variants(
    arguments: argparse.Namespace, scratch: Path, device: torch.device, exits: ExitStack
) -> Iterator[tuple[str, Callable[[], Epoch]]]:
    """Name of every variant, and what opens it."""
    root = loaders.prepare(arguments.source, scratch, arguments.images)
    sources = open_sources(root)
    shards, beton = scratch / "shards", scratch / "400.beton"
    to_shards(Job(sources=sources, out=shards, workers=arguments.workers), Storage())
    to_beton(Job(sources=sources, out=beton, workers=arguments.workers), Storage(max_size=400))

    def ours(backend: str, path: Path, size: int, share: float = 0.0) -> Callable[[], Epoch]:
        options = LoaderOptions(workers=arguments.workers, device=device, own={"hw_decoder_load": share})
        return lambda: our_epoch(backend, path, options, size, arguments.batch_size, exits)

    for size in arguments.sizes:
        for share in arguments.shares:
            yield f"dali, 500 px shards, hw {share:g}, {size} px", ours("dali", shards, size, share)
        best = 0.65 if 0.65 in arguments.shares else arguments.shares[0]
        yield f"dali, folder of originals, hw {best:g}, {size} px", ours("dali", root, size, best)
        yield f"ffcv, 400 px half raw, {size} px", ours("ffcv", beton, size)
        yield f"torch, folder of originals, {size} px", ours("torch", root, size)
        yield (
            f"torchvision, batched decode and crop, {size} px",
            lambda size=size: decoder(  # type: ignore[misc]
                root, arguments, device, size
            ),
        )
    yield "torchvision, batched decode only", lambda: decoder(root, arguments, device, None)


def our_epoch(
    backend: str, path: Path, options: LoaderOptions, size: int, batch_size: int, exits: ExitStack
) -> Epoch:
    """One of our loaders with the plan of ImageNet training, through the prefetching of the train loop."""
    loader = exits.enter_context(open_loader(backend, path, options))
    numbers = iter(range(1 << 30))

    def epoch() -> int:
        batches = loader.epoch(for_rank(loader.index, next(numbers), size, batch_size))
        return sum(len(batch.ids) for batch, _ in prefetch(batches, lambda ids: None, options.device))

    return epoch


def for_rank(index: Any, epoch: int, size: int, batch_size: int) -> RankPlan:
    plan = EpochPlan(
        index=index,
        family=RandomResizedCrop(),
        view_seed=0,
        view=epoch,
        order=order(len(index), seed=0, epoch=epoch),
        batch_size=batch_size,
    )
    return plan.for_rank((size,))


def decoder(root: Path, arguments: argparse.Namespace, device: torch.device, size: int | None) -> Epoch:
    """torchvision's decoder, given whole batches of files that lie in memory."""
    files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in sorted(root.glob("*/*"))]
    files = [file for file in files if bytes(file[:2].tolist()) == b"\xff\xd8"]  # JPEGs
    boxes = random.Random(0)

    def crop(image: Tensor, size: int) -> Tensor:
        height, width = (round(side * boxes.uniform(0.5, 1)) for side in image.shape[-2:])
        return transforms.resized_crop(image, 0, 0, height, width, [size, size], antialias=True)

    def epoch() -> int:
        for first in range(0, len(files), arguments.batch_size):
            batch = files[first : first + arguments.batch_size]
            images: list[Tensor] = decode_jpeg(batch, mode="RGB", device=device)
            if size is not None:
                torch.stack([crop(image, size) for image in images])
        return len(files)

    return epoch


def write(arguments: argparse.Namespace, rates: dict[str, list[float]], failed: dict[str, str]) -> None:
    found = {name: record.spread(values) for name, values in rates.items()}
    table = ["| loader | images/s, median (quartiles) |", "|---|---|"]
    table += [f"| {name} | {record.text(value, 0)} |" for name, value in found.items()]
    table += [f"| {name} | did not run: {reason} |" for name, reason in failed.items()]
    table += [
        "",
        f"{arguments.images} crops an epoch in batches of {arguments.batch_size}, {arguments.workers} workers.",
    ]
    record.write(arguments.name, {"images_per_second": found, "did_not_run": failed}, "\n".join(table))


if __name__ == "__main__":
    cli.run(main)
