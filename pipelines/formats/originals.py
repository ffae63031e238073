"""Images as they are: the shards of tools/convert.py, or class folders."""

from __future__ import annotations

from pathlib import Path

from pipelines.base import LoaderOptions
from pipelines.formats.shards import INDEX
from pipelines.formats.stored import FileSamples, StoredSamples, open_shards
from pipelines.image_folder import index_image_folder, same_classes
from pipelines.index import DatasetIndex


def open_originals(path: Path, options: LoaderOptions) -> tuple[DatasetIndex, StoredSamples]:
    """The index of a folder, and its images' bytes.

    Raises ValueError for shards that are incomplete, or of other classes than `options` lists, and for folders that
    `index_image_folder` refuses.
    """
    if (path / INDEX / "index.json").is_file():
        index, samples = open_shards(path)
        if not same_classes(options.classes, index.classes):
            raise ValueError(f"{path}: its classes differ from the list given; convert again with --classes")
        return index, samples
    if any(path.glob("shard-*.tar")):
        raise ValueError(f"{path}: shards without an index; finish: python tools/convert.py shards SRC {path}")
    index = index_image_folder(
        path,
        classes=options.classes,
        cache=options.index_cache,
        on_decode_error=options.on_decode_error,
    )
    return index, FileSamples(path, index.names)
