"""What does planned augmentation cost beside a training step? RandAugment and mixup, on the device of the step.

A batch is augmented and a student trained on it, in turns, so that whatever else the machine does falls on both. Ratios of
a process's own processor time (on a GPU of wall time) are the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks import record
from fastdcd import cli, models
from pipelines.augment import Augment, RandAugment, ViewAugment

VARIANTS = {
    "RandAugment, torchvision's": Augment(randaugment=RandAugment()),
    "RandAugment, timm's rand-m9-mstd0.5-inc1": Augment(
        randaugment=RandAugment(space="timm", magnitude=9, magnitude_std=0.5)
    ),
    "mixup and cutmix": Augment(mixup=0.8, cutmix=1.0),
    "torchvision's RandAugment + mixup": Augment(randaugment=RandAugment(), mixup=0.2),
    "timm's RandAugment + mixup": Augment(
        randaugment=RandAugment(space="timm", magnitude=9, magnitude_std=0.5), mixup=0.2
    ),
    "colour jitter with hue": Augment(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    "erasing": Augment(erasing=0.25),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="augmentation.py", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--size", type=int, default=160, help="pixels; default 160")
    parser.add_argument("--batch", type=int, default=16, help="images; default 16")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--name", default="augmentation-cpu", help="results are written to benchmarks/results/NAME"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    student = models.build(arguments.model, classes=1000).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, fused=True)
    shape = (arguments.batch, arguments.size, arguments.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels = torch.randint(0, 1000, (arguments.batch,), device=device)

    def step() -> None:
        loss = nn.functional.cross_entropy(student(images / 255).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds: dict[str, list[float]] = {name: [] for name in ("step", *VARIANTS)}
    for turn in tqdm(range(arguments.turns + 2), "turns", disable=None):
        calls: dict[str, Callable[[], object]] = {"step": step}
        ids = np.arange(arguments.batch) + turn * arguments.batch
        for name, settings in VARIANTS.items():
            view = ViewAugment(settings=settings, seed=0, view=turn)
            calls[name] = partial(view.pixels, images, ids)
        for name, call in calls.items():
            taken = timed(call, device)
            if turn >= 2:
                seconds[name].append(taken)
    ratios = {
        name: record.spread([a / b for a, b in zip(seconds[name], seconds["step"], strict=True)])
        for name in VARIANTS
    }
    lines = [
        f"| augmentation, {arguments.size} px | time, to a step of {arguments.model} | ms an image |",
        "|---|---|---|",
    ]
    for name, ratio in ratios.items():
        each = 1000 * float(np.median(seconds[name])) / arguments.batch
        lines.append(f"| {name} | {record.text(ratio)} | {each:.2f} |")
    results = {"settings": vars(arguments), "ratios": ratios}
    results["seconds"] = {name: record.spread(found) for name, found in seconds.items()}
    record.write(arguments.name, results, "\n".join(lines))
    return 0


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds: processor time of this process on a CPU, wall time on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    call()
    return time.process_time() - begin


if __name__ == "__main__":
    cli.run(main)
