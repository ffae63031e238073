"""CIFAR-100 pairs by seed, beside published figures: teachers first, then every student, run after run, from one cache.

Each run is `fastdcd/train.py` with a config of configs/cifar100/ (by default of its fast recipe: all methods share it, and
one cache for each teacher). When the minutes are over, the run in progress saves a checkpoint and stops; started again,
everything continues where it stopped. Runs live in runs/cifar100/ and are not made twice. Every start writes the
table of what is finished, with the command of each row. Last comes DCD beside the best of the other losses.

    python benchmarks/cifar_pairs.py --only resnet56/resnet20 --minutes 60
"""

from __future__ import annotations

import argparse
import json
import shlex
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


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train a student: the end of its config's name ("" for none), and what it changes there."""

    config: str
    settings: tuple[str, ...] = ()


# With the settings of their papers for CIFAR; DKD's warm-up is its 20 of 240 epochs.
OTHERS = {
    "DKD": Method(config="kd", settings=("loss.kd=0", "loss.dkd=1", "loss.dkd_beta=8", "loss.dkd_warmup=5")),
    "DIST": Method(config="kd", settings=("loss.kd=0", "loss.dist=1")),
    "KD, standardised": Method(
        config="kd",
        settings=("loss.ce=0.1", "loss.kd=9", "loss.kd_standardize=true", "loss.kd_temperature=2"),
    ),
}
METHODS = {
    "no teacher": Method(config=""),
    "KD": Method(config="kd"),
    "DCD": Method(config="dcd"),
    "DCD + KD": Method(config="dcd_kd"),
    **OTHERS,
}
FIRST = ("no teacher", "KD", "DCD", "DCD + KD")  # the paper's own columns

# Published top-1 %, the authors' own tables (arXiv 2407.11802, 2203.08679, 2205.10536, 2403.01427): the teacher's, then
# METHODS in order; None where there is none.
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("resnet32x4", "resnet8x4"): (79.42, 72.50, 73.33, 74.23, 75.09, 76.32, 76.31, 76.62),
    ("wrn-40-2", "wrn-16-2"): (75.61, 73.26, 74.92, 74.99, 76.06, 76.24, None, 76.11),
    ("resnet56", "resnet20"): (72.34, 69.06, 70.66, 71.18, 71.81, 71.97, 71.75, 71.43),
}


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
    parser.add_argument("--only", nargs="+", metavar="TEACHER/STUDENT", help="these pairs instead")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--seeds", type=int, default=3, help="of the paper's own methods; default 3")
    parser.add_argument("--other-seeds", type=int, default=2, help="of the other losses; default 2")
    parser.add_argument(
        "--best", action=argparse.BooleanOptionalAction, default=True, help="DCD beside the best other"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many; continue when run again")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are written; default runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--name", default="cifar-pairs", help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    pairs = chosen(arguments)
    teachers = {teacher: run(arguments, f"teachers/{teacher}") for teacher, _ in pairs}
    students = dict(cells(arguments, pairs, teachers, METHODS))
    complete = finish(arguments, (*teachers.values(), *students.values()), until)
    if complete and arguments.best:
        for pair in pairs:
            if best := best_other(pair, students):
                methods = {f"DCD + {best}": with_dcd(OTHERS[best])}
                more = dict(cells(arguments, [pair], teachers, methods))
                students |= more
                complete = finish(arguments, tuple(more.values()), until) and complete
    write(arguments, pairs, teachers, students, complete)
    return 0


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The pairs that were asked for. Raises ValueError for one that is not in the table."""
    if not arguments.only:
        return list(PUBLISHED)[: arguments.pairs]
    known = {"/".join(pair): pair for pair in PUBLISHED}
    if unknown := [name for name in arguments.only if name not in known]:
        raise ValueError(f"--only: got {unknown[0]!r}, expected one of {', '.join(known)}")
    return [known[name] for name in arguments.only]


def with_dcd(method: Method) -> Method:
    return Method(config="dcd_kd", settings=(*method.settings, "loss.dcd=1"))


def best_other(pair: tuple[str, str], students: dict[tuple[str, str, str, int], Run]) -> str | None:
    """The other loss with the highest mean so far; None if none was run."""
    means = {
        title: np.mean([each.summary["top1"] for key, each in students.items() if key[:3] == (*pair, title)])
        for title in OTHERS
        if any(key[:3] == (*pair, title) for key in students)
    }
    return max(means, key=lambda title: means[title]) if means else None


def finish(arguments: argparse.Namespace, runs: tuple[Run, ...], until: float) -> bool:
    """Train what is not finished, until the time is over; whether all are."""
    return all(each.summary or train(arguments, each, until) for each in runs)


def run(
    arguments: argparse.Namespace, name: str, *settings: str, folder: str = "", seed: int | None = None
) -> Run:
    seeded = () if seed is None else (f"run.seed={seed}",)
    below = arguments.runs / Path(arguments.recipe).relative_to("configs")
    return Run(
        config=f"{arguments.recipe}/{name}.yaml",
        settings=(*settings, *seeded),
        folder=below / (f"{folder or name}-{seed}" if seeded else name),
    )


def cells(
    arguments: argparse.Namespace,
    pairs: list[tuple[str, str]],
    teachers: dict[str, Run],
    methods: dict[str, Method],
) -> Iterator[tuple[tuple[str, str, str, int], Run]]:
    """(teacher, student, method, seed) and its run; all cells of a seed before those of the next."""
    for seed in range(max(arguments.seeds, arguments.other_seeds)):
        for teacher, student in pairs:
            for title, method in methods.items():
                if title in METHODS and title not in arguments.methods:
                    continue
                if seed >= (arguments.seeds if title in FIRST else arguments.other_seeds):
                    continue
                name = f"{teacher}_{student}_{method.config}" if method.config else student
                checkpoint = f"teacher.checkpoint={teachers[teacher].folder / 'student.safetensors'}"
                taught = (checkpoint, *method.settings) if method.config else method.settings
                # the three configs' own folders keep their names
                folder = name if title in FIRST else f"{teacher}_{student}_{_slug(title)}"
                yield (teacher, student, title, seed), run(arguments, name, *taught, folder=folder, seed=seed)


def _slug(title: str) -> str:
    return title.lower().replace(" + ", "_").replace(", ", "_").replace(" ", "_")


def command_of(arguments: argparse.Namespace, each: Run) -> list[str]:
    command = ["fastdcd/train.py", "--config", each.config, "--resume", "auto"]
    return [*command, "--set", f"run.dir={each.folder}", *each.settings, *arguments.set]


def train(arguments: argparse.Namespace, each: Run, until: float) -> bool:
    """Train, or go on training, until the time is over; whether the run is finished.

    Raises ValueError if the program fails.
    """
    left = until - time.monotonic()
    if left <= 0:
        return False
    script, *rest = command_of(arguments, each)
    command = [sys.executable, str(ROOT / script), *rest]
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
        "| teacher -> student | method | top-1 %, mean (lowest to highest) | seeds | published | minutes a run | command |"
    ]
    table.append("|---" * 7 + "|")
    for pair in pairs:
        teacher, student = pair
        published = dict(zip(("teacher", *METHODS), PUBLISHED[pair], strict=True))
        rows = {"teacher": [teachers[teacher]]}
        for (*cell, title, _), each in students.items():
            if tuple(cell) == pair:
                rows.setdefault(title, []).append(each)
        for title, runs in rows.items():
            finished = [each for each in runs if each.summary]
            if not finished:
                continue
            top1 = [each.summary["top1"] for each in finished]
            minutes = np.median([each.summary["seconds"] for each in finished]) / 60
            figure = published.get(title)
            table.append(
                f"| {teacher if title == 'teacher' else f'{teacher} -> {student}'} | {title} | {np.mean(top1):.2f} "
                f"({min(top1):.2f} to {max(top1):.2f}) | {len(top1)} | {'' if figure is None else f'{figure:.2f}'} | "
                f"{minutes:.1f} | `python {shlex.join(command_of(arguments, finished[0]))}` |"
            )
    if not complete:
        table += ["", "Not complete: run it again to continue."]
    results_rows = [
        {
            "teacher": teacher,
            "student": student,
            "method": method,
            "seed": seed,
            "command": shlex.join(command_of(arguments, each)),
            **each.summary,
        }
        for (teacher, student, method, seed), each in students.items()
        if each.summary
    ]
    results = {"complete": complete, "teachers": {name: each.summary for name, each in teachers.items()}}
    record.write(
        arguments.name,
        {**results, "recipe": arguments.recipe, "overrides": arguments.set, "runs": results_rows},
        "\n".join(table),
    )


if __name__ == "__main__":
    cli.run(main)
