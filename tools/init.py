"""Write a first config for your own data, with a comment on every choice, and print the two commands that come next."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli, starter
from pipelines.base import BACKENDS
from pipelines.files import replace_file, user_path

_EPILOG = """examples:
  python tools/init.py data/mine                                  # a teacher is trained first, on the same images
  python tools/init.py data/mine --teacher timm:resnet50.a1_in1k  # published weights teach, fetched once

DATA holds train/ and val/: class folders, or what tools/convert.py wrote (shards, resident arrays, .beton).
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=user_path, metavar="DATA", help="folder with train/ and val/")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="folder for the configs (default configs/NAME)"
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="timm:NAME or torchvision:NAME teach with their published weights; cifar:NAME or file.py:function is "
        "trained first",
    )
    parser.add_argument(
        "--student", metavar="MODEL", help="timm:NAME, torchvision:NAME, cifar:NAME, file.py:function"
    )
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="loader (default: by what the data is)")
    parser.add_argument(
        "--size", type=cli.positive, metavar="N", help="image size, pixels (default: by the images)"
    )
    parser.add_argument("--epochs", type=cli.positive, default=30, metavar="N", help="default 30")
    arguments = parser.parse_args()
    found = starter.look(arguments.data, arguments.backend)
    print(
        f"{arguments.data}: {found.kind}, {found.images:,} + {found.val_images:,} images of {len(found.classes)} classes, "
        f"{found.side} px"
    )
    name = re.sub(r"[^\w.-]+", "-", arguments.data.resolve().name).strip("-.") or "mine"
    choice = starter.choose(
        found,
        name,
        student=arguments.student,
        teacher=arguments.teacher,
        size=arguments.size,
        epochs=arguments.epochs,
    )
    folder = arguments.out or Path("configs", name)
    texts = starter.configs(found, choice, folder)
    for file in texts:
        if (folder / file).exists():
            raise ValueError(f"{folder / file}: is there already; remove it or choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        with replace_file(folder / file) as stream:
            stream.write(text.encode())
    print(f"wrote {' and '.join(str(folder / file) for file in texts)}; next:\n")
    for command in starter.commands(folder, choice):
        print(f"    {command}")
    return 0


if __name__ == "__main__":
    cli.run(main)
