"""Host work per second of CPU time, beside any decoding: files of a folder and of shards into DALI, rows of a cache.

A GPU wants 15,000 to 20,000 images/s of each of its processes; what the host does for an image must cost little beside that.
Every figure is units per second of CPU time of this process, all threads together, so that a busy machine does not blur it.

    python benchmarks/host_feed.py --source IMAGENET_CLASS_FOLDERS
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
from torch import nn

from benchmarks import loaders, record
from fastdcd import cli
from fastdcd.cache.store import Manifest, TeacherCache
from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.formats.stored import PackedSamples

BATCH = 256


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="host_feed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--images", type=int, default=2048, help="linked under other names if fewer")
    parser.add_argument("--rows", type=int, default=200_000, help="of the cache")
    parser.add_argument("--seconds", type=float, default=3.0, help="of CPU time, for each figure")
    parser.add_argument("--name", default="host-feed-cpu", help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, work in parts(arguments, Path(scratch)):
            rates[name] = record.spread(per_second(work, arguments.seconds))
    table = ["| what | units per second of CPU time |", "|---|---|"]
    table += [f"| {name} | {record.text(rate, 0)} |" for name, rate in rates.items()]
    record.write(
        arguments.name, {"batch_size": BATCH, "images": arguments.images, "rates": rates}, "\n".join(table)
    )
    return 0


def parts(arguments: argparse.Namespace, scratch: Path) -> list[tuple[str, Callable[[int], None]]]:
    """Name and work of each figure: `work(turn)` does one batch."""
    root = loaders.prepare(arguments.source, scratch, arguments.images)
    shards = scratch / "shards"
    to_shards(Job(sources=open_sources(root), out=shards, workers=1), Storage())
    rng = np.random.default_rng(0)
    made: list[tuple[str, Callable[[int], None]]] = []
    for name, path in [("folder into DALI, 1 worker", root), ("shards into DALI", shards)]:
        made.append((name, feed(path, rng)))
    for dim, dtype in [(512, "fp16"), (2048, "fp16"), (512, "uint8")]:
        made.append(
            (f"cache.read, {dim} {dtype}", read(scratch / f"cache-{dim}-{dtype}", dim, dtype, arguments.rows, rng))
        )
    return made


def feed(path: Path, rng: np.random.Generator) -> Callable[[int], None]:
    """Encoded files of random samples, as DALI's pipeline gets them."""
    loader = open_loader("dali", path, LoaderOptions(workers=1))
    batches = rng.permutation(len(loader.index))[: len(loader.index) // BATCH * BATCH].reshape(-1, BATCH)

    def work(turn: int) -> None:
        ids = batches[turn % len(batches)]
        if isinstance(loader._stored, PackedSamples):  # type: ignore[attr-defined]
            loader._stored.will_need(ids)  # type: ignore[attr-defined]
        loader._fetch(ids)  # type: ignore[attr-defined]

    return work


def read(folder: Path, dim: int, dtype: str, rows: int, rng: np.random.Generator) -> Callable[[int], None]:
    """Rows of a complete view, in random order."""
    manifest = Manifest(rows=rows, dim=dim, views=1, dtype=dtype, fingerprint={})
    cache = TeacherCache.create(folder, manifest, nn.Linear(dim, 2))
    cache.view(0).start()
    for ids in torch.arange(rows).split(1 << 14):
        cache.view(0).write(ids, torch.rand(len(ids), dim))
    cache.flush()
    cache.view(0).finish()
    batches = torch.from_numpy(rng.permutation(rows)[: rows // BATCH * BATCH].reshape(-1, BATCH))

    def work(turn: int) -> None:
        cache.view(0).read(batches[turn % len(batches)])

    return work


def per_second(work: Callable[[int], None], seconds: float) -> list[float]:
    """Units per second of CPU time, in ten turns, after one to warm up."""
    found: list[float] = []
    done = 0
    for _ in range(11):
        begin, first = time.process_time(), done
        while time.process_time() - begin < seconds / 11:
            work(done)
            done += 1
        found.append(BATCH * (done - first) / (time.process_time() - begin))
    return found[1:]


if __name__ == "__main__":
    cli.run(main)
