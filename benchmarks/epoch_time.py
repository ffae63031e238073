"""A whole epoch on real JPEGs, end to end: no teacher, teacher cached and online, through several loaders, in turns.

The photographs are linked under other names until there are enough; labels and weights do not matter to the speed.
Every run is the real program: two epochs of fastdcd/train.py of which the second is timed, evaluation not counted.
Beside them the ceiling: the same with the `synthetic` loader, which reads and decodes nothing.

    python benchmarks/epoch_time.py --config configs/imagenet/resnet34_resnet18/100_epochs.yaml --source IMAGENET_CLASS_FOLDERS \
        --name epoch-r18
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

from tqdm import tqdm

from benchmarks import loaders, record, training
from fastdcd import cli, config, config_file, models, weights
from fastdcd.cache import fill as filling
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources

TEACHERS = {
    "no teacher": ["teacher.mode=none", "loss.kd=0", "loss.dcd=0"],
    "DCD + KD, cached": ["teacher.mode=cached"],
    "DCD + KD, online": ["teacher.mode=online"],
}
CEILING = "synthetic"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="epoch_time.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config_file.add_arguments(parser)
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--images", type=int, default=12_800, help="of an epoch")
    parser.add_argument("--backends", nargs="+", default=["dali", "ffcv"], choices=["dali", "ffcv", "torch"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = prepare(arguments, Path(folder))
        epochs: dict[tuple[str, str], list[training.Epoch]] = {run: [] for run in runs}
        order = random.Random(0)
        for _ in tqdm(range(arguments.rounds), "rounds", disable=None):
            for name in order.sample(list(runs), len(runs)):
                epochs[name].append(training.second_epoch(runs[name]))
    write(arguments, epochs)
    return 0


def prepare(arguments: argparse.Namespace, scratch: Path) -> dict[tuple[str, str], config.Config]:
    """The images in every backend's format, a teacher, its caches; the runs by backend and teacher."""
    root = loaders.prepare(arguments.source, scratch, arguments.images)
    sources = open_sources(root)
    paths = {"torch": root, "dali": scratch / "shards", "ffcv": scratch / "400.beton"}
    paths[CEILING] = Path(f"{arguments.images}x{len(sources.classes)}")
    if "dali" in arguments.backends:
        job = Job(sources=sources, out=paths["dali"], workers=arguments.workers)
        to_shards(job, Storage())
    if "ffcv" in arguments.backends:
        job = Job(sources=sources, out=paths["ffcv"], workers=arguments.workers)
        to_beton(job, Storage(max_size=400))
    base = config_file.load(arguments.config, arguments.set)
    ((teacher, _),) = base.teacher.members
    checkpoint = scratch / "teacher.safetensors"
    weights.save(checkpoint, models.build(teacher, classes=len(sources.classes)).original_state_dict())
    runs = {}
    for backend in (*arguments.backends, CEILING):
        common = [*training.QUIET, f"teacher.checkpoint={checkpoint}", f"run.dir={scratch / 'run'}"]
        common += [f"data.backend={backend}", f"data.train={paths[backend]}", f"data.val={paths[backend]}"]
        common += [f"data.workers={arguments.workers}", f"cache.path={scratch / f'cache-{backend}'}"]
        # an untrained teacher's features are too small for fp16; as many bytes
        common += ["cache.dtype=bf16"]
        common += [
            "views.count=1",
            "cache.check_rows=0",  # noise has no ids: `synthetic` shows a sample other pixels each time
            "train.epochs=2",
            "schedule.name=constant",
            "schedule.warmup=0",
            *arguments.set,
        ]
        for name, settings in TEACHERS.items():
            cfg = runs[backend, name] = config_file.load(arguments.config, [*common, *settings])
            if cfg.teacher.mode == "cached":
                training.forget_accelerate()
                with (parts := filling.open_parts(cfg)).loader:
                    filling.fill(parts)
    return runs


def write(arguments: argparse.Namespace, epochs: dict[tuple[str, str], list[training.Epoch]]) -> None:
    table = [
        "| loader | teacher | images/s | time, to no teacher | data wait | rate, to no loader |",
        "|---" * 6 + "|",
    ]
    results: list[dict[str, Any]] = []
    for (backend, name), own in epochs.items():
        plain, free = epochs[backend, "no teacher"], epochs[CEILING, name]
        found = {
            "images_per_second": record.spread([arguments.images / each.seconds for each in own]),
            "time_over_no_teacher": record.spread(
                [a.seconds / b.seconds for a, b in zip(own, plain, strict=True)]
            ),
            "data_wait": record.spread([each.data_wait for each in own]),
            "rate_over_synthetic": record.spread([b.seconds / a.seconds for a, b in zip(own, free, strict=True)]),
        }
        results.append({"backend": backend, "teacher": name, **found})
        cells = [record.text(value, 0 if "images" in key else 2) for key, value in found.items()]
        table.append(f"| {backend} | {name} | {' | '.join(cells)} |")
    table += ["", f"{arguments.images} images an epoch; {arguments.config}; {arguments.workers} workers."]
    record.write(
        arguments.name,
        {
            "config": str(arguments.config),
            "overrides": arguments.set,
            "images": arguments.images,
            "epochs": results,
        },
        "\n".join(table),
    )


if __name__ == "__main__":
    cli.run(main)
