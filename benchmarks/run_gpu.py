"""Measure what only a GPU can show, part by part in order of value, and tell what has been measured.

Each part is a command of its own that takes less than nine minutes and writes benchmarks/results/PART.json and .md;
a part whose results are there, and complete, is not run again. Without a name the missing parts run, the most
valuable first, while the minutes last. Data are looked for where docs/convert.md makes them.

    python benchmarks/run_gpu.py --list
    python benchmarks/run_gpu.py --minutes 25
    python benchmarks/run_gpu.py step-r18-192 --again
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run by path: import from the checkout

import torch

from fastdcd import cli

PHOTOGRAPHS = "data/imagenet-smoke/train"
CIFAR = "data/cifar100-resident/train"
# Where tiny runs write: results that are none must not lie beside those that are.
TINY = Path("runs/run-gpu-tiny")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark and its arguments.

    Attributes:
        name: of its results.
        script: in benchmarks/.
        arguments: those of the measurement.
        tiny: added to try the same code on a CPU in seconds.
        minutes: that it may take; then it is ended.
        needs: a folder of data.
    """

    name: str
    script: str
    arguments: str
    tiny: str
    minutes: float = 9.0
    needs: str | None = None

    def command(self, *, tiny: bool) -> list[str]:
        arguments = f"{self.arguments} {self.tiny}" if tiny else self.arguments
        script = os.path.relpath(ROOT / "benchmarks" / self.script)
        return [script, *shlex.split(arguments), "--name", self.name]


def _step(name: str, experiment: str, batch: int, size: int, teacher_size: int) -> Part:
    """Steps on noise that lies on the device: no loader in the way."""
    settings = "data.backend=synthetic data.train=51200x1000 data.val=1000x1000 cache.check_rows=0"
    return Part(
        name=name,
        script="step_time.py",
        arguments=f"--config configs/imagenet/{experiment}/100_epochs.yaml --steps 60 --compiled --set {settings} "
        f"data.batch_size={batch} student.image_size={size} teacher.image_size={teacher_size}",
        tiny="--steps 2 --no-compiled --set data.train=32x10 data.val=8x10 data.batch_size=4 student.image_size=32 "
        "teacher.image_size=32 teacher.model=torchvision:shufflenet_v2_x0_5 student.model=torchvision:shufflenet_v2_x0_5 "
        "data.device=cpu train.precision=fp32",
        minutes=8.0,
    )


_TINY_IMAGENET = "data.batch_size=8 student.image_size=32 data.device=cpu train.precision=fp32"
PARTS = (
    Part(
        name="gpu-pixels",
        script="gpu_pixels.py",
        arguments=f"--source {PHOTOGRAPHS}",
        tiny="--batch-size 4 --size 32 --loads 0 --model torchvision:shufflenet_v2_x0_5",
        minutes=3.0,
        needs=PHOTOGRAPHS,
    ),
    Part(
        name="gpu-loaders",
        script="gpu_loaders.py",
        arguments=f"--source {PHOTOGRAPHS} --shares 0.65",
        tiny="--images 16 --batch-size 8 --sizes 32 --shares 0.65 --workers 1 --rounds 1",
        needs=PHOTOGRAPHS,
    ),
    Part(  # apart: a decoder that crashes must not take the other loaders with it
        name="gpu-loaders-other-shares",
        script="gpu_loaders.py",
        arguments=f"--source {PHOTOGRAPHS} --shares 0 1 0.25 0.8",
        tiny="--images 16 --batch-size 8 --sizes 32 --shares 0.65 --workers 1 --rounds 1",
        needs=PHOTOGRAPHS,
    ),
    Part(
        name="fused-loss-cuda",
        script="fused_loss.py",
        arguments="--rows 64 256 1024 4096 8192 16384",
        tiny="--rows 16 --seconds 0.1",
        minutes=5.0,
    ),
    _step("step-r18-192", "resnet34_resnet18", 1024, 192, 192),
    Part(
        name="epoch-r18",
        script="epoch_time.py",
        arguments=f"--config configs/imagenet/resnet34_resnet18/100_epochs.yaml --source {PHOTOGRAPHS}",
        tiny="--images 16 --backends torch --workers 0 --rounds 1 "
        f"--set {_TINY_IMAGENET} teacher.model=torchvision:shufflenet_v2_x0_5 student.model=torchvision:shufflenet_v2_x0_5",
        needs=PHOTOGRAPHS,
    ),
    _step("step-r18-224", "resnet34_resnet18", 256, 224, 224),
    _step("step-r18-160", "resnet34_resnet18", 1024, 160, 192),
    Part(
        name="profiler-cuda",
        script="profiler.py",
        arguments="--config configs/imagenet/resnet34_resnet18/100_epochs.yaml --times 4 --seconds 40 "
        "--set data.backend=synthetic data.train=51200x1000 data.val=1000x1000 data.batch_size=1024 teacher.mode=none "
        "loss.kd=0 loss.dcd=0",
        tiny="--times 2 --seconds 0.1 --set data.train=64x10 data.val=8x10 data.batch_size=4 student.image_size=32 "
        "student.model=torchvision:shufflenet_v2_x0_5 data.device=cpu train.precision=fp32",
        minutes=5.0,
    ),
    _step("step-mobilenet-v2-192", "resnet50_mobilenet_v2", 1024, 192, 192),
    _step("step-mobilenet-v2-224", "resnet50_mobilenet_v2", 256, 224, 224),
    _step("step-mobilenet-v2-160", "resnet50_mobilenet_v2", 1024, 160, 192),
    Part(
        name="fill-cuda",
        script="fill_rate.py",
        arguments="--config configs/cifar100/fast/resnet32x4_resnet8x4_dcd_kd.yaml --views",
        tiny="--repeats 1 --set data.device=cpu teacher.model=cifar:resnet8 teacher.precision=fp32",
        minutes=4.0,
        needs=CIFAR,
    ),
    Part(
        name="cifar-pairs",
        script="cifar_pairs.py",
        arguments="--minutes 8",
        tiny=f"--pairs 1 --methods KD --seeds 1 --runs {TINY} "
        "--set data.device=cpu student.image_size=8 train.epochs=1 schedule.warmup=0 views.count=1 train.precision=fp32",
        needs=CIFAR,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="run_gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all that are missing")
    parser.add_argument("--list", action="store_true", help="what is measured, what is missing; measures nothing")
    parser.add_argument("--again", action="store_true", help="measure parts that have results, too")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="start no part that may take longer (default 25)"
    )
    parser.add_argument("--tiny", action="store_true", help=f"try the code on a CPU; figures go to {TINY}")
    arguments = parser.parse_args()
    results = TINY.absolute() if arguments.tiny else ROOT / "benchmarks" / "results"
    if arguments.list:
        print(f"{measured(results)}\n{missing(results)}")
        return 0
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in arguments.parts if name not in known]:
        raise ValueError(f"{unknown[0]}: no such part; known: {', '.join(known)}")
    if not (torch.cuda.is_available() or arguments.tiny):
        raise ValueError(
            "torch finds no GPU, and these parts measure one; --tiny tries their code, --list lists them"
        )
    if arguments.again:
        for name in arguments.parts or known:
            (results / f"{name}.json").unlink(missing_ok=True)
    return run([known[name] for name in arguments.parts or known], arguments, results)


def run(parts: list[Part], arguments: argparse.Namespace, results: Path) -> int:
    """Run what is missing while there is time, a part of several calls as often as it needs; 1 if one failed."""
    until = time.monotonic() + 60 * arguments.minutes
    failed: list[Part] = []
    while waiting := [part for part in parts if part not in failed and not complete(results, part)]:
        part = waiting[0]
        if time.monotonic() + 60 * part.minutes > until:
            print(f"{part.name} may take {part.minutes:g} minutes, which are not left: run it again to continue")
            break
        print(f"\n=== {part.name}: python {shlex.join(part.command(tiny=arguments.tiny))}", flush=True)
        if problem := start(part, results, tiny=arguments.tiny):
            failed.append(part)
            print(f"{part.name}: {problem}", file=sys.stderr)
    return bool(failed)


def start(part: Part, results: Path, *, tiny: bool) -> str | None:
    """Run a part in a process of its own; what went wrong, or None."""
    if part.needs and not Path(part.needs).exists():
        return f"{part.needs} is missing; docs/convert.md says how it is made"
    command = [sys.executable, *part.command(tiny=tiny)]
    environment = {**os.environ, "FASTDCD_RESULTS": str(results)}
    try:
        code = subprocess.run(command, env=environment, timeout=60 * part.minutes).returncode
    except subprocess.TimeoutExpired:
        return f"not finished after {part.minutes:g} minutes"
    if not code and not (results / f"{part.name}.json").is_file():
        return "no results written"
    return f"exit code {code}" if code else None


def complete(results: Path, part: Part) -> bool:
    """Whether its results are there; a part that takes several calls says itself that it is not through."""
    path = results / f"{part.name}.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("complete", True))


# ---- what has been measured


def measured(results: Path) -> str:
    """Each result: when and on what it was measured, what it is, and the command that measures it."""
    text = [f"MEASURED ({os.path.relpath(results)})"]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        about: dict[str, Any] = found.get("environment", found)
        on = about.get("gpu") or f"{about.get('processor')}, {about.get('cores')} cores"
        when = "; ".join(each for each in (about.get("date"), f"torch {about['versions']['torch']}", on) if each)
        text.append(entry(f"{path.stem}  [{when}]", about["command"]))
    return "\n".join(text)


def missing(results: Path) -> str:
    """Each part of this program that is not measured yet, or not to its end."""
    text = ["NOT MEASURED YET (needs a GPU)"]
    for part in PARTS:
        if not complete(results, part):
            text.append(entry(part.name, f"python {shlex.join(part.command(tiny=False))}"))
    return "\n".join(text)


def entry(head: str, command: str) -> str:
    """A result, the first line of what its benchmark says of itself, and its command."""
    script = ROOT / "benchmarks" / Path(shlex.split(command)[1]).name
    says = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.is_file() else None
    return f"\n  {head}\n      {(says or '').partition(chr(10))[0]}\n      {command}"


if __name__ == "__main__":
    cli.run(main)
