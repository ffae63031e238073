"""Compare all of a converted dataset or a teacher cache with its checksums."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli
from fastdcd.cache import verify as caches
from fastdcd.cache.store import TeacherCache
from fastdcd.progress import ProgressBar
from pipelines.files import user_path
from pipelines.formats import verify as stored

_MOST = 50  # lines of one dataset


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Read all of converted datasets and teacher caches, and name what fails its checksum; exit code "
        "2 if anything does.",
        epilog="example: python tools/verify.py data/imagenet-ffcv/train.beton data/imagenet-cache",
    )
    parser.add_argument(
        "paths",
        type=user_path,
        nargs="+",
        metavar="PATH",
        help="a folder of shards, a resident dataset, a .beton, a folder of those, or a cache",
    )
    arguments = parser.parse_args()
    given = [
        each for path in arguments.paths for each in ([path] if caches.is_cache(path) else stored.datasets(path))
    ]
    wrong = [path for path in given if not verify(path)]
    if wrong:
        raise ValueError(f"failed verification: {', '.join(map(str, wrong))}")
    return 0


def verify(path: Path) -> bool:
    """Verify a dataset or a cache and print what is damaged; whether nothing is."""
    try:
        wrong, summary = cache(path) if caches.is_cache(path) else dataset(path)
    except ValueError as error:  # damaged so that it cannot be opened
        wrong, summary = [str(error)], ""
    for text in wrong[:_MOST]:
        print(cli.printable(text))
    if wrong[_MOST:]:
        print(f"{path}: {len(wrong) - _MOST:,} more")
    if not wrong:
        print(f"{path}: {summary}")
    return not wrong


def dataset(path: Path) -> tuple[list[str], str]:
    """What is wrong with a dataset, and what to say if nothing is."""
    images, findings = stored.open_dataset(path)
    bar = ProgressBar(f"verify {path.name}", images, "images")
    wrong = []
    for done, text in findings:
        bar.update(done)
        if text:
            wrong.append(text)
    bar.close()
    return wrong, f"{images:,} images, all checksums match"


def cache(path: Path) -> tuple[list[str], str]:
    """The same of a teacher cache."""
    found = caches.verify(TeacherCache.open(path))
    return found.wrong(path), found.summary


if __name__ == "__main__":
    cli.run(main)
