"""Accuracy against training time: plain, KD and DCD + KD, the teacher cached and online, recipes of several lengths.

In parts, each resumable, since they want different machines. `train` trains every student and keeps its
accuracy; it may share the machine and be started twice with other --seeds. `time` trains two epochs of every
variant in turns and keeps the seconds of the second; it wants an idle machine. `draw` writes the table and the
chart: accuracy from the one, time from the other. A first student's time counts the fill of its cache. `redraw` draws
the chart anew from the results that are there.

    python benchmarks/accuracy_time.py train time draw --config configs/cifar100/cpu/dcd_kd.yaml --folder data/study/time \
        --name accuracy-time-cpu
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import record, training
from benchmarks.training import append, lines
from fastdcd import cli, config, config_file
from fastdcd.cache import fill as filling
from fastdcd.html_report import METHODS

PLAIN = "no teacher"
STUDENTS = {
    PLAIN: ["teacher.mode=none", "loss.kd=0", "loss.dcd=0"],
    "KD, cached": ["teacher.mode=cached", "loss.kd=1", "loss.dcd=0"],
    "DCD + KD, cached": ["teacher.mode=cached", "loss.kd=1", "loss.dcd=1"],
    "DCD + KD, online": ["teacher.mode=online", "teacher.precision=bf16", "loss.kd=1", "loss.dcd=1"],
}
# What is timed only. As distillation is usually trained: images from files through a torch DataLoader, fp32.
USUAL = "DCD + KD, online, fp32, `torch` loader from files"
FILL = "filling one view of the cache"
COLORS = {
    PLAIN: METHODS["no teacher"],
    "KD, cached": METHODS["KD"],
    "DCD + KD, cached": METHODS["DCD + KD"],
    "DCD + KD, online": METHODS["DCD + KD"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="accuracy_time.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    config_file.add_arguments(parser)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4, 8, 16], help="lengths of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant in `time`")
    parser.add_argument("--folder", type=Path, help="runs; continued when run again (redraw needs none)")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    if arguments.folder is None and set(arguments.parts) != {"redraw"}:
        parser.error("--folder is missing")
    for part in arguments.parts:
        PARTS[part](arguments)
    return 0


# ---- training


def train_all(arguments: argparse.Namespace) -> None:
    """Every student of every length and seed that has no line in runs.jsonl yet."""
    fill(arguments)
    log = arguments.folder / "runs.jsonl"
    cells = [
        (student, epochs, seed) for seed in arguments.seeds for epochs in arguments.epochs for student in STUDENTS
    ]
    done = {(row["student"], row["epochs"], row["seed"]) for row in lines(log)}
    for student, epochs, seed in tqdm([cell for cell in cells if cell not in done], "runs", disable=None):
        settings = [*STUDENTS[student], *recipe(epochs), f"run.seed={seed}"]
        summary = training.fresh(load(arguments, settings, f"seed-{seed}"))
        append(log, {"student": student, "epochs": epochs, "seed": seed, "top1": summary["top1"]})


def fill(arguments: argparse.Namespace) -> None:
    """The config's own cache, with a view for each epoch of the longest recipe."""
    settings = [*STUDENTS["DCD + KD, cached"], f"views.count={max(arguments.epochs)}"]
    with (parts := filling.open_parts(load(arguments, settings))).loader:
        filling.fill(parts)


def recipe(epochs: int) -> list[str]:
    """The config's recipe in so many epochs, an eighth of them warm-up."""
    return [f"train.epochs={epochs}", f"schedule.warmup={epochs / 8}"]


def load(arguments: argparse.Namespace, settings: list[str], run: str = "run") -> config.Config:
    folder = f"run.dir={arguments.folder / run}"
    return config_file.load(arguments.config, [*training.QUIET, folder, *settings, *arguments.set])


# ---- timing


def time_all(arguments: argparse.Namespace) -> None:
    """Rounds in which each variant trains two epochs; the seconds of the second go to times.jsonl, a line a round."""
    fill(arguments)
    images = folders(arguments)
    usual = [f"data.{part}={images / part}" for part in ("train", "val")]
    usual += ["data.backend=torch", "train.precision=fp32", "teacher.precision=fp32"]

    def epoch(settings: list[str]) -> float:
        return training.second_epoch(load(arguments, [*settings, *recipe(2)], "timed")).seconds

    timed: dict[str, Callable[[], float]] = {
        **{name: lambda settings=settings: epoch(settings) for name, settings in STUDENTS.items()},  # type: ignore[misc]
        USUAL: lambda: epoch([*STUDENTS["DCD + KD, online"], *usual]),
        FILL: lambda: fill_one(arguments),
    }
    log = arguments.folder / "times.jsonl"
    order = random.Random(0)
    for _ in tqdm(range(len(lines(log)), arguments.rounds), "rounds", disable=None):
        append(log, {name: timed[name]() for name in order.sample(list(timed), len(timed))})


def fill_one(arguments: argparse.Namespace) -> float:
    """Seconds to fill one view of a cache."""
    cache = arguments.folder / "filled"
    shutil.rmtree(cache, ignore_errors=True)
    settings = [*STUDENTS["DCD + KD, cached"], "views.count=1", f"cache.path={cache}", "teacher.precision=bf16"]
    training.forget_accelerate()
    with (parts := filling.open_parts(load(arguments, settings))).loader:
        begin = time.perf_counter()
        filling.fill(parts)
        return time.perf_counter() - begin


def folders(arguments: argparse.Namespace) -> Path:
    """The resident set as class folders of PNG files, for the torch loader."""
    section = load(arguments, []).data
    out: Path = arguments.folder / "images"
    if (out / "complete").is_file():
        return out
    for part, source in (("train", section.train), ("val", section.val)):
        classes = json.loads((source / "index.json").read_text(encoding="utf-8"))["classes"]
        pixels, labels = np.load(source / "images.npy", mmap_mode="r"), np.load(source / "labels.npy")
        for name in classes:
            (out / part / name).mkdir(parents=True, exist_ok=True)
        for number, label in enumerate(labels.tolist()):
            Image.fromarray(pixels[number]).save(out / part / classes[label] / f"{number:05d}.png")
    (out / "complete").touch()
    return out


# ---- results


def draw(arguments: argparse.Namespace) -> None:
    """The table and the chart in benchmarks/results. Times are ratios to an epoch without a teacher.

    Where `time` has not run, the chart counts epochs and the table says so.
    """
    runs, rounds = lines(arguments.folder / "runs.jsonl"), lines(arguments.folder / "times.jsonl")
    names = [*STUDENTS, USUAL, FILL]
    ratios = {name: record.spread([each[name] / each[PLAIN] for each in rounds]) for name in names if rounds}
    gains = [each[USUAL] / each["DCD + KD, cached"] for each in rounds]
    lengths = lengths_of(runs)
    cells = cells_of(runs, ratios)
    teacher = teacher_accuracy(arguments)
    heading = [f"{epochs} epochs" for epochs in lengths]
    table = [
        "Top-1 in percent, mean (lowest to highest) of the seeds; an epoch's time beside that of the student without a "
        "teacher, median (quartiles) of the rounds.",
        "",
        f"| student | {' | '.join(heading)} | time of an epoch |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for name, row in cells.items():
        texts = [f"{np.mean(cell.top1):.2f} ({min(cell.top1):.2f} to {max(cell.top1):.2f})" for cell in row]
        table.append(f"| {name} | {' | '.join(texts)} | {time_text(ratios, name)} |")
    table += [f"| {name} |{' |' * len(lengths)} {time_text(ratios, name)} |" for name in (USUAL, FILL)]
    table += ["", "The command below draws; with `train time draw` it does all of it.", ""]
    table += [
        f"Teacher {teacher:.2f} %. Seeds {sorted({row['seed'] for row in runs})}; {len(rounds)} rounds of times.",
    ]
    if rounds:
        table[-1] += (
            f" {USUAL}, over DCD + KD, cached, bf16, resident: {record.text(record.spread(gains), 2)} times the time "
            "of an epoch."
        )
    results = {
        "config": str(arguments.config),
        "overrides": arguments.set,
        "students": STUDENTS,
        "teacher_top1": teacher,
        "runs": runs,
        "seconds_of_an_epoch": rounds,
        "epoch_over_plain": ratios,
        "usual_over_cached": record.spread(gains) if rounds else None,
    }
    record.write(arguments.name, results, "\n".join(table))
    chart(arguments, results)


def redraw(arguments: argparse.Namespace) -> None:
    """The chart from benchmarks/results/NAME.json."""
    chart(arguments, json.loads((record.RESULTS / f"{arguments.name}.json").read_text(encoding="utf-8")))


def time_text(ratios: dict[str, dict[str, float]], name: str) -> str:
    return record.text(ratios[name], 2) if name in ratios else "not yet measured"


class Cell(NamedTuple):
    """One student at one length, in epochs of the student without a teacher.

    Attributes:
        time: of training.
        fill: of filling the cache that it reads, a view for each epoch.
        top1: percent, of each seed.
    """

    time: float
    fill: float
    top1: list[float]


def cells_of(runs: list[dict[str, Any]], ratios: dict[str, dict[str, float]]) -> dict[str, list[Cell]]:
    """Every student at every length; times in epochs trained, and no fill, where they were not measured."""
    found = {}
    for name in STUDENTS:
        epoch = ratios[name]["median"] if ratios else 1.0
        view = ratios[FILL]["median"] if ratios and name.endswith("cached") else 0.0
        found[name] = [
            Cell(
                epochs * epoch,
                epochs * view,
                [r["top1"] for r in runs if (r["student"], r["epochs"]) == (name, epochs)],
            )
            for epochs in lengths_of(runs)
        ]
    return found


def lengths_of(runs: list[dict[str, Any]]) -> list[int]:
    return sorted({row["epochs"] for row in runs})


def teacher_accuracy(arguments: argparse.Namespace) -> float:
    (checkpoint,) = [path for _, path in load(arguments, []).teacher.members if path]
    found: float = json.loads((checkpoint.parent / "summary.json").read_text(encoding="utf-8"))["top1"]
    return found


def chart(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Accuracy over time, a line a student; a whisker from the lowest to the highest seed.

    Of a cached student two: the first, which pays for the cache, and in a faint line each after it.
    """
    plt = cli.pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    runs, ratios = results["runs"], results["epoch_over_plain"]
    cells = cells_of(runs, ratios)
    for name, row in cells.items():
        filled = any(cell.fill for cell in row)
        times, top1 = (
            [cell.time + cell.fill for cell in row],
            np.array([cell.top1 for cell in row]),
        )  # [lengths, seeds]
        online = name.endswith("online")
        (line,) = axes.plot(
            times,
            top1.mean(1),
            color=COLORS[name],
            marker="o",
            markersize=5,
            markerfacecolor="white" if online else None,
            linestyle="--" if online else "-",
            label=f"{name}: first student, fill counted" if filled else name,
        )
        axes.vlines(times, top1.min(1), top1.max(1), color=line.get_color(), linewidth=1)
        if filled:
            again = [cell.time for cell in row]
            label = f"{name}: each further student"
            axes.plot(again, top1.mean(1), color=COLORS[name], marker=".", linewidth=1, alpha=0.5, label=label)
    labelled = list(zip(cells["DCD + KD, cached"], lengths_of(runs), strict=True))[:-1]  # the last has no room
    for cell, epochs in labelled:
        place = {"xytext": (-8, 4), "ha": "right", "textcoords": "offset points", "fontsize": 9}
        axes.annotate(
            f"{epochs} epochs", (cell.time, np.mean(cell.top1)), color=COLORS["DCD + KD, cached"], **place
        )
    dress(axes, cells, results["teacher_top1"])
    axes.set(xlabel="time (1 = an epoch of the student without a teacher)" if ratios else "epochs of training")
    figure.savefig(record.RESULTS / f"{arguments.name}.png", dpi=130)


def dress(axes: Any, cells: dict[str, list[Cell]], teacher: float) -> None:
    """Axes, labels and the teacher's line."""
    axes.axhline(teacher, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("teacher", (cells[PLAIN][0].time, teacher), (0, 3), textcoords="offset points", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=0.7 * cells[PLAIN][0].time)
    longest = max(row[-1].time + row[-1].fill for row in cells.values())
    ticks = [2**power for power in range(1, 7) if 2**power <= 1.3 * longest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(ylabel="top-1, %")
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


PARTS = {"train": train_all, "time": time_all, "draw": draw, "redraw": redraw}

if __name__ == "__main__":
    cli.run(main)
