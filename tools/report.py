"""Draw one or several runs as a page: accuracy, loss terms, temperature, throughput and waiting for data."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from fastdcd import cli, html_report
from fastdcd.cli import human_time
from fastdcd.html_report import Line
from fastdcd.losses.terms import TERMS
from fastdcd.metrics import read_lines
from pipelines.files import replace_file, user_path

# Figures in order: key of metrics.jsonl, kind of line, title, unit. One is drawn if a run has its key.
Figure = tuple[str, str, str, str]
BEFORE: tuple[Figure, ...] = (
    ("top1", "eval", "Accuracy, top-1", "%"),
    ("top5", "eval", "Accuracy, top-5", "%"),
    ("loss", "train", "Loss", "nats"),
)
AFTER: tuple[Figure, ...] = (
    ("lr", "train", "Learning rate", ""),
    ("images_per_second", "train", "Throughput", "images/s"),
    ("data_wait", "train", "Waiting for data", "share of the step"),
    ("data_wait_ranks", "train", "Waiting for data, slowest process", "share of the step"),
    ("skipped_steps", "train", "Steps skipped", ""),
)
UNDRAWN = {"kind", "epoch", "step", "skipped_in_a_row"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run wrote: its lines of metrics.jsonl, its summary, {} while it still runs, and its config."""

    name: str
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]

    @property
    def method(self) -> str:
        """What taught it, by the titles of its loss terms: no teacher, KD, DCD + KD, ..."""
        loss = self.config.get("loss") or {}
        taught = [term.title for name, term in TERMS.items() if term.needs_teacher and loss.get(name)]
        return " + ".join(sorted(taught)) or "no teacher"

    @property
    def teacher_top1(self) -> float | None:
        """The teacher's accuracy, where it was measured."""
        found = [line["top1"] for line in self.lines if line["kind"] == "teacher"]
        return found[-1] if found else self.summary.get("teacher_top1")

    @property
    def tau_bound(self) -> float | None:
        """The bound that the temperature sits at, at the end of its curve."""
        bound, points = (self.config.get("loss") or {}).get("tau_max"), self.curve("tau", "train").points
        return bound if bound and points and points[-1][1] >= 0.999 * bound else None

    def curve(self, key: str, kind: str) -> Line:
        """The points (step, value) of a key; of several processes' values the largest. A step that was not finite
        has none."""
        chosen = [line for line in self.lines if line["kind"] == kind and line.get(key) is not None]
        values = [line[key] if isinstance(line[key], list) else [line[key]] for line in chosen]
        return Line(
            self.name, [(float(line["step"]), float(max(each))) for line, each in zip(chosen, values, strict=True)]
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/report.py runs/digits/*-0 --html report.html",
    )
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="folders of runs (run.dir)")
    parser.add_argument(
        "--html", type=user_path, default=Path("report.html"), metavar="F", help="the page (default report.html)"
    )
    arguments = parser.parse_args()
    folders = [path for path in arguments.runs if (path / "metrics.jsonl").is_file()]
    if not folders:
        raise ValueError(f"{arguments.runs[0]}: no metrics.jsonl; expected the folder of a run (run.dir)")
    for path in arguments.runs:
        if path not in folders:
            print(f"report.py: {path} has no metrics.jsonl and is left out", file=sys.stderr)
    if not arguments.html.absolute().parent.is_dir():
        raise ValueError(f"{arguments.html}: its folder does not exist; make it first")
    runs = [read(path, name) for path, name in zip(folders, names(folders), strict=True)]
    with replace_file(arguments.html) as file:
        file.write(page(runs).encode())
    print(f"{arguments.html}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return 0


def names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve().parts for path in folders]
    for length in range(1, max(map(len, whole)) + 1):
        ends = ["/".join(parts[-length:]) for parts in whole]
        if len(set(ends)) == len(ends):
            return ends
    raise ValueError("the same run is given twice")


def read(folder: Path, name: str) -> Run:
    """Read a run, finished or not. Raises ValueError for a damaged line."""
    lines = []
    for number, line in read_lines(folder / "metrics.jsonl"):
        if line is None:
            raise ValueError(f"{folder / 'metrics.jsonl'}: line {number} is damaged; remove it")
        lines.append(line)
    summary = folder / "summary.json"
    config = folder / "config.yaml"
    return Run(
        name=name,
        lines=lines,
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
    )


def figures(runs: list[Run]) -> list[Figure]:
    """What there is to draw: the loss terms' parts by the titles they are registered with, others by their keys."""
    parts = [(key, "train", *shown) for term in TERMS.values() for key, shown in term.logged.items()]
    known = {key for key, *_ in (*BEFORE, *parts, *AFTER)}
    found = {key for run in runs for line in run.lines if line["kind"] == "train" for key in line}
    others = [(key, "train", key, "") for key in sorted(found - known - UNDRAWN)]
    return [*BEFORE, *parts, *others, *AFTER]


def page(runs: list[Run]) -> str:
    """The page of some runs."""
    colours = method_colours(runs)
    cards = []
    for value, kind, title, unit in figures(runs):
        lines = [line for run in runs if (line := run.curve(value, kind)).points]
        if not any(y for line in lines for _, y in line.points):
            continue  # no run has it, or nothing ever happened
        levels = _teachers(runs) if value == "top1" else {}
        figure = html_report.chart(lines, x="step", y=unit, colours=colours, levels=levels)
        cards.append(html_report.card(title, figure, name=value, note=_tau_note(runs) if value == "tau" else ""))
    head = ("", "top-1, %", "best, %", "epochs", "steps", "training", "images/s", "data wait", "parameters")
    parts = [
        html_report.card(
            "Runs",
            html_report.table(head, [_row(run) for run in runs], colours=[colours[run.name] for run in runs]),
            name="runs",
        ),
        html_report.grid(cards),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return html_report.document(
        title, "images/s and waiting for data are medians over the lines of metrics.jsonl", parts
    )


def method_colours(runs: list[Run]) -> dict[str, str]:
    """A colour for each run by its method; further runs of one method are lighter."""
    found: dict[str, str] = {}
    others = [method for method in dict.fromkeys(run.method for run in runs) if method not in html_report.METHODS]
    seen: Counter[str] = Counter()
    for run in runs:
        known = html_report.METHODS.get(run.method)
        base = known or html_report.COLOURS[(4 + others.index(run.method)) % len(html_report.COLOURS)]
        found[run.name] = html_report.shade(base, seen[run.method])
        seen[run.method] += 1
    return found


def _teachers(runs: list[Run]) -> dict[str, float]:
    """Accuracies to draw across: the teacher's, or those of several."""
    values = dict.fromkeys(run.teacher_top1 for run in runs if run.teacher_top1 is not None)
    return {f"teacher{' ' * number}": value for number, value in enumerate(values)}


def _tau_note(runs: list[Run]) -> str:
    bound = [f"{run.name} ({run.tau_bound:g})" for run in runs if run.tau_bound]
    if not bound:
        return ""
    return f"At its bound, loss.tau_max, where it stops learning: {', '.join(bound)}. A higher one may help."


def _row(run: Run) -> list[str]:
    accuracy, done = run.curve("top1", "eval").points, run.summary
    rate, wait = (run.curve(key, "train").points for key in ("images_per_second", "data_wait"))
    seconds = [line["seconds"] for line in run.lines if line["kind"] == "epoch"]
    return [
        run.name + ("" if done.get("finished") else " (not finished)"),
        f"{accuracy[-1][1]:.2f}" if accuracy else "-",
        f"{max(y for _, y in accuracy):.2f}" if accuracy else "-",
        f"{len(seconds)}",
        f"{run.lines[-1]['step']:,}" if run.lines else "0",
        human_time(seconds[-1]) if seconds else "-",
        f"{_middle(rate):,.0f}",
        f"{_middle(wait):.1%}",
        f"{done['student_parameters']:,}" if "student_parameters" in done else "-",
    ]


def _middle(points: Any) -> float:
    values = sorted(y for _, y in points)
    return values[len(values) // 2] if values else 0.0


if __name__ == "__main__":
    cli.run(main)
