"""Copy a dataset or a teacher cache to an object store, with checksums that staging compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdcd import cli
from fastdcd.remote import pushing
from fastdcd.remote.address import without_secrets
from pipelines.files import user_path

_EPILOG = """examples:
  python tools/push.py data/imagenet-shards s3://BUCKET/imagenet-shards
  python tools/push.py data/imagenet-cache gs://BUCKET/imagenet-cache
  python tools/stage.py s3://BUCKET/imagenet-shards /local/imagenet-shards     # on each machine

Killed at any moment, the same command continues where it stopped. Credentials are those of the store's own tools:
docs/destinations.md.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="what tools/convert.py or a fill wrote")
    parser.add_argument("url", metavar="URL", help="s3:// or gs:// address")
    arguments = parser.parse_args()
    pushed = pushing.push(arguments.folder, arguments.url)
    print(f"{without_secrets(arguments.url)}: {pushed}")
    return 0


if __name__ == "__main__":
    cli.run(main)
