"""The paper's CIFAR-100 pairs by seed, beside its figures: teachers first, then every student, run after run.

Each run is `fastdcd/train.py` with a config of configs/cifar100/ (by default of its fast recipe). When the minutes are
over, the run that is going on saves a checkpoint and stops; started again, everything goes on where it was. Runs live
in runs/cifar100/ and are not made twice.

    python benchmarks/cifar_pairs.py --minutes 8
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run by path: import from the checkout

import numpy as np

from benchmarks import record
from fastdcd import cli

# Published top-1 % (arXiv 2407.11802): teacher; student alone, KD, DCD, DCD + KD.
PUBLISHED = {
    ("resnet32x4", "resnet8x4"): (79.42, 72.50, 73.33, 74.23, 75.09),
    ("wrn-40-2", "wrn-16-2"): (75.61, 73.26, 74.92, 74.99, 76.06),
    ("resnet56", "resnet20"): (72.34, 69.06, 70.66, 71.18, 71.81),
}
METHODS = {"": "no teacher", "kd": "KD", "dcd": "DCD", "dcd_kd": "DCD + KD"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its config's name below the recipe's folder, the settings it differs by, and its folder."""

    config: str
    settings: tuple[str, ...]
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What it wrote; {} if it is not finished."""
        path = self.folder / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if found.get("finished") else {}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="cifar_pairs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="configs/cifar100/fast", help="a folder of configs; default fast")
    parser.add_argument("--pairs", type=int, default=len(PUBLISHED), help="how many, in the order of the table")
    parser.add_argument("--methods", nargs="+", default=list(METHODS.values()), choices=METHODS.values())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many; go on when started again")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are written; default runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--name", default="cifar-pairs", help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    pairs = list(PUBLISHED)[: arguments.pairs]
    teachers = {teacher: run(arguments, f"teachers/{teacher}") for teacher, _ in pairs}
    students = dict(cells(arguments, pairs, teachers))
    for each in (*teachers.values(), *students.values()):
        if not each.summary and not train(arguments, each, until):
            break
    complete = all(each.summary for each in (*teachers.values(), *students.values()))
    write(arguments, pairs, teachers, students, complete)
    return 0


def run(arguments: argparse.Namespace, name: str, *settings: str, seed: int | None = None) -> Run:
    seeded = () if seed is None else (f"run.seed={seed}",)
    folder = (
        arguments.runs / Path(arguments.recipe).relative_to("configs") / (f"{name}-{seed}" if seeded else name)
    )
    return Run(config=f"{arguments.recipe}/{name}.yaml", settings=(*settings, *seeded), folder=folder)


def cells(
    arguments: argparse.Namespace, pairs: list[tuple[str, str]], teachers: dict[str, Run]
) -> Iterator[tuple[tuple[str, str, str, int], Run]]:
    """(teacher, student, method, seed) and its run; all cells of a seed before those of the next."""
    for seed in range(arguments.seeds):
        for teacher, student in pairs:
            for method, title in METHODS.items():
                if title not in arguments.methods:
                    continue
                name = f"{teacher}_{student}_{method}" if method else student
                taught = (
                    (f"teacher.checkpoint={teachers[teacher].folder / 'student.safetensors'}",) if method else ()
                )
                yield (teacher, student, title, seed), run(arguments, name, *taught, seed=seed)


def train(arguments: argparse.Namespace, each: Run, until: float) -> bool:
    """Train, or go on training, until the time is over; whether the run is finished.

    Raises ValueError if the program fails.
    """
    left = until - time.monotonic()
    if left <= 0:
        return False
    command = [sys.executable, str(ROOT / "fastdcd/train.py"), "--config", each.config, "--resume", "auto"]
    command += ["--set", f"run.dir={each.folder}", *each.settings, *arguments.set]
    program = subprocess.Popen(command)
    try:
        program.wait(left)
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGTERM)  # it saves a checkpoint
        program.wait()
    if program.returncode:
        raise ValueError(f"{' '.join(command[1:])} ended with exit code {program.returncode}")
    return bool(each.summary)


def write(
    arguments: argparse.Namespace,
    pairs: list[tuple[str, str]],
    teachers: dict[str, Run],
    students: dict[tuple[str, str, str, int], Run],
    complete: bool,
) -> None:
    """A row for each cell with its runs so far."""
    table = [
        "| teacher -> student | method | top-1 %, mean (lowest to highest) | seeds | published | minutes a run |"
    ]
    table.append("|---" * 6 + "|")
    for pair in pairs:
        teacher, student = pair
        if found := teachers[teacher].summary:
            minutes = f"{found['seconds'] / 60:.1f}"
            table.append(
                f"| {teacher} | teacher | {found['top1']:.2f} | 1 | {PUBLISHED[pair][0]:.2f} | {minutes} |"
            )
        for title, published in zip(METHODS.values(), PUBLISHED[pair][1:], strict=True):
            runs = [
                each.summary
                for (*cell, _), each in students.items()
                if cell == [teacher, student, title] and each.summary
            ]
            if not runs:
                continue
            top1 = [each["top1"] for each in runs]
            minutes = f"{np.median([each['seconds'] for each in runs]) / 60:.1f}"
            spread = f"{np.mean(top1):.2f} ({min(top1):.2f} to {max(top1):.2f})"
            table.append(
                f"| {teacher} -> {student} | {title} | {spread} | {len(runs)} | {published:.2f} | {minutes} |"
            )
    if not complete:
        table += ["", "Not complete: start it again to go on."]
    rows = [
        {"teacher": teacher, "student": student, "method": method, "seed": seed, **each.summary}
        for (teacher, student, method, seed), each in students.items()
        if each.summary
    ]
    results = {"complete": complete, "teachers": {name: each.summary for name, each in teachers.items()}}
    record.write(
        arguments.name,
        {**results, "recipe": arguments.recipe, "overrides": arguments.set, "runs": rows},
        "\n".join(table),
    )


if __name__ == "__main__":
    cli.run(main)
