"""How many stored views are enough? Accuracy against K for each method and seed; one line a run, resumable.

Every run shows epoch e the views e modulo K, so K = epochs is what an online teacher gives; `online` is that teacher
itself, for reference. `reused` keeps K views too, but the teacher saw them unmirrored: half of the storage of mirrored
views kept as their own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
from tqdm import tqdm

from benchmarks import record
from fastdcd import cli, config_file, experiment
from fastdcd.cache import fill as filling
from fastdcd.cache.match import expected_manifest
from fastdcd.train import train
from pipelines.files import write_json

REUSED, ONLINE = "DCD + KD, reused", "DCD + KD, online"
METHODS = {
    "plain": ["teacher.mode=none", "loss.kd=0", "loss.dcd=0"],
    "KD": ["loss.kd=1", "loss.dcd=0"],
    "DCD": ["loss.kd=0", "loss.dcd=1"],
    "DCD + KD": ["loss.kd=1", "loss.dcd=1"],
    REUSED: ["loss.kd=1", "loss.dcd=1", "cache.check_rows=0"],
    ONLINE: ["loss.kd=1", "loss.dcd=1", "teacher.mode=online"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="views_study.py", description=(__doc__ or "").splitlines()[0])
    config_file.add_arguments(parser)
    parser.add_argument(
        "--views", type=int, nargs="+", default=[1, 2, 4, 8], help="K; the number of epochs is added"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--folder", type=Path, required=True, help="caches and runs; continued when run again")
    parser.add_argument("--no-train", action="store_true", help="report the runs that are there")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    epochs = config_file.load(arguments.config, arguments.set).train.epochs
    views = sorted({*arguments.views, epochs})
    if not arguments.no_train:
        fill(arguments, epochs)
    cells = [
        (method, count, seed)
        for seed in range(arguments.seeds)
        for count in views
        for method in arguments.methods
        if method != ONLINE or count == epochs
    ]
    log = arguments.folder / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    done = {(row["method"], row["views"], row["seed"]) for row in rows}
    missing = [] if arguments.no_train else [cell for cell in cells if cell not in done]
    for cell in tqdm(missing, "runs", disable=None):
        rows.append(run(arguments, *cell))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    wanted = set(cells)
    rows = [row for row in rows if (row["method"], row["views"], row["seed"]) in wanted]
    table = summarise(rows, views, arguments.methods)
    record.write(
        arguments.name,
        {"config": str(arguments.config), "overrides": arguments.set, "epochs": epochs, "runs": rows},
        table,
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
        cfg = config_file.load(arguments.config, [*settings(arguments, cache, epochs), *overrides])
        with (parts := filling.open_parts(cfg)).loader:
            filling.fill(parts)
            if overrides:
                # such a cache is refused, rightly; the study wants to see what it would do: it passes as mirrored
                mirrored = config_file.load(arguments.config, settings(arguments, cache, epochs))
                family = experiment.view_family(mirrored)
                manifest = expected_manifest(mirrored, parts.loader, family, parts.teacher)
                path = arguments.folder / cache / "manifest.json"
                tree = json.loads(path.read_text(encoding="utf-8"))
                write_json(path, {**tree, "fingerprint": dict(manifest.fingerprint)})
        (arguments.folder / cache / "filled").touch()


def run(arguments: argparse.Namespace, method: str, count: int, seed: int) -> dict[str, Any]:
    """Train one student; its row of results."""
    folder = arguments.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = settings(arguments, "unmirrored" if method == REUSED else "cache", count)
    overrides += METHODS[method]
    overrides += [f"run.dir={folder}", f"run.seed={seed}", "run.trackers=[]", f"eval.every={10**6}"]
    summary = train(config_file.load(arguments.config, overrides))
    if not summary["finished"]:
        raise SystemExit("stopped; run it again to continue")  # a signal ends the study, not one run of it
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
            text = f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
            cells.append(f"{found[0]:.2f} (one seed)" if len(found) == 1 else text)
        last = " (every epoch its own, as online)" if count == views[-1] else ""
        lines.append(f"| {count}{last} | " + " | ".join(cells) + " |")
    seeds = len({row["seed"] for row in rows})
    lines.append(
        f"\nTop-1 in percent, mean (lowest to highest) of {seeds} seeds. K = {views[-1]} shows each view once: in fp32 that is the "
        "online teacher bit for bit (tests/test_training.py); in lower precision its rounding is another."
    )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], views: list[int], methods: list[str], path: Path, title: str) -> None:
    seeds = len({row["seed"] for row in rows})
    plt = cli.pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, method in enumerate(methods):
        there = [count for count in views if accuracies(rows, method, count)]
        found = np.array([accuracies(rows, method, count) for count in there])  # [K, seeds]
        mean = found.mean(1)
        axes.errorbar(
            np.array(there) * 1.04 ** (number - len(methods) / 2),  # side by side
            mean,
            yerr=[mean - found.min(1), found.max(1) - mean],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=method,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(views, [str(count) for count in views])
    axes.set(xlabel="stored views K", ylabel="top-1, %")
    axes.set_title(f"{title}: mean, lowest and highest of {seeds} seeds", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
