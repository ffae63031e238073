"""Copy a dataset or a teacher cache from an object store to a local disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli
from fastdcd.remote import staging
from pipelines.files import user_path

_EPILOG = """examples:
  python tools/stage.py s3://BUCKET/imagenet-shards /local/imagenet-shards
  python tools/stage.py 's3://BUCKET/imagenet-shards/train/*.tar' /local/train
  python tools/stage.py hf://datasets/OWNER/NAME /shared/name --part 0/4       # one of four machines, one folder

Killed at any moment, the same command continues where it stopped. What tools/push.py wrote is compared with its
checksums. Credentials are those of the store's own tools: docs/destinations.md.
"""


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    part, parts = int(number), int(of)
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


_part.__name__ = "part i/n, counted from 0"  # in messages


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "url", metavar="URL", help="hf://, s3://, gs:// or https:// address, perhaps with a pattern"
    )
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="where to")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="only part I of N, counted from 0, of the files"
    )
    parser.add_argument(
        "--workers",
        type=cli.positive,
        default=staging.WORKERS,
        metavar="W",
        help=f"requests at a time (default {staging.WORKERS})",
    )
    arguments = parser.parse_args()
    part, of = arguments.part
    staged = staging.stage(arguments.url, arguments.folder, part=part, of=of, workers=arguments.workers)
    print(f"{arguments.folder}: {staged}")
    return 0


if __name__ == "__main__":
    cli.run(main)
