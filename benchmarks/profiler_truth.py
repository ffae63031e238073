"""Does the profiler name what is wrong? The planted faults of tests/test_profiler.py, many times each.

A fault is a reader, a decoder or a crop slowed by a known sleep, photographs that are much to decode, batches that
arrive late on the device, a large teacher, a loss over many rows, an evaluation longer than its epoch, a batch of a
few rows, a process slower than the other; and a healthy run. A verdict counts if it names that and nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import pytest

from benchmarks import record
from fastdcd import cli

TESTS = Path(__file__).resolve().parents[1] / "tests" / "test_profiler.py"


class Repeat:
    """A plugin of pytest: every test several times, and which of them passed."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.passed: defaultdict[str, list[bool]] = defaultdict(list)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.fixturenames.append("turn")
        metafunc.parametrize("turn", range(self.times))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items}:
            module.check_gain = lambda *_: (
                None
            )  # what applying the advice gives is another question, and takes longer

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            name = re.sub(r"\[\d+-?", "[", report.nodeid.rpartition("::")[2]).removesuffix("[]")
            self.passed[name].append(report.passed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="profiler_truth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10, metavar="N", help="each fault (default 10)")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose test has WORD in its name")
    parser.add_argument("--add", action="store_true", help="to what NAME has already: several short calls")
    arguments = parser.parse_args()
    sys.path.append(str(TESTS.parent))  # processes that tests start run this file too, whose first lines hide it
    repeat = Repeat(arguments.times)
    chosen = "(named or healthy)" + (f" and {arguments.only}" if arguments.only else "")
    pytest.main([str(TESTS), "-k", chosen, "--timeout=0", "--tb=line"], plugins=[repeat])
    if not repeat.passed:
        raise ValueError(f"{TESTS}: no test ran; see above")
    before = record.RESULTS / f"{arguments.name}.json"
    if arguments.add and before.is_file():
        for name, passed in json.loads(before.read_text(encoding="utf-8"))["passed"].items():
            repeat.passed[name] = [*passed, *repeat.passed[name]]
    lines = ["| planted | named |", "|---|---|"]
    for name, passed in repeat.passed.items():
        words = name.removeprefix("test_").replace("_", " ")
        words = words.partition(" and ")[0]  # what advice gains is not asked here
        lines.append(f"| {words} | {sum(passed)} of {len(passed)} |")
    right, all_of_them = (sum(f(each) for each in repeat.passed.values()) for f in (sum, len))
    lines.append(f"| all | {right} of {all_of_them} |")
    record.write(arguments.name, {"passed": repeat.passed}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
