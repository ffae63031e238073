"""The FFCV loader on a file larger than memory, under several ranks: images per second and memory, random and paged order.

Every rank is a process that decodes its share of an epoch of training crops; the file's pages are dropped before.
Run it in a memory cgroup smaller than the file, else all of it stays in memory:

    mkdir /sys/fs/cgroup/memory/small && echo 1G > /sys/fs/cgroup/memory/small/memory.limit_in_bytes
    echo $$ > /sys/fs/cgroup/memory/small/tasks
    python benchmarks/larger_than_memory.py data/imagenet-raw.beton
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

from benchmarks import record
from benchmarks.cache_memory import own_bytes
from fastdcd import cli
from pipelines.base import LoaderOptions, open_loader
from pipelines.files import memory_bytes
from pipelines.plan import EpochPlan, order
from pipelines.views import RandomResizedCrop

SIZE, BATCH = 224, 64
ORDERS = ("random", "paged")


def one_rank(path: Path, kind: str, rank: int, ranks: int, epoch: int) -> dict[str, float]:
    """Decode this rank's share of an epoch."""
    with open_loader("ffcv", path, LoaderOptions(workers=1)) as loader:
        plan = EpochPlan(
            index=loader.index,
            family=RandomResizedCrop(),
            view_seed=0,
            view=epoch,
            order=order(len(loader.index), seed=0, epoch=epoch, kind=kind),
            batch_size=BATCH * ranks,
        )
        most = images = 0
        start = time.perf_counter()
        for batch in loader.epoch(plan.for_rank((SIZE,), rank=rank, world_size=ranks)):
            images += len(batch.ids)
            most = max(most, own_bytes())
        return {"images": images, "seconds": time.perf_counter() - start, "bytes": most}


def all_ranks(path: Path, kind: str, ranks: int, epoch: int) -> list[dict[str, float]]:
    """Run an epoch in `ranks` processes."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, str(path), "--ranks", str(ranks), "--one", kind, str(epoch)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    parser = argparse.ArgumentParser(prog="larger_than_memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("beton", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("ORDER", "EPOCH", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, epoch, rank = arguments.one
        print(json.dumps(one_rank(arguments.beton, kind, int(rank), arguments.ranks, int(epoch))))
        return 0
    rates: dict[str, list[float]] = {kind: [] for kind in ORDERS}
    most: dict[str, float] = dict.fromkeys(ORDERS, 0.0)
    for epoch in range(arguments.rounds):
        for kind in ORDERS:
            found = all_ranks(arguments.beton, kind, arguments.ranks, epoch)
            rates[kind].append(sum(rank["images"] / rank["seconds"] for rank in found))
            most[kind] = max(most[kind], *(rank["bytes"] for rank in found))
    size, limit = arguments.beton.stat().st_size, memory_bytes()
    lines = [
        "| order | images/s, all ranks, median (lowest to highest) | most memory of its own, a rank |",
        "|---|---|---|",
    ]
    for kind, values in rates.items():
        text = f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
        lines.append(f"| {kind} | {text} | {most[kind] / 1e6:.0f} MB |")
    lines += [
        "",
        f"{arguments.ranks} ranks, one thread each; a file of {size / 1e9:.2f} GB, memory limited to {limit / 1e9:.2f} GB for all.",
    ]
    results: dict[str, Any] = {"rates": rates, "own_bytes": most, "file": size, "limit": limit}
    record.write("larger-than-memory-cpu", results, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
