"""Throughput of two processes against one, a core each, and what of a step is DDP's and the loss's.

Every process has the same rows (weak scaling): efficiency is images/s of two over twice those of one. One and two
processes take turns over several rounds. In each process three kinds of step take turns: as in training, without DDP's
exchange of gradients, and without DCD; the differences are their shares. All are fastdcd.step.TrainStep.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate.utils import broadcast

from benchmarks import record
from fastdcd import config_file, experiment, models
from fastdcd.distill import DistillModule
from fastdcd.models import ModelOutput
from fastdcd.step import TrainStep

SIZE, CLASSES, TEACHER_DIM = 32, 100, 256
KINDS = ("step", "without DDP's exchange", "without DCD")


def measure(model: str, rows: int, seconds: float) -> dict[str, float]:
    """Median seconds of each kind of step, on every process of the group alike."""
    tree = {
        "data": {"train": "none", "val": "none", "device": "cpu"},  # no images are read
        "student": {"model": model, "image_size": SIZE},
        "teacher": {"mode": "online", "model": "none"},
        "loss": {"kd": 1.0, "dcd": 1.0},
        "optim": {"lr": 1e-3},
        "run": {"trackers": []},
    }
    cfg = config_file.parse(tree, "benchmarks/scaling.py")
    accelerator = experiment.make_accelerator(cfg)
    steps: dict[str, TrainStep] = {}
    for name, dcd in (("with", 1.0), ("without", 0.0)):
        student = models.build(model, classes=CLASSES)
        normalize = models.normalize_for(model, None, None)
        loss = cfg.loss.with_weights(dcd=dcd)
        module = DistillModule(student, normalize, loss, teacher_dim=TEACHER_DIM).to(
            memory_format=torch.channels_last
        )
        steps[name] = TrainStep(cfg, module, accelerator, steps_per_epoch=1)
    images = torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (rows,))
    teacher_outputs = ModelOutput(torch.randn(rows, TEACHER_DIM), torch.randn(rows, CLASSES))
    everyone = rows * accelerator.num_processes
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    begin = time.perf_counter()
    go_on = torch.ones(1)
    while go_on:
        for kind in KINDS:
            step = steps["without" if kind == "without DCD" else "with"]
            accelerator.wait_for_everyone()
            start = time.perf_counter()
            silent = kind == "without DDP's exchange"
            with accelerator.no_sync(step.wrapped) if silent else nullcontext():
                step(images, labels, teacher_outputs, rows=everyone, number=0)
            found[kind].append(time.perf_counter() - start)
        go_on[0] = float(time.perf_counter() - begin < seconds or len(found["step"]) < 8)
        go_on = broadcast(go_on)
    accelerator.end_training()
    return {kind: statistics.median(each[2:]) for kind, each in found.items()}


def launch(count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` on `count` processes, a thread each; the first one's times."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--model", arguments.model, "--rows", str(arguments.rows)]
    command += ["--seconds", str(arguments.seconds), "--rank"]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed; its message is above")
    return dict(json.loads(outputs[0].splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar:resnet20")
    parser.add_argument("--rows", type=int, default=64, help="of each process")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(measure(arguments.model, arguments.rows, arguments.seconds)))
        return 0
    rounds = [{count: launch(count, arguments) for count in (1, 2)} for _ in range(arguments.rounds)]
    efficiencies = [each[1]["step"] / each[2]["step"] for each in rounds]
    steps = {count: statistics.median(each[count]["step"] for each in rounds) for count in (1, 2)}
    shares = {
        f"{kind.removeprefix('without ')}, share of a step of {count}": statistics.median(
            1 - each[count][kind] / each[count]["step"] for each in rounds
        )
        for count in (1, 2)
        for kind in KINDS[1:]
    }
    results: dict[str, Any] = {
        "model": arguments.model,
        "rows_a_process": arguments.rows,
        "images_per_second_1": arguments.rows / steps[1],
        "images_per_second_2": 2 * arguments.rows / steps[2],
        "efficiency_median": statistics.median(efficiencies),
        "efficiency_least": min(efficiencies),
        "efficiency_greatest": max(efficiencies),
        **shares,
    }
    lines = [
        f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in results.items()
    ]
    record.write(
        "scaling", results, "\n".join(["# Two processes against one", "", "| what | value |", "|---|---|", *lines])
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
