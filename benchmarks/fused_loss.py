"""Time and memory of DCD's forms, forward and backward, side by side.

Each number of rows runs in a process of its own, and in it the forms take turns, so that all see the same
machine; memory is measured once a form, in one more process each, as the growth of the resident set (CPU) or of
the allocator's peak (GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from fastdcd.losses import dcd

DIMENSIONS = 128
FORMS = {"cpu": ["naive", "compiled", "tiled", "auto"], "cuda": ["naive", "compiled", "tiled", "triton", "auto"]}


def inputs(rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [rows, 128] of student and teacher, and tau."""
    torch.manual_seed(0)
    z_s, z_t = F.normalize(torch.randn(2, rows, DIMENSIONS, device=device), dim=2)
    return z_s.requires_grad_(), z_t.requires_grad_(), torch.tensor(5.0, device=device, requires_grad=True)


def step(form: str, values: tuple[Tensor, Tensor, Tensor], device: str) -> float:
    """Seconds of one forward and backward pass."""
    for each in values:
        each.grad = None
    begin = time.perf_counter()
    dcd.dcd(*values, form=form).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def times(rows: int, device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each form, taking turns in random order."""
    values = inputs(rows, device)
    forms = FORMS[device]
    for form in forms:  # compile, warm up
        step(form, values, device)
        step(form, values, device)
    order = random.Random(0)
    found: dict[str, list[float]] = {form: [] for form in forms}
    begin = time.perf_counter()
    number = 0
    while number < 5 or time.perf_counter() - begin < seconds:
        for form in order.sample(forms, len(forms)):
            found[form].append(step(form, values, device))
        number += 1
    return found


def peak(rows: int, device: str, form: str) -> int:
    """Bytes that one forward and backward pass needs beyond its inputs."""
    small = inputs(32, device)
    step(form, small, device)  # libraries, compilers and thread pools are not the loss
    values = inputs(rows, device)
    if device == "cuda":
        step(form, values, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, values, device)
        return torch.cuda.max_memory_allocated() - before
    if form == "compiled":
        step(form, values, device)
    before = largest = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.0005):
            largest = max(largest, _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    step(form, values, device)
    done.set()
    thread.join()
    return largest - before


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def child(arguments: argparse.Namespace, *more: object) -> Any:
    """This program in a process of its own; what it prints last, as JSON."""
    command = [sys.executable, __file__, "--device", arguments.device, "--threads", str(arguments.threads)]
    ran = subprocess.run([*command, *map(str, more)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    lines = [
        "| rows | form | ms, median | (least to greatest) | time / naive | peak MiB | memory / naive |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for rows, forms in results["rows"].items():
        for form, found in forms.items():
            naive = forms["naive"]
            memory = found["peak_bytes"] / naive["peak_bytes"] if naive["peak_bytes"] > 2**20 else None
            lines.append(
                f"| {rows} | {form}{' = ' + found['form'] if form == 'auto' else ''} | {found['median_ms']:.2f} | "
                f"{found['least_ms']:.2f} to {found['greatest_ms']:.2f} | {found['median_ms'] / naive['median_ms']:.2f} | "
                f"{found['peak_bytes'] / 2**20:.1f} | {'-' if memory is None else f'{memory:.3f}'} |"
            )
    return "# DCD, forward and backward\n\n" + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--device", choices=FORMS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of rows")
    parser.add_argument("--name", help="results are written to benchmarks/results/NAME; default fused-loss-DEVICE")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(peak(arguments.rows[0], arguments.device, arguments.memory_of)))
        return 0
    if arguments.times:
        print(json.dumps(times(arguments.rows[0], arguments.device, arguments.seconds)))
        return 0

    results: dict[str, Any] = {
        "device": arguments.device,
        "dimensions": DIMENSIONS,
        "dtype": "float32",
        "rows": {},
    }
    for rows in arguments.rows:
        seconds = child(arguments, "--times", "--rows", rows, "--seconds", arguments.seconds)
        results["rows"][rows] = {
            form: {
                "median_ms": 1e3 * statistics.median(each),
                "least_ms": 1e3 * min(each),
                "greatest_ms": 1e3 * max(each),
                "runs": len(each),
                "peak_bytes": child(arguments, "--memory-of", form, "--rows", rows),
                "form": dcd.fastest(arguments.device, rows) if form == "auto" else form,
            }
            for form, each in seconds.items()
        }
    record.write(arguments.name or f"fused-loss-{arguments.device}", results, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
