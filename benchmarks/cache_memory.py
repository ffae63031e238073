"""A cache of ImageNet's size in a process of limited memory: fill one view, then read it in random order.

The features are synthetic; files, formats and the reading are the real ones. The limit is on the process's own
memory (RLIMIT_DATA: what it allocates; the pages of mapped files are the kernel's to drop). To bound those too,
run it in a memory cgroup.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import record
from fastdcd import cli
from fastdcd.cache.manifest import Manifest
from fastdcd.cache.store import TeacherCache
from pipelines.plan import order


def own_bytes() -> int:
    """Memory of this process that is not of files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def main() -> int:
    parser = argparse.ArgumentParser(prog="cache_memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=1 << 30, metavar="BYTES", help="default 1 GiB")
    parser.add_argument("--folder", type=Path, help="where the cache is written and removed again")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit, arguments.limit))
    torch.set_num_threads(1)
    manifest = Manifest(rows=arguments.rows, dim=arguments.features, views=1, dtype="fp16", fingerprint={})
    most = own_bytes()
    batch, rows = arguments.batch_size, arguments.rows
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        cache = TeacherCache.create(Path(scratch) / "cache", manifest, nn.Linear(arguments.features, 1000))
        features = torch.randn(batch, arguments.features)
        begin = time.perf_counter()
        cache.view(0).start()
        for number, start in enumerate(tqdm(range(0, rows, batch), "fill", disable=None)):
            ids = torch.arange(start, min(start + batch, rows))
            features[:, 0] = torch.arange(start, start + batch) % 1000  # tells rows apart
            cache.view(0).write(ids, features[: len(ids)])
            if number % 64 == 63:
                cache.flush()
                most = max(most, own_bytes())
        cache.flush()
        cache.view(0).finish()
        seconds["fill"] = time.perf_counter() - begin
        most = max(most, own_bytes())
        view = next((Path(scratch) / "cache").glob("view-000.npy"))
        overhead = sum(path.stat().st_size for path in view.parent.iterdir()) / (rows * arguments.features * 2) - 1
        for name, cold in (("read, cold", True), ("read, again", False)):
            if cold:
                with view.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            reader = TeacherCache.open(Path(scratch) / "cache")
            ids_in_order = torch.from_numpy(order(rows, seed=0, epoch=0))
            begin = time.perf_counter()
            for ids in tqdm(ids_in_order.split(batch), name, disable=None):
                found = manifest.codec.decode(reader.view(0).read(ids))
                assert torch.equal(found[:, 0], (ids % 1000).float())
                most = max(most, own_bytes())
            seconds[name] = time.perf_counter() - begin
        lines = ["| | rows per second |", "|---|---|"]
        lines += [f"| {name} | {rows / took:,.0f} |" for name, took in seconds.items()]
        lines.append(
            f"\n{rows:,} rows of {arguments.features} features as fp16, {view.stat().st_size / 1e9:.2f} GB; limit "
            f"{arguments.limit / 2**30:g} GiB, most memory of its own {most / 2**30:.2f} GiB; overhead beyond the "
            f"features {overhead:.3%}."
        )
    peak = {"own_bytes": most, "limit_bytes": arguments.limit, "overhead": overhead}
    rates = {name: rows / took for name, took in seconds.items()}
    record.write("cache-memory", {"rows_per_second": rates, **peak}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
