"""The profiler's projection against a measured run: two processes, predicted from profiles of one.

A projection says what more processes make of a step if each has a machine of its own. On one machine that is
imitated by matched shares: a core and a thread for every process. In each round two profiles of a process that
trains alone run side by side, so that both cores and the memory are as busy as they will be; then the same
processes train together. Rows of each process are the same in both. The bandwidth of the all-reduce is the measured one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

from benchmarks import record
from fastdcd import cli, config_file
from fastdcd.profiler.projection import step_seconds

ROOT = Path(__file__).resolve().parents[1]


def profiles(arguments: argparse.Namespace, folder: Path, count: int, *, together: bool) -> list[dict[str, Any]]:
    """Profiles of `count` processes, a core each: ranks of one run (rank 0 speaks for all), or strangers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = arguments.rows * (count if together else 1)
    started, files = [], []
    for rank in range(count):
        file = folder / f"{'ranks' if together else 'alone'}-{rank}.json"
        command = [sys.executable, str(ROOT / "tools/profile_throughput.py"), "--config", str(arguments.config)]
        command += ["--quick", "--seconds", str(arguments.seconds), "--json", str(file)]
        command += ["--set", *arguments.set, f"data.batch_size={rows}"]
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if together:
            environment |= {name: str(value) for name, value in group.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.sched_setaffinity(process.pid, {sorted(os.sched_getaffinity(0))[rank]})  # its threads begin later
        started.append(process)
        files.append(file)
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise ValueError("a profile failed; run tools/profile_throughput.py with this config to see why")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="projection.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config_file.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=64, help="of each process (default 64)")
    parser.add_argument("--processes", type=int, default=2, help="a core each (default 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each profile (default 10)")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    count, rounds = arguments.processes, []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            alone = profiles(arguments, Path(folder), count, together=False)
            joined = profiles(arguments, Path(folder), count, together=True)[0]
            bandwidth = joined["communication"]["bytes_per_second"]
            steps = [step_seconds(profile, count, bandwidth) for profile in alone]
            rounds.append(
                {
                    "predicted": max(steps),  # all wait for the slowest
                    "measured": joined["step"]["mean"],
                    "alone": max(step_seconds(profile, 1, bandwidth) for profile in alone),
                    "bytes_per_second": bandwidth,
                    "all_reduce_alone": joined["communication"]["all_reduce_alone_seconds"],
                    "all_reduce": joined["stages"]["all_reduce"]["mean"],
                    "stages_alone": {name: each["mean"] for name, each in alone[0]["stages"].items()},
                    "stages": {name: each["mean"] for name, each in joined["stages"].items()},
                }
            )
            print(
                f"predicted {rounds[-1]['predicted']:.4f} s, measured {rounds[-1]['measured']:.4f} s",
                file=sys.stderr,
            )
    ratios = record.spread([each["predicted"] / each["measured"] for each in rounds])
    unchanged = record.spread([each["alone"] / each["measured"] for each in rounds])
    shares = record.spread([each["all_reduce"] / each["measured"] for each in rounds])
    lines = [
        "| | |",
        "|---|---|",
        f"| predicted over measured step of {count} processes | {record.text(ratios)} |",
        f"| step of one process over measured step | {record.text(unchanged)} |",
        f"| all-reduce, share of the measured step | {record.text(shares)} |",
        f"| rounds | {len(rounds)} |",
    ]
    record.write(arguments.name, {"ratio": ratios, "rounds": rounds}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
