"""What does distillation add to a plain step? Cross-entropy, DCD + KD from a cache, DCD + KD online, in turns.

All three train the same student on the same batches of the real loader by fastdcd.step.TrainStep, as training does:
with learning rate, clipping, the check that the gradient is finite and the sums that are logged. A few steps of one are
timed beside those of the others, so that whatever else the machine does falls on all. Ratios, not seconds, are the
result. The weights are fresh ones: a step costs the same whatever they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import torch
from accelerate import Accelerator
from tqdm import tqdm

from benchmarks import record
from fastdcd import cli, config, config_file, experiment, models, weights
from fastdcd.cache import fill as filling
from fastdcd.step import TrainStep
from fastdcd.teacher_modes import open_mode
from pipelines.prefetch import prefetch

VARIANTS = {
    "plain cross-entropy": ["loss.kd=0", "loss.dcd=0", "teacher.mode=none"],
    "DCD + KD, cached": ["loss.kd=1", "loss.dcd=1", "teacher.mode=cached"],
    "DCD + KD, online": ["loss.kd=1", "loss.dcd=1", "teacher.mode=online"],
}
# One loss of logits each, beside cross-entropy, from a cache.
SINGLE = {
    "plain cross-entropy": VARIANTS["plain cross-entropy"],
    **{
        f"{name}, cached": ["loss.kd=0", "loss.dcd=0", "teacher.mode=cached", *settings]
        for name, settings in {
            "KD": ["loss.kd=1"],
            "KD, standardised": ["loss.kd=1", "loss.kd_standardize=true"],
            "DKD": ["loss.dkd=1"],
            "DIST": ["loss.dist=1"],
        }.items()
    },
}
COMPILED = {
    f"{name}, compiled": [*settings, "train.compile=true", "teacher.compile=true"]
    for name, settings in VARIANTS.items()
}


Times = tuple[float, float]  # seconds waited for data, seconds of the steps without that
WARM_UP = 3  # turns
# Steps of a turn. A GPU is waited for at a turn's end: a wait after every step would hide what it does meanwhile.
STEPS = {"cpu": 1, "cuda": 20}


def steps_of(cfg: config.Config, accelerator: Accelerator) -> Iterator[Times]:
    """Take training steps without end; yields seconds of each turn: waited for data, and of its steps without that."""
    loader, val = experiment.open_data(cfg, accelerator)
    with loader, val:
        family = experiment.view_family(cfg)
        teacher = experiment.build_teacher(cfg, len(loader.index.classes), accelerator)
        module = experiment.build_student(cfg, len(loader.index.classes), teacher, accelerator)
        step = TrainStep(cfg, module, accelerator, steps_per_epoch=experiment.steps_per_epoch(cfg, loader.index))
        mode = open_mode(cfg, loader, family, teacher, accelerator)
        step.wrapped.train()
        synchronize: Callable[[], None] = torch.cuda.synchronize if accelerator.device.type == "cuda" else _nothing
        taken, turn = 0, STEPS[accelerator.device.type]
        begin = waited = 0.0
        while True:
            plan = experiment.epoch_plan(cfg, loader, family, 0)
            teacher_size = mode.begin(plan.view)
            rank_plan = plan.for_rank(experiment.image_sizes(cfg.student_size(0), teacher_size))
            batches = prefetch(loader.epoch(rank_plan), mode.read_cached, accelerator.device)
            for number in range(max(plan.steps - 1, 1)):  # the last batch is smaller
                asked = time.perf_counter()
                if taken % turn == 0:
                    begin, waited = asked, 0.0
                batch, cached = next(batches)
                waited += time.perf_counter() - asked
                teacher_outputs = mode.outputs(batch, cached)
                images, rows = batch.at(cfg.student_size(0)), plan.rows(number)
                step(images, batch.labels, teacher_outputs, rows=rows, number=taken)
                taken += 1
                if taken % turn == 0:
                    synchronize()
                    yield waited, time.perf_counter() - begin - waited
            batches.close()


def _nothing() -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(prog="step_time.py", description=__doc__.splitlines()[0] if __doc__ else None)
    config_file.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="timed turns of each (default 60)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="each also with student and teacher compiled",
    )
    parser.add_argument("--single", action="store_true", help="each loss of logits by itself instead of DCD + KD")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    variants = SINGLE if arguments.single else {**VARIANTS, **(COMPILED if arguments.compiled else {})}
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(arguments.config, arguments.set, variants, arguments.steps, Path(scratch))
    lines = [
        "| step | time, data wait excluded | time, data wait included |",
        "|---|---|---|",
        "| plain cross-entropy | 1 | 1 |",
    ]
    for name in list(variants)[1:]:
        excluded, included = results[name]["ratio_without_wait"], results[name]["ratio_with_wait"]
        lines.append(f"| {name} | {record.text(excluded)} | {record.text(included)} |")
    record.write(arguments.name, {"config": str(arguments.config), "variants": results}, "\n".join(lines))
    return 0


def measure(
    file: Path, overrides: list[str], variants: dict[str, list[str]], steps: int, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Median and quartiles of each variant's ratio to the plain step of the same turn."""
    base = config_file.load(file, [*overrides, "teacher.mode=none", "loss.kd=0", "loss.dcd=0"])
    accelerator = experiment.make_accelerator(base)
    with experiment.open_set(base.data, base.data.train, accelerator.device, "data.train") as loader:
        classes = len(loader.index.classes)
    checkpoint = scratch / "teacher.safetensors"
    ((teacher, _),) = base.teacher.members
    weights.save(checkpoint, models.build(teacher, classes=classes).original_state_dict())
    common = [
        *overrides,
        f"teacher.checkpoint={checkpoint}",
        f"cache.path={scratch / 'cache'}",
        "views.count=1",
        "optim.lr=0.001",  # keeps the numbers of any network finite: a skipped step would cost less
        f"run.dir={scratch / 'run'}",
    ]
    configs = {name: config_file.load(file, [*common, *settings]) for name, settings in variants.items()}
    cached = next(each for each in configs.values() if each.teacher.mode == "cached")
    with (parts := filling.open_parts(cached)).loader:
        filling.fill(parts)

    times = in_turns({name: steps_of(each, accelerator) for name, each in configs.items()}, steps)
    return {name: compare(own, times["plain cross-entropy"]) for name, own in times.items()}


def in_turns(variants: dict[str, Iterator[Times]], steps: int) -> dict[str, list[Times]]:
    """Times of `steps` steps of each variant, all taking a step in turn, after a few to warm up."""
    times: dict[str, list[Times]] = {name: [] for name in variants}
    for turn in tqdm(range(steps + WARM_UP), "turns", disable=None):
        for name, timed in variants.items():
            found = next(timed)
            if turn >= WARM_UP:
                times[name].append(found)
    return times


def compare(own: list[Times], plain: list[Times]) -> dict[str, Any]:
    """Median and quartiles of a variant's ratio to the plain step of the same turn, and of its seconds."""
    return {
        "ratio_without_wait": record.spread([a[1] / b[1] for a, b in zip(own, plain, strict=True)]),
        "ratio_with_wait": record.spread([sum(a) / sum(b) for a, b in zip(own, plain, strict=True)]),
        "seconds": record.spread([step for _, step in own]),
        "data_wait_seconds": record.spread([wait for wait, _ in own]),
    }


if __name__ == "__main__":
    cli.run(main)
