"""Throughput of the loaders beside their stock counterparts: same images, same output, alternated in one run.

Every variant makes training crops of 224 px, uint8, two workers. Epochs of all variants take turns, so that a busy
machine slows them alike; ratios are of medians. Run it on an idle machine for absolute figures. Images per second of
processor time, of the process and its workers, move less on a busy one, and say what one core is worth.

    python benchmarks/loaders.py --source IMAGENET_CLASS_FOLDERS [--images 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import psutil
import torch

from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.files import write_json
from pipelines.plan import EpochPlan, order
from pipelines.views import RandomResizedCrop

SIZE, BATCH, WORKERS = 224, 64, 2
PER_SHARD = 250
Epoch = Callable[[], int]  # runs one epoch and returns the number of images seen


def ours(backend: str, path: Path, exits: ExitStack) -> Epoch:
    """One of our loaders with the plan of ImageNet training."""
    loader = exits.enter_context(open_loader(backend, path, LoaderOptions(workers=WORKERS)))
    numbers = iter(range(1 << 30))

    def epoch() -> int:
        number = next(numbers)
        plan = EpochPlan(
            index=loader.index,
            family=RandomResizedCrop(),
            view_seed=0,
            view=number,
            order=order(len(loader.index), seed=0, epoch=number),
            batch_size=BATCH,
        )
        return sum(len(batch.ids) for batch in loader.epoch(plan.for_rank((SIZE,))))

    return epoch


def stock_torchvision(path: Path, exits: ExitStack) -> Epoch:
    """ImageFolder, PIL, RandomResizedCrop, RandomHorizontalFlip, as in PyTorch's ImageNet example."""
    from torchvision import datasets
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(path, transform), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(images) for images, _ in loader)


def stock_webdataset(tars: list[str]) -> Epoch:
    """The webdataset package, PIL and torchvision, as in its README; every worker has tars of its own."""
    import webdataset
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode("pilrgb")
    loader = webdataset.WebLoader(
        samples.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH, collation_fn=_collate),
        batch_size=None,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    return lambda: sum(len(images) for images, _ in loader)


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def stock_dali(reader: Callable[[Any], Any], count: int) -> Epoch:
    """A reader of DALI's own, decoders.image_random_crop, resize, mirror; tensors without a copy, as in DALI's iterators.

    An epoch begins and ends with an empty pipeline, as in every other loader. DALI would make two batches ahead
    for the next epoch, in the time of whoever runs in between.
    """
    from nvidia.dali import fn, pipeline_def, types

    ahead = 2

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=ahead)
    def pipeline() -> Any:
        jpeg, label = reader(fn)
        image = fn.decoders.image_random_crop(jpeg, output_type=types.RGB, random_area=[0.08, 1.0])
        image = fn.resize(image, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(image, horizontal=fn.random.coin_flip()), label

    pipe = pipeline()
    pipe.build()

    def take() -> int:
        images, _ = pipe.share_outputs()
        seen = len(torch.from_dlpack(images.as_tensor()))
        pipe.release_outputs()
        return seen

    pipe.schedule_run()  # the first call schedules `ahead` batches, every other call one
    for _ in range(ahead):
        take()

    def epoch() -> int:
        batches, seen = -(-count // BATCH), 0
        for number in range(batches + ahead - 1):  # what pipe.run() does
            if number < batches:
                pipe.schedule_run()
            if number >= ahead - 1:
                seen += take()
        return seen

    return epoch


def stock_ffcv(path: Path) -> Epoch:
    """FFCV's Loader with the pipeline of its ImageNet recipe, up to the tensor."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return lambda: sum(len(images) for images, _ in loader)


def prepare(source: Path, scratch: Path, count: int) -> Path:
    """`count` links to the images of `source` in its class folders, again under other names if it has fewer."""
    sources = open_sources(source)
    root = scratch / "originals"
    for number in range(count):
        name = sources.names[number % len(sources)]
        link = root / name.split("/")[0] / f"{number:06d}{Path(name).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source / name).resolve())
    return root


def variants(root: Path, scratch: Path, exits: ExitStack, only: list[str]) -> Iterator[tuple[str, Epoch]]:
    """Name and epoch of every variant; the stock one before ours."""
    sources = open_sources(root)

    def job(name: str) -> Job:
        return Job(sources=sources, out=scratch / name, workers=WORKERS)

    count = len(sources)
    if "originals" in only:
        yield "originals: stock torchvision", stock_torchvision(root, exits)
        yield "originals: ours, torch", ours("torch", root, exits)
        folder = {"file_root": str(root), "random_shuffle": True, "name": "reader"}
        yield "originals: stock DALI", stock_dali(lambda fn: fn.readers.file(**folder), count)
        yield "originals: ours, dali", ours("dali", root, exits)
    if "500 px shards" in only:
        to_shards(job("shards"), Storage(max_size=500), shard_size=PER_SHARD)
        tars = sorted(map(str, (scratch / "shards").glob("*.tar")))
        indexes = [str(Path(tar).with_suffix(".idx")) for tar in tars]
        shards = {"paths": tars, "index_paths": indexes, "ext": ["jpg", "cls"], "random_shuffle": True}
        yield "500 px shards: stock webdataset", stock_webdataset(tars)
        yield "500 px shards: ours, torch", ours("torch", scratch / "shards", exits)
        yield "500 px shards: stock DALI", stock_dali(lambda fn: fn.readers.webdataset(**shards), count)
        yield "500 px shards: ours, dali", ours("dali", scratch / "shards", exits)
    for name, max_size, jpeg in (
        ("500 px half raw", 500, 0.5),
        ("500 px JPEG", 500, 1.0),
        ("256 px JPEG", 256, 1.0),
    ):
        if name in only:
            path = scratch / f"{name}.beton"
            to_beton(job(path.name), Storage(max_size=max_size, jpeg=jpeg))
            yield f"{name}: stock FFCV", stock_ffcv(path)
            yield f"{name}: ours, ffcv", ours("ffcv", path, exits)


DATASETS = ("originals", "500 px shards", "500 px half raw", "500 px JPEG", "256 px JPEG")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=list(DATASETS), help="some of the datasets")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/loaders-cpu"), help="without .json, .md"
    )
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {}
    per_cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
        scratch = Path(folder)
        root = prepare(arguments.source, scratch, arguments.images)
        epochs = dict(variants(root, scratch, exits, arguments.only))
        for number in range(arguments.rounds + 1):  # the first round warms up and compiles
            for name, epoch in epochs.items():
                start, busy = time.perf_counter(), cpu_seconds()
                seen = epoch()
                rate, on_cpu = seen / (time.perf_counter() - start), seen / (cpu_seconds() - busy)
                if number:
                    rates.setdefault(name, []).append(rate)
                    per_cpu.setdefault(name, []).append(on_cpu)
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
    write_results(arguments, rates, per_cpu)
    return 0


def cpu_seconds() -> float:
    """Processor time of this process and the workers that it has."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def write_results(
    arguments: argparse.Namespace, rates: dict[str, list[float]], per_cpu: dict[str, list[float]]
) -> None:
    """The table in Markdown, and all rates in JSON with what they were measured on."""
    about = {
        "command": f"python benchmarks/loaders.py --source DIR --images {arguments.images} --rounds {arguments.rounds}"
        + (
            ""
            if len(arguments.only) == len(DATASETS)
            else f" --only {shlex.join(arguments.only)} --out {arguments.out}"
        ),
        "images": f"{arguments.images} crops an epoch, of the distinct photographs in DIR, linked under other names",
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "ffcv", "nvidia-dali-cuda130", "numba")
        },
    }
    median = {name: statistics.median(values) for name, values in rates.items()}
    base = median.get("originals: stock torchvision")
    worth = {name: statistics.median(values) for name, values in per_cpu.items()}
    lines = [
        "| data: loader | images/s, median (spread) | to stock on the same data | to stock torchvision "
        "| images per CPU second | to stock on the same data |",
        "|---|---|---|---|---|---|",
    ]
    stock = None
    for name, values in rates.items():
        if ": stock" in name:
            stock = name
        paired = [a / b for a, b in zip(values, rates[stock], strict=True)] if stock else []
        own = f"{statistics.median(paired):.2f}" if paired and stock != name else ""
        whole = f"{median[name] / base:.2f}" if base else ""
        core = f"{worth[name] / worth[stock]:.2f}" if stock and stock != name else ""
        lines.append(
            f"| {name} | {median[name]:.0f} ({min(values):.0f}-{max(values):.0f}) | {own} | {whole} "
            f"| {worth[name]:.0f} | {core} |"
        )
    head = "\n".join(f"- {key}: {json.dumps(value)}" for key, value in about.items())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out.with_suffix(".json"), {**about, "rates": rates, "per_cpu": per_cpu})
    text = (
        "# Loaders on the CPU\n\nCompare rows, not machines. Ratios to stock are "
        f"medians over rounds.\n\n{head}\n\n" + "\n".join(lines) + "\n"
    )
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
