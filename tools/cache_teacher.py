"""Estimate, fill or verify a teacher cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli, config, config_file
from fastdcd.cache import estimate as estimating
from fastdcd.cache import fill as filling
from fastdcd.cache import verify as verifying
from fastdcd.cache.store import TeacherCache
from pipelines.files import human_bytes


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Estimate what a teacher cache costs and saves, fill it, or verify it.",
        epilog="example: accelerate launch tools/cache_teacher.py fill --config configs/digits/dcd_kd.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("estimate", "print size, fill time and what a run saves; write nothing"),
        ("fill", "write the views that are missing; may be interrupted and started again"),
        ("verify", "compare every block with its checksum; exit 1 if one differs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        config_file.add_arguments(command)
        if name == "estimate":
            command.add_argument(
                "--seconds",
                type=float,
                default=5.0,
                metavar="S",
                help="measure each step for S seconds (default 5)",
            )
        if name == "fill":
            command.add_argument(
                "--repair", action="store_true", help="first find damaged rows and write them again"
            )
    arguments = parser.parse_args()
    cfg = config_file.load(arguments.config, arguments.set)
    return {"estimate": estimate, "fill": fill, "verify": verify}[arguments.command](cfg, arguments)


def estimate(cfg: config.Config, arguments: argparse.Namespace) -> int:
    with (parts := filling.open_parts(cfg)).loader:
        print(_table(estimating.estimate(parts, seconds=arguments.seconds)))
    return 0


def fill(cfg: config.Config, arguments: argparse.Namespace) -> int:
    with (parts := filling.open_parts(cfg)).loader:
        filling.fill(parts, repair=arguments.repair)
        manifest = parts.manifest
        size = manifest.views * manifest.view_bytes
        parts.accelerator.print(
            f"{cfg.cache.path}: {manifest.views} views of {manifest.rows} rows, {manifest.dim} features each as "
            f"{manifest.dtype}, {human_bytes(size)}"
        )
    return 0


def verify(cfg: config.Config, arguments: argparse.Namespace) -> int:
    if cfg.cache.path is None:
        raise ValueError("cache.path is missing; set it in the config or with --set cache.path=...")
    found = verifying.verify(TeacherCache.open(cfg.cache.path))
    wrong = found.wrong(cfg.cache.path)
    print("\n".join(wrong or [f"{cfg.cache.path}: {found.summary}"]))
    return 1 if wrong else 0


def _table(found: dict[str, Any]) -> str:
    share = found["teacher_share_of_online_step"]
    fits = found["bytes"] < found["free_bytes"]
    if not fits:
        advice = "does not fit on this disk: fewer views.count, cache.dtype uint8, or another cache.path"
    elif share < 0.1:
        advice = f"do not cache: the teacher is {share:.0%} of an online step; teacher.mode online costs little"
    elif found["runs_to_break_even"] <= 1:
        advice = (
            "cache: it has paid for itself before the first run ends"
            if found["runs_to_break_even"] < 1
            else (
                "cache if you train more than one student: it breaks even after one run, every further run is cheaper"
            )
        )
    else:
        advice = f"cache if you train {found['runs_to_break_even']:.1f} students or more"
    lines = [
        ("rows x views", f"{found['rows']:,} x {found['views']}"),
        ("size of a view, of all", f"{human_bytes(found['bytes_a_view'])}, {human_bytes(found['bytes'])}"),
        ("free on that disk", human_bytes(found["free_bytes"])),
        ("teacher alone, measured", f"{found['teacher_images_per_second']:,.0f} images/s"),
        ("time to fill, one process", cli.human_time(found["fill_seconds"])),
        (
            "step with a cache, online",
            f"{found['cached_step_seconds'] * 1e3:.1f} ms, {found['online_step_seconds'] * 1e3:.1f} ms",
        ),
        ("teacher's share of an online step", f"{share:.0%}"),
        ("saved by each run", cli.human_time(found["saved_seconds_a_run"])),
        ("breaks even after", f"{found['runs_to_break_even']:.2f} runs ({found['epochs_to_break_even']} epochs)"),
        ("advice", advice),
    ]
    return "\n".join(f"{name:<36}{value}" for name, value in lines)


if __name__ == "__main__":
    cli.run(main)
