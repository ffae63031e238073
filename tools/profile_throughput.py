"""Where does a run's time go? Measure a config's stages, say what limits it and what to change."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate import PartialState

from fastdcd import cli, config_file
from fastdcd.profiler import measure, page, projection, table
from fastdcd.profiler.verdict import verdict
from pipelines.conversion.job import sample_to_beton
from pipelines.files import replace_file, user_path, write_json

_EPILOG = """examples:
  python tools/profile_throughput.py --config configs/digits/dcd_kd.yaml --html profile.html
  python tools/profile_throughput.py --config configs/digits/dcd_kd.yaml --json a.json
  python tools/profile_throughput.py --config configs/digits/dcd_kd.yaml --json b.json --set loss.dcd=0
  python tools/profile_throughput.py --compare a.json b.json

Under `accelerate launch` it measures all processes. It trains a copy of the student and writes nothing of the run.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=user_path, metavar="FILE", help="the experiment's YAML file")
    what.add_argument("--compare", type=user_path, nargs=2, metavar=("A", "B"), help="two files written by --json")
    config_file.add_overrides(parser)
    parser.add_argument(
        "--seconds", type=_positive, default=60.0, metavar="S", help="measure about S (default 60)"
    )
    parser.add_argument("--quick", action="store_true", help="do not try other settings: less advice, sooner")
    parser.add_argument("--json", type=user_path, metavar="F", help="write everything measured")
    parser.add_argument("--html", type=user_path, metavar="F", help="write a page")
    parser.add_argument("--trace", type=user_path, metavar="F", help="record some steps as a Chrome trace")
    parser.add_argument(
        "--price", type=_positive, metavar="P", help="price of one device an hour, for the projection"
    )
    parser.add_argument(
        "--bandwidth", type=_positive, metavar="GB/S", help="of the all-reduce of each device, for the projection"
    )
    arguments = parser.parse_args()
    if arguments.compare:
        print(table.compare(*map(_read, arguments.compare)))
        return 0
    for output in (arguments.json, arguments.html, arguments.trace):
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"{output}: its folder does not exist; make it first")
    found = measure.profile(
        config_file.load(arguments.config, arguments.set),
        seconds=arguments.seconds,
        quick=arguments.quick,
        trace=arguments.trace,
        convert=sample_to_beton,
    )
    found["about"] |= {"config": str(arguments.config), "set": arguments.set}
    bandwidth = arguments.bandwidth * 1e9 if arguments.bandwidth else None
    found["projection"] = projection.project(found, bandwidth=bandwidth, price=arguments.price)
    found["verdict"] = verdict(found)
    if PartialState().is_main_process:
        print(table.table(found))
        if arguments.json:
            write_json(arguments.json, found)
        if arguments.html:
            with replace_file(arguments.html) as file:
                file.write(page.page(found).encode())
    return 0


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError
    return value


_positive.__name__ = "number above 0"  # in messages


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected a file written by --json") from None
    got = found.get("format") if isinstance(found, dict) else None
    if got != measure.FORMAT:
        raise ValueError(f"{path}: format {got!r}, expected {measure.FORMAT!r}; profile again")
    return dict(found)


if __name__ == "__main__":
    cli.run(main)
