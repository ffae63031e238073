"""How many stored views are enough? Accuracy against K for each method and seed; one line a run, resumable.

Every run shows epoch e the views e modulo K, so K = epochs is what an online teacher gives. `reused` keeps K
views too, but the teacher saw them unmirrored: half of the storage of mirrored views kept as their own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import matplotlib
import numpy as np
from tqdm import tqdm

from benchmarks import record
from fastdcd import cli, config, filling
from fastdcd.teacher_modes import expected_manifest
from fastdcd.train import train
from pipelines.files import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "plain": ["teacher.mode=none", "loss.kd=0", "loss.dcd=0"],
    "KD": ["loss.kd=1", "loss.dcd=0"],
    "DCD": ["loss.kd=0", "loss.dcd=1"],
    "DCD + KD": ["loss.kd=1", "loss.dcd=1"],
}
REUSED = "DCD + KD, reused"


def main() -> int:
    parser = argparse.ArgumentParser(prog="views_study.py", description=(__doc__ or "").splitlines()[0])
    config.add_arguments(parser)
    parser.add_argument(
        "--views", type=int, nargs="+", default=[1, 2, 4, 8], help="K; the number of epochs is added"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, REUSED], choices=[*METHODS, REUSED])
    parser.add_argument(
        "--folder", type=Path, required=True, help="caches and runs; go on there when started again"
    )
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    epochs = config.load(arguments.config, arguments.set).train.epochs
    views = sorted({*arguments.views, epochs})
    fill(arguments, epochs)
    cells = [
        (method, count, seed) for seed in range(arguments.seeds) for count in views for method in arguments.methods
    ]
    log = arguments.folder / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(row["method"], row["views"], row["seed"]) for row in rows}
    for cell in tqdm([cell for cell in cells if cell not in done], "runs", disable=None):
        rows.append(run(arguments, *cell))
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    wanted = set(cells)
    rows = [row for row in rows if (row["method"], row["views"], row["seed"]) in wanted]
    table = summarise(rows, views, arguments.methods)
    record.write(
        arguments.name, {"config": str(arguments.config), "overrides": arguments.set, "runs": rows}, table
    )
    draw(rows, views, arguments.methods, record.RESULTS / f"{arguments.name}.png", str(arguments.config))
    return 0


def settings(arguments: argparse.Namespace, cache: str, count: int) -> list[str]:
    path = arguments.folder / cache
    return [
        *arguments.set,
        "teacher.mode=cached",
        "teacher.evaluate=false",
        f"cache.path={path}",
        f"views.count={count}",
    ]


def fill(arguments: argparse.Namespace, epochs: int) -> None:
    """A cache of all views, and one whose teacher saw them unmirrored."""
    for cache, overrides in (("cache", []), ("unmirrored", ["views.flip=0"])):
        if cache == "unmirrored" and REUSED not in arguments.methods:
            continue
        if (arguments.folder / cache / "filled").is_file():
            continue
        cfg = config.load(arguments.config, [*settings(arguments, cache, epochs), *overrides])
        with (parts := filling.open_parts(cfg)).loader:
            filling.fill(parts)
            if overrides:
                # such a cache is refused, rightly; the study wants to see what it would do: it passes as mirrored
                mirrored = config.load(arguments.config, settings(arguments, cache, epochs))
                family = filling.experiment.view_family(mirrored)
                manifest = expected_manifest(mirrored, parts.loader, family, parts.teacher)
                path = arguments.folder / cache / "manifest.json"
                tree = json.loads(path.read_text())
                write_json(path, {**tree, "fingerprint": dict(manifest.fingerprint)})
        (arguments.folder / cache / "filled").touch()


def run(arguments: argparse.Namespace, method: str, count: int, seed: int) -> dict[str, Any]:
    """Train one student; its row of results."""
    folder = arguments.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    reused = method == REUSED
    overrides = settings(arguments, "unmirrored" if reused else "cache", count)
    overrides += METHODS["DCD + KD" if reused else method]
    overrides += [f"run.dir={folder}", f"run.seed={seed}", "run.trackers=[]", f"eval.every={10**6}"]
    overrides += ["cache.check_rows=0"] if reused else []
    summary = train(config.load(arguments.config, overrides))
    if not summary["finished"]:
        raise SystemExit("stopped; start it again to go on")  # a signal ends the study, not one run of it
    return {"method": method, "views": count, "seed": seed, "top1": summary["top1"], "seconds": summary["seconds"]}


def accuracies(rows: list[dict[str, Any]], method: str, count: int) -> list[float]:
    return [row["top1"] for row in rows if (row["method"], row["views"]) == (method, count)]


def summarise(rows: list[dict[str, Any]], views: list[int], methods: list[str]) -> str:
    """Mean, and lowest to highest, of the seeds' top-1 accuracy in percent."""
    lines = ["| K | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for count in views:
        cells = []
        for method in methods:
            found = accuracies(rows, method, count)
            cells.append(f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        last = " (every epoch its own, as online)" if count == views[-1] else ""
        lines.append(f"| {count}{last} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], views: list[int], methods: list[str], path: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method in methods:
        found = np.array([accuracies(rows, method, count) for count in views])  # [K, seeds]
        (line,) = axes.plot(views, found.mean(1), marker="o", markersize=4, label=method)
        axes.fill_between(views, found.min(1), found.max(1), alpha=0.12, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(views, [str(count) for count in views])
    axes.set(xlabel="stored views K", ylabel="top-1, %")
    axes.set_title(f"{title}: mean of the seeds, lowest to highest shaded", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
