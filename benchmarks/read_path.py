"""What does a cache of ImageNet's size add to a plain step? DCD + KD from it, page cache warm and cold.

A plain step and one of each teacher take turns (step_time.py). The cache has all its rows, 1.28 million, and they
are read in the order of training; features are random, so that no teacher need look at as many images. The images
are noise, made once: what is timed is the step and the cache, not a decoder. All is built anew three times, since two
builds of the same student differ by a percent or two in speed, whatever they are taught by.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import torch
from tqdm import tqdm

from benchmarks import record
from benchmarks.step_time import VARIANTS, Times, compare, in_turns, steps_of
from fastdcd import cli, config, config_file, experiment, models, weights
from fastdcd.cache import fill as filling
from fastdcd.cache.store import TeacherCache

WRITE_ROWS = 1 << 14
PLAIN, CACHED = "plain cross-entropy", "DCD + KD, cached"


def main() -> int:
    parser = argparse.ArgumentParser(prog="read_path.py", description=(__doc__ or "").splitlines()[0])
    config_file.add_arguments(parser)
    parser.add_argument("--teachers", nargs="+", default=["torchvision:resnet34", "torchvision:resnet50"])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="timed steps of each build (default 20)"
    )
    parser.add_argument("--builds", type=int, default=3, metavar="N", help="of everything (default 3)")
    parser.add_argument("--folder", type=Path, required=True, help="caches; used again if they are there")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    configs = {
        teacher: settings(arguments, teacher, arguments.folder / str(number))
        for number, teacher in enumerate(arguments.teachers)
    }
    caches = {teacher: write(cfg) for teacher, cfg in configs.items()}
    plain = config_file.load(arguments.config, [*base(arguments), *VARIANTS[PLAIN]])
    accelerator = experiment.make_accelerator(plain)
    results: list[dict[str, Any]] = []
    seconds_to_verify = {teacher: timed_verify(cache) for teacher, cache in caches.items()}
    prepare: dict[str, Callable[[TeacherCache], object]] = {
        "warm": lambda cache: cache.view(0).verify(),
        "cold": drop,
    }
    for state in prepare:
        times: dict[str, list[Times]] = {}
        for _ in range(arguments.builds):
            variants = {PLAIN: steps_of(plain, accelerator)}
            in_memory = {}
            for teacher, cache in caches.items():
                prepare[state](cache)
                in_memory[teacher] = share_in_memory(cache)
                variants[teacher] = steps_of(configs[teacher], accelerator)
            for name, taken in in_turns(variants, arguments.steps).items():
                times.setdefault(name, []).extend(taken)
        for teacher, cache in caches.items():
            about = {"teacher": teacher, "features": cache.manifest.dim, "page_cache": state}
            found = compare(times[teacher], times[PLAIN])
            results.append({**about, "rows_in_page_cache_before": in_memory[teacher], **found})
    lines = [
        "| teacher | features | page cache (rows in it before) | step / plain step | with the wait for data | reading a batch, ms |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        ratios = (record.text(each[name]) for name in ("ratio_without_wait", "ratio_with_wait"))
        wait = {name: value * 1e3 for name, value in each["data_wait_seconds"].items()}
        lines.append(
            f"| {each['teacher']} | {each['features']} | {each['page_cache']} "
            f"({each['rows_in_page_cache_before']:.0%}) | {' | '.join(ratios)} | {record.text(wait, 1)} |"
        )
    lines.append(
        f"\nDCD + KD from a cache of {arguments.rows:,} rows as {configs[arguments.teachers[0]].cache.dtype} in batches of "
        f"{plain.data.batch_size}; student {plain.student.model} at {plain.student_size(0)} px, {plain.train.precision}. "
        "Comparing a whole view with its checksums, from a cold disk: "
        + ", ".join(f"{teacher} {seconds:.1f} s" for teacher, seconds in seconds_to_verify.items())
        + "."
    )
    settled = {"config": str(arguments.config), "overrides": arguments.set, "rows": arguments.rows}
    record.write(
        arguments.name,
        {**settled, "variants": results, "seconds_to_verify_cold": seconds_to_verify},
        "\n".join(lines),
    )
    return 0


def base(arguments: argparse.Namespace) -> list[str]:
    size = f"{arguments.rows}x{arguments.classes}"
    return ["data.backend=synthetic", f"data.train={size}", f"data.val={size}", *arguments.set]


def settings(arguments: argparse.Namespace, teacher: str, folder: Path) -> config.Config:
    """The config of one teacher, with a checkpoint of fresh weights."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "teacher.safetensors"
    if not checkpoint.is_file():
        weights.save(checkpoint, models.build(teacher, classes=arguments.classes).original_state_dict())
    own = [f"teacher.model={teacher}", f"teacher.checkpoint={checkpoint}", f"cache.path={folder / 'cache'}"]
    return config_file.load(
        arguments.config,
        [*base(arguments), *own, "views.count=1", "cache.check_rows=0", "cache.verify=false", *VARIANTS[CACHED]],
    )


def write(cfg: config.Config) -> TeacherCache:
    """Random features as a complete cache of `cfg`."""
    assert cfg.cache.path is not None
    with (parts := filling.open_parts(cfg)).loader:
        cache = TeacherCache.create(cfg.cache.path, parts.manifest, parts.teacher.classifier)
    if cache.view(0).complete():
        return cache
    cache.view(0).start()
    features = torch.rand(WRITE_ROWS, cache.manifest.dim)
    for ids in tqdm(torch.arange(cache.manifest.rows).split(WRITE_ROWS), "write", disable=None):
        cache.view(0).write(ids, features[: len(ids)])
        cache.flush()
    cache.view(0).finish()
    return TeacherCache.open(cfg.cache.path)


def timed_verify(cache: TeacherCache) -> float:
    """Seconds to compare a view with its checksums from a cold disk; all its rows are in the page cache then."""
    drop(cache)
    begin = time.perf_counter()
    assert not cache.view(0).verify()
    return time.perf_counter() - begin


def drop(cache: TeacherCache) -> None:
    """Drop the pages of all rows from memory. Reads in random order bring back no more than the rows asked for."""
    for path in cache.path.glob("view-*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(cache: TeacherCache, samples: int = 500) -> float:
    """Share of rows, of some at random, that are in the page cache."""
    row_bytes, found = cache.manifest.row_bytes, 0
    (path,) = (path for path in cache.path.glob("view-*.npy") if "crc32" not in path.name)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reads nothing around a row
        start = path.stat().st_size - cache.manifest.rows * row_bytes
        for row in torch.randint(cache.manifest.rows, (samples,)).tolist():
            try:
                os.preadv(file.fileno(), [bytearray(row_bytes)], start + row * row_bytes, os.RWF_NOWAIT)
                found += 1
            except BlockingIOError:
                pass
    return found / samples


if __name__ == "__main__":
    cli.run(main)
