"""How fast is a fill? Beside the bare teacher on decoded batches, and K views a decoded image beside K passes.

The teacher has fresh weights: its speed does not depend on them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import torch

from benchmarks import record
from fastdcd import cli, config, config_file, experiment, models, weights
from fastdcd.cache import fill as filling
from pipelines.views import Center


def main() -> int:
    parser = argparse.ArgumentParser(prog="fill_rate.py", description=(__doc__ or "").splitlines()[0])
    config_file.add_arguments(parser)
    parser.add_argument("--views", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(arguments, Path(scratch))
    bare = results["fill_over_bare_teacher"]
    lines = [
        "| | ratio |",
        "|---|---|",
        f"| fill of one view / bare teacher on decoded batches, rows per second | {record.text(bare)} |",
    ]
    for count, ratio in results["one_pass_over_passes"].items():
        lines.append(f"| {count} views: one pass / {count} passes, rows per second | {record.text(ratio)} |")
    record.write(
        arguments.name, {"config": str(arguments.config), "overrides": arguments.set, **results}, "\n".join(lines)
    )
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    checkpoint, cache = scratch / "teacher.safetensors", scratch / "cache"
    given = [*arguments.set, "teacher.mode=cached", f"teacher.checkpoint={checkpoint}", f"cache.path={cache}"]
    base = config_file.load(arguments.config, given)
    ((model, _),) = base.teacher.members
    with experiment.open_set(base.data, base.data.train, torch.device("cpu"), "data.train") as loader:
        classes = len(loader.index.classes)
    weights.save(checkpoint, models.build(model, classes=classes).original_state_dict())

    fractions: list[float] = []
    ratios: dict[int, list[float]] = {count: [] for count in arguments.views}
    for turn in range(arguments.repeats + 1):
        seconds = {}
        for count in (1, *arguments.views):
            for passes in {count, 1}:  # a pass for each view, or one for all
                each = [*given, f"views.count={count}", f"cache.views_a_pass={count // passes}"]
                seconds[count, passes] = fill(config_file.load(arguments.config, each))
                shutil.rmtree(cache)
        alone = bare(config_file.load(arguments.config, [*given, "views.count=1"]))
        if turn:  # the first warms up
            fractions.append(alone / seconds[1, 1])
            for count in ratios:
                ratios[count].append(seconds[count, count] / seconds[count, 1])
    return {
        "fill_over_bare_teacher": record.spread(fractions),
        "one_pass_over_passes": {str(count): record.spread(values) for count, values in ratios.items()},
    }


def fill(cfg: config.Config) -> float:
    """Seconds of a fill, from decoded index to checksums."""
    with (parts := filling.open_parts(cfg)).loader:
        begin = time.perf_counter()
        filling.fill(parts)
        return time.perf_counter() - begin


def bare(cfg: config.Config) -> float:
    """Seconds of the teacher alone over as many batches, all of them the same decoded one."""
    with (parts := filling.open_parts(cfg)).loader:
        index, teacher = parts.loader.index, parts.teacher
        plan = experiment.epoch_plan(cfg, parts.loader, Center(), 0)
        batch = next(parts.loader.epoch(plan.for_rank((teacher.size,))))
        images = batch.at(teacher.size).to(parts.accelerator.device)
        begin = time.perf_counter()
        for _ in range(-(-len(index) // teacher.rows)):
            teacher.features(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


if __name__ == "__main__":
    cli.run(main)
