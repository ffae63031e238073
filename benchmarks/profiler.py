"""Can the profiler be believed? What it costs, whether its stages add up, and whether it says the same twice.

The same config is profiled several times. Marked and unmarked steps alternate within each, so that whatever
else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

from benchmarks import record
from fastdcd import cli, config_file
from fastdcd.profiler import measure
from fastdcd.profiler.table import apart, overlap
from fastdcd.profiler.verdict import verdict
from pipelines.conversion.job import sample_to_beton


def main() -> int:
    parser = argparse.ArgumentParser(prog="profiler.py", description=__doc__.splitlines()[0] if __doc__ else None)
    config_file.add_arguments(parser)
    parser.add_argument("--times", type=int, default=5, metavar="N", help="profiles (default 5)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each (default 20)")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    cfg = config_file.load(arguments.config, arguments.set)
    profiles = [
        measure.profile(cfg, seconds=arguments.seconds, convert=sample_to_beton) for _ in range(arguments.times)
    ]
    overhead = [profile["profiling_overhead"] for profile in profiles]
    sums = [
        sum(each["mean"] for each in profile["stages"].values()) / profile["step"]["mean"] for profile in profiles
    ]
    pairs = list(combinations(profiles, 2))
    overlapping = sum(overlap(a["step"], b["step"]) for a, b in pairs)
    agree = sum(not apart(a["step"], b["step"]) for a, b in pairs)
    medians = [profile["step"]["median"] for profile in profiles]
    stages = [(a["stages"][name], b["stages"][name]) for a, b in pairs for name in a["stages"]]
    stages_agree = sum(not apart(a, b) for a, b in stages)
    kinds = [verdict(profile)["kind"] for profile in profiles]
    lines = [
        "| | |",
        "|---|---|",
        f"| marked over unmarked steps, less 1 | {record.text(record.spread(overhead))} |",
        f"| stages added up over the step | {record.text(record.spread(sums))} |",
        f"| pairs of profiles whose steps' quartiles overlap | {overlapping} of {len(pairs)} |",
        f"| slowest over fastest median step | {max(medians) / min(medians):.3f} |",
        f"| pairs of steps that --compare calls within the spread | {agree} of {len(pairs)} |",
        f"| pairs of stages that it does | {stages_agree} of {len(stages)} |",
        f"| verdicts | {', '.join(kinds)} |",
    ]
    results = {
        "config": str(arguments.config),
        "overhead": overhead,
        "stages_over_step": sums,
        "steps": [profile["step"] for profile in profiles],
        "verdicts": kinds,
    }
    record.write(arguments.name, results, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
