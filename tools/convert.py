"""Convert a dataset once into a format that a loader backend reads fast."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli
from fastdcd.remote import staging
from fastdcd.remote.address import is_url
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import SHARD, WHOLE, Job, Part, to_beton, to_resident, to_shards
from pipelines.conversion.journal import REJECTS
from pipelines.conversion.sources import Sources, find_sets, open_sources
from pipelines.files import user_path
from pipelines.formats.beton import index_folder
from pipelines.image_folder import read_classes
from pipelines.index import DatasetIndex

_EPILOG = """example:
  python tools/convert.py resident data/cifar-100-python.tar.gz/train data/cifar100-resident/train
  python tools/convert.py ffcv ILSVRC2012_img_train.tar data/imagenet-ffcv/train.beton --max-size 400 --workers 16
  python tools/convert.py shards data/imagenet/train data/imagenet-shards/train --workers 16

SRC is class folders, in a folder, tar or zip (also ImageNet's tar of tars); Kaggle's or torchvision's ImageNet; Tiny
ImageNet; WebDataset tars; Hugging Face parquet files; or CIFAR's archive (.../train or .../test): docs/convert.md.
An address (hf://datasets/OWNER/NAME, s3://, gs://, https://) is first copied to OUT.source. A root with train/ and
val/ becomes OUT/train and OUT/val. Killed at any moment, the same command resumes.
"""


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _source(text: str) -> Path | str:
    """A path, or an address as it is: a path would lose one of its slashes."""
    return text if is_url(text) else user_path(text)


def _local(arguments: argparse.Namespace) -> Path:
    """The source on a local disk: an address is staged first, beside the output."""
    if isinstance(arguments.source, Path):
        return arguments.source
    folder = arguments.stage or arguments.out.with_name(f"{arguments.out.name}.source")
    staged = staging.stage(arguments.source, folder)
    _say(f"{folder}: {staged}; not needed any more once the conversion is done")
    return staged.path


def _sets(arguments: argparse.Namespace, suffix: str) -> Iterator[tuple[Sources, Path]]:
    """What to convert, and where to: the source, or each set in it with the classes of the first."""
    classes: Sequence[str] | None = read_classes(arguments.classes) if arguments.classes else None
    source = _local(arguments)
    sets = find_sets(source)
    for name, path in sets.items() or [("", source)]:
        try:
            sources = open_sources(path, classes, first_label=arguments.first_label)
        except ValueError as error:
            if name != "test" or len(sets) < 3:
                raise
            _say(f"test: left out ({error})")
            continue
        for note in sources.notes:
            _say(f"{path}: {note}")
        if sets and classes is None:
            classes = sources.classes
        if arguments.keep:
            sources = sources.keep(arguments.keep)
        if arguments.limit:
            sources = sources.limit(arguments.limit)
        yield sources, arguments.out / f"{name}{suffix}" if name else arguments.out


def _convert(
    arguments: argparse.Namespace,
    convert: Callable[[Job], DatasetIndex | None],
    folder: Callable[[Path], Path] = lambda out: out,
    suffix: str = "",
) -> int:
    several = False
    for sources, out in _sets(arguments, suffix):
        job = Job(
            sources=sources,
            out=out,
            workers=arguments.workers,
            part=arguments.shard,
            say=_say,
            empty_classes=arguments.empty_classes,
        )
        _report(job, folder(out), convert(job))
        several = several or out != arguments.out
    root = arguments.out if several else arguments.out.parent
    if all((root / f"{name}{suffix}").exists() for name in ("train", "val")):
        _say(f"next: fastdcd init {shlex.quote(str(root))}")
    return 0


def _storage(arguments: argparse.Namespace, jpeg: float) -> Storage:
    return Storage(max_size=arguments.max_size or None, quality=arguments.quality, jpeg=jpeg)


def ffcv(arguments: argparse.Namespace) -> int:
    storage = _storage(arguments, arguments.jpeg_share)
    return _convert(arguments, lambda job: to_beton(job, storage), index_folder, ".beton")


def shards(arguments: argparse.Namespace) -> int:
    storage = _storage(arguments, 1.0)
    return _convert(arguments, lambda job: to_shards(job, storage, arguments.shard_size))


def resident(arguments: argparse.Namespace) -> int:
    return _convert(arguments, lambda job: to_resident(job, arguments.size))


def _report(job: Job, folder: Path, index: DatasetIndex | None) -> None:
    if index is None:
        print(f"{job.out}: this part is done; the run that finds all shards there writes the index")
        return
    rejected = len((folder / REJECTS).read_text(encoding="utf-8").splitlines()) - 1
    height, width = index.sizes.mean(0)
    counts = np.bincount(index.labels, minlength=len(index.classes))
    empty = [name for name, count in zip(index.classes, counts.tolist(), strict=True) if not count]
    print(
        f"{job.out}: {len(index):,} images of {width:.0f}x{height:.0f} pixels on average, {len(index.classes)} "
        f"classes; {rejected} rejected"
        + (f", see {folder / REJECTS}" if rejected else "")
        + (f"; {len(empty)} classes without an image, as {empty[0]!r}" if empty else "")
    )


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


def _part(text: str) -> Part:
    number, slash, of = text.partition("/")
    if not slash:
        raise ValueError
    try:
        return Part(number=int(number), of=int(of))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_count.__name__, _part.__name__ = "number", "part i/n"  # in messages


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Convert a dataset once into a format that a loader backend reads fast.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "source",
        type=_source,
        metavar="SRC",
        help="class folders, an archive, shards, an address (see convert.py -h)",
    )
    common.add_argument(
        "--stage",
        type=user_path,
        metavar="DIR",
        help="where SRC is copied to if it is an address (default OUT.source)",
    )
    common.add_argument("--classes", type=user_path, metavar="FILE", help="class names in label order, one a line")
    common.add_argument(
        "--keep", nargs="+", metavar="PATTERN", help="keep only classes of these names, as in 'a*'"
    )
    common.add_argument(
        "--limit", type=cli.positive, metavar="N", help="keep N images, spread evenly over the classes"
    )
    common.add_argument(
        "--first-label",
        type=_count,
        default=0,
        metavar="N",
        help="what a WebDataset's labels count from (default 0)",
    )
    common.add_argument(
        "--empty-classes", action="store_true", help="keep the label of a class whose images are all rejected"
    )
    common.add_argument("--workers", type=_count, default=2, metavar="W", help="processes (default 2)")
    common.add_argument(
        "--shard",
        type=_part,
        default=WHOLE,
        metavar="I/N",
        help="convert part I of N, counted from 0: shards go to one folder, others become datasets of their own",
    )
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument(
        "--max-size", type=_count, default=500, metavar="N", help="longest side, pixels; 0: as it is (default 500)"
    )
    images.add_argument("--quality", type=cli.positive, default=90, metavar="Q", help="JPEG quality (default 90)")

    command = formats.add_parser("ffcv", parents=[common, images], help="one .beton file (backend: ffcv)")
    command.add_argument("out", type=user_path, metavar="OUT", help=".beton file to write")
    command.add_argument(
        "--jpeg-share",
        type=float,
        default=0.5,
        metavar="P",
        help="share of JPEGs; the others are raw pixels, larger and faster (default 0.5)",
    )
    command.set_defaults(run=ffcv)

    command = formats.add_parser("shards", parents=[common, images], help="WebDataset tars (backend: dali)")
    command.add_argument("out", type=user_path, metavar="OUT", help="folder to write")
    command.add_argument(
        "--shard-size", type=cli.positive, default=SHARD, metavar="N", help="images a tar (default 1000)"
    )
    command.set_defaults(run=shards)

    command = formats.add_parser("resident", parents=[common], help="one array of pixels (backend: resident)")
    command.add_argument("out", type=user_path, metavar="OUT", help="folder to write")
    command.add_argument(
        "--size", type=cli.positive, metavar="N", help="resize the shorter side to N, crop the centre to NxN"
    )
    command.set_defaults(run=resident)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    cli.run(main)
