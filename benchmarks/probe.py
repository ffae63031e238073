"""A linear probe of trained students on the data they were trained on, beside their own classifiers.

Both are linear classifiers of the same features. The student's own was trained with them, on crops, on a teacher's soft
labels where it had one; the probe afterwards, on whole images and labels only. A probe that is right comes out near it.

    python benchmarks/probe.py --runs runs/cifar100/cpu/plain runs/cifar100/cpu/dcd_kd --data data/cifar15-resident --name probe-cifar-cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import torch

from benchmarks import record
from fastdcd import cli, linear_probe
from pipelines.base import LoaderOptions
from pipelines.published_datasets import open_pair


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="probe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished runs")
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/, as for tools/linear_probe.py")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    rows = [measure(run, arguments.data) for run in arguments.runs]
    table = ["| run | its own classifier, top-1 % | probe, top-1 % | difference |", "|---|---|---|---|"]
    for row in rows:
        table.append(
            f"| {row['run']} | {row['classifier_top1']:.2f} | {row['probe_top1']:.2f} | {row['difference']:+.2f} |"
        )
    record.write(arguments.name, {"data": str(arguments.data), "rows": rows}, "\n".join(table))
    return 0


def measure(run: Path, data: Path) -> dict[str, Any]:
    """Both accuracies of one run's student on the test set."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    checkpoint, device = run / "student.safetensors", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = linear_probe.settings(checkpoint, [])
    frozen = linear_probe.load_frozen(cfg.student, checkpoint, device)
    train_set, test_set = open_pair(data, LoaderOptions(device=device))
    with train_set, test_set:
        train, test = (
            linear_probe.extract(frozen, each, crop_ratio=1.0, device=device) for each in (train_set, test_set)
        )
        classifier = linear_probe.fit(train, classes=len(train_set.index.classes), cfg=cfg)
    found = linear_probe.accuracy(classifier, test).top1
    return {
        "run": str(run),
        "classifier_top1": summary["top1"],
        "probe_top1": found,
        "difference": found - summary["top1"],
    }


if __name__ == "__main__":
    cli.run(main)
