"""Convert a dataset once into a format that a loader backend reads fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

from fastdcd import cli
from pipelines.index import read_classes
from pipelines.resident_writer import write_resident


def resident(arguments: argparse.Namespace) -> int:
    classes = read_classes(arguments.classes) if arguments.classes else None
    index = write_resident(
        arguments.source,
        arguments.out,
        classes=classes,
        size=arguments.size,
        limit=arguments.limit,
        workers=arguments.workers,
    )
    height, width = index.sizes[0]
    print(f"{arguments.out}: {len(index)} images of {height}x{width} pixels, {len(index.classes)} classes")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Convert a dataset once into a format that a loader backend reads fast.",
        epilog="example: python tools/convert.py resident data/cifar100/train data/cifar100-resident/train",
    )
    formats = parser.add_subparsers(dest="format", required=True)
    command = formats.add_parser("resident", help="one array of pixels for small images (backend: resident)")
    command.add_argument("source", type=Path, metavar="SRC", help="class folders of images: SRC/class/image")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    command.add_argument("--classes", type=Path, metavar="FILE", help="class names in label order, one a line")
    command.add_argument(
        "--size", type=int, metavar="N", help="resize the shorter side to N, crop the centre to NxN"
    )
    command.add_argument("--limit", type=int, metavar="N", help="keep N images, spread evenly over the classes")
    command.add_argument("--workers", type=int, default=2, metavar="W", help="decoding threads (default 2)")
    command.set_defaults(run=resident)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    cli.run(main)
