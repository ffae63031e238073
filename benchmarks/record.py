"""What every benchmark writes beside its figures: command, machine, versions; median and spread."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.files import write_json

# FASTDCD_RESULTS: another folder, for runs that try the code and measure nothing.
RESULTS = Path(os.environ.get("FASTDCD_RESULTS", Path(__file__).resolve().parent / "results"))
PACKAGES = ("torch", "torchvision", "accelerate", "timm", "numpy", "ffcv", "nvidia-dali-cuda130")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "quartile_25": low, "quartile_75": high, "samples": len(values)}


def text(value: dict[str, float], digits: int = 3) -> str:
    """`median (quartile to quartile)`."""
    return f"{value['median']:.{digits}f} ({value['quartile_25']:.{digits}f} to {value['quartile_75']:.{digits}f})"


def environment() -> dict[str, Any]:
    """Date, command, processor, GPU and versions."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + shlex.join(sys.argv),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # others who used the machine
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, results: dict[str, Any], table: str) -> None:
    """benchmarks/results/NAME.json and .md, and the table on the terminal."""
    found = environment()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"environment": found, **results})
    about = (
        f"`{found['command']}` on {found['gpu'] or found['processor']}, {found['cores']} cores, "
        f"{found['threads']} threads, torch {found['versions']['torch']}; load average {found['load_average']}."
    )
    (RESULTS / f"{name}.md").write_text(f"{table}\n\n{about}\n", encoding="utf-8")
    print(f"\n{table}\n\n{about}")
