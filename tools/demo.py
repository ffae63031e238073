"""The whole path on real images in a few minutes: convert, train a teacher, cache it, distil three students.

scikit-learn's handwritten digits are written out as image files first, so that everything after that is
what you would do with a folder of your own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import fastdcd
from fastdcd import cli, config_file, html_report, train

TRAIN_IMAGES = 1000
SEEDS = (0, 1, 2)
STUDENTS = {"plain": "no teacher", "kd": "KD", "dcd_kd": "DCD + KD"}
RUNS = Path("runs/digits")


def main() -> int:
    started = time.perf_counter()
    cli.pyplot()  # fails now, not after the training
    shutil.rmtree(RUNS, ignore_errors=True)  # a demo starts from nothing each time
    for folder in ("digits", "digits-resident", "digits-cache"):
        shutil.rmtree(Path("data", folder), ignore_errors=True)
    write_digits(Path("data/digits"))
    for part in ("train", "val"):
        shell("convert", "resident", f"data/digits/{part}", f"data/digits-resident/{part}")
    shell("train", "--config", "digits/teacher")
    shell("cache", "fill", "--config", "digits/dcd_kd")
    for student in STUDENTS:
        for seed in SEEDS:
            distil(student, seed)
    table = results()
    print("\n" + table)
    (RUNS / "demo.md").write_text(table + "\n", encoding="utf-8")
    picture(RUNS / "demo.png")
    print(
        f"\n{time.perf_counter() - started:.0f} s in all. Table: {RUNS / 'demo.md'}, picture: {RUNS / 'demo.png'}"
    )
    return 0


def write_digits(folder: Path) -> None:
    """scikit-learn's digits (values 0..16, 8x8) as PNG files in class folders, the first 1,000 to train."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "train" if number < TRAIN_IMAGES else "val"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels / 16 * 255).astype(np.uint8)).save(path)
    print(f"{len(digits.target)} digits written to {folder}")


def shell(*command: str) -> None:
    """Run a program as a user would: fastdcd COMMAND ..."""
    print(f"\n$ fastdcd {' '.join(command)}", flush=True)
    here = Path(fastdcd.__file__).resolve().parents[1]  # the same fastdcd, wherever the demo is started
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "fastdcd", *command], env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        sys.exit(done.returncode)


def distil(student: str, seed: int) -> None:
    """Train one student. In this process: importing torch nine times would take longer than training."""
    settings = [f"run.seed={seed}", f"run.dir={RUNS / student}-{seed}", "teacher.evaluate=false"]
    print(
        f"\n$ fastdcd train --config digits/{student} --set {' '.join(settings)}",
        flush=True,
    )
    train.train(config_file.load(Path(f"digits/{student}"), settings))


def summary(run: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((RUNS / run / "summary.json").read_text(encoding="utf-8"))
    return found


def results() -> str:
    """One table: mean and spread of the seeds, time, and how often the teacher looked at an image."""
    teacher = summary("teacher")
    views = json.loads(Path("data/digits-cache/manifest.json").read_text(encoding="utf-8"))
    lines = [
        "| student | top-1 %, mean of 3 seeds | lowest to highest | training, s | teacher forward passes, images |",
        "|---|---|---|---|---|",
    ]
    for student, title in STUDENTS.items():
        runs = [summary(f"{student}-{seed}") for seed in SEEDS]
        top1 = [run["top1"] for run in runs]
        seconds, seen = np.mean([run["seconds"] for run in runs]), sum(run["teacher_images"] for run in runs)
        lines.append(
            f"| {title} | {np.mean(top1):.2f} | {min(top1):.2f} to {max(top1):.2f} | {seconds:.1f} | {seen:,.0f} |"
        )
    filled = views["rows"] * views["views"]
    lines.append(
        f"| teacher | {teacher['top1']:.2f} | | {teacher['seconds']:.1f} | {filled:,} to fill the cache, once |"
    )
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Accuracy of every student, and how it came about."""
    plt = cli.pyplot()
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 3), layout="constrained")
    colors = {student: html_report.METHODS[title] for student, title in STUDENTS.items()}
    for place, (student, title) in enumerate(STUDENTS.items()):
        top1 = [summary(f"{student}-{seed}")["top1"] for seed in SEEDS]
        bars.bar(place, np.mean(top1), color=colors[student], width=0.6)
        bars.plot([place] * len(top1), top1, "o", color="black", markersize=4)
        bars.annotate(f"{np.mean(top1):.1f}", (place, 3), ha="center", color="white", fontsize=12)
        lines = [read_metrics(f"{student}-{seed}") for seed in SEEDS]
        epochs = [line["epoch"] + 1 for line in lines[0]]
        values = np.array([[line["top1"] for line in run] for run in lines])
        curves.plot(epochs, values.mean(0), color=colors[student], label=title, marker="o", markersize=3)
        curves.fill_between(epochs, values.min(0), values.max(0), color=colors[student], alpha=0.15)
    teacher = summary("teacher")["top1"]
    for axes in (bars, curves):
        axes.axhline(teacher, color="black", linewidth=0.8, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("top-1, %")
    bars.set(ylim=(0, 100), xticks=range(3), xticklabels=list(STUDENTS.values()))
    bars.set_title("after the last epoch; dots are seeds", fontsize=10)
    curves.annotate("teacher", (curves.get_xlim()[0], teacher), (4, 4), textcoords="offset points", fontsize=9)
    curves.locator_params(axis="x", integer=True)
    curves.set(xlabel="epoch", ylim=(max(values.min() - 20, 0), 100))
    curves.set_title("mean of 3 seeds, lowest to highest shaded", fontsize=10)
    curves.legend(frameon=False, loc="lower right")
    students = f"{summary('plain-0')['student_parameters']:,.0f}"
    figure.suptitle(f"Digits: a student of {students} parameters, distilled from {teacher:.1f} %")
    figure.savefig(path, dpi=130)


def read_metrics(run: str) -> list[dict[str, float]]:
    lines = map(json.loads, (RUNS / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == "eval"]


if __name__ == "__main__":
    cli.run(main)
