"""FFCV's .beton files: a streaming writer that survives kill -9, and a checked reader of their layout.

FFCV's own field encoders make the bytes of a sample, and FFCV's own Loader reads the result. The layout is
written here because FFCV's DatasetWriter needs the number of good samples in advance, hangs on a bad one,
places samples in an order that depends on timing, and cannot resume.

Layout (ffcv.types): header, field descriptors, one metadata record a sample, then data in pages (a sample
never crosses a page), at the end the allocation table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.index import DatasetIndex

IMAGE, LABEL = "image", "label"  # the names of FFCV's ImageNet recipes
RAW = 1  # ffcv.fields.rgb_image.IMAGE_MODES


def import_ffcv() -> ModuleType:
    """FFCV, without the change of torch's thread count that importing it makes.

    Raises ValueError that says what to install if it is missing.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv
        import ffcv.fields
        import ffcv.reader
        import ffcv.types
    except ImportError as error:
        raise ValueError(
            f"FFCV is not installed ({error}): apt-get install pkg-config libopencv-dev libturbojpeg0-dev, "
            "then pip install 'fastdcd[ffcv]'"
        ) from error
    finally:
        torch.set_num_threads(threads)
    return ffcv


def index_folder(path: Path) -> Path:
    """Where the DatasetIndex of a .beton lies: beside it."""
    return path.with_name(f"{path.name}.index")


@dataclass(frozen=True)
class BetonLayout:
    """Where everything is in a .beton, checked.

    Attributes:
        labels: int64 [N].
        sizes: int32 [N, 2], height and width.
        raw: bool [N], raw pixels rather than JPEG.
        pointers, lengths: int64 [N], the bytes of each image in the file.
    """

    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    raw: NDArray[np.bool_]
    pointers: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def is_of(self, index: DatasetIndex) -> bool:
        """Whether an index says the same of where images lie and how large they are."""
        pairs: list[tuple[NDArray[Any] | None, NDArray[Any]]]
        pairs = [(index.offsets, self.pointers), (index.lengths, self.lengths), (index.sizes, self.sizes)]
        return all(theirs is not None and np.array_equal(theirs, ours) for theirs, ours in pairs)


def read_layout(path: Path) -> BetonLayout:
    """Read and check the layout of any .beton with an image and an integer label.

    Raises ValueError for another kind of file, other fields, or a file that has lost its tail: FFCV itself
    opens that and returns wrong pixels.
    """
    ffcv = import_ffcv()
    broken = f"{path}: not a whole .beton file; copy or convert it again"
    _check_header(path, ffcv.types, broken)
    try:
        reader = ffcv.reader.Reader(str(path))
    except (AssertionError, ArithmeticError, AttributeError, LookupError, ValueError) as error:
        raise ValueError(f"{broken} ({_in_a_line(error)})") from None
    except (OSError, TypeError, MemoryError) as error:
        raise ValueError(f"{broken} ({_in_a_line(error)})") from None
    image_fields = [n for n, f in reader.handlers.items() if isinstance(f, ffcv.fields.RGBImageField)]
    label_fields = [n for n, f in reader.handlers.items() if isinstance(f, ffcv.fields.IntField)]
    if len(image_fields) != 1 or len(label_fields) != 1:
        raise ValueError(
            f"{path}: its fields are {', '.join(reader.field_names)}; expected one RGBImageField and one IntField"
        )
    if len(reader.metadata) < reader.num_samples:
        raise ValueError(f"{broken} (it ends in its metadata)")
    image = reader.metadata[f"f{reader.field_names.index(image_fields[0])}"]
    labels = reader.metadata[f"f{reader.field_names.index(label_fields[0])}"].astype(np.int64)
    pointers = image["data_ptr"].astype(np.int64)
    table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
    rows = np.searchsorted(table["ptr"], image["data_ptr"])
    found = np.zeros(len(image), np.bool_)
    inside = rows < len(table)
    found[inside] = table["ptr"][rows[inside]] == image["data_ptr"][inside]
    if not found.all():
        raise ValueError(
            f"{broken} (its table knows {int(found.sum()):,} of {len(image):,} images: the end is missing)"
        )
    lengths = table["size"][rows].astype(np.int64)
    sizes = np.stack([image["height"], image["width"]], 1).astype(np.int32)
    raw = image["mode"] == RAW
    if (lengths[raw] != sizes[raw].astype(np.int64).prod(1) * 3).any():
        raise ValueError(f"{broken} (a raw image is not as long as its height and width say)")
    size = path.stat().st_size
    if len(image) and (sizes.min() < 1 or pointers.min() < 0 or lengths.min() < 1 or lengths.max() > size):
        raise ValueError(f"{broken} (an image without pixels or bytes)")
    if len(image) and (pointers > size - lengths).any():
        raise ValueError(f"{broken} (an image ends behind the end of the file)")
    return BetonLayout(labels=labels, sizes=sizes, raw=raw, pointers=pointers, lengths=lengths)


def _check_header(path: Path, types: Any, broken: str) -> None:
    """Raises ValueError unless the counts of the header fit into the file: FFCV would allocate what they say."""
    size, start = path.stat().st_size, types.HeaderType.itemsize
    with path.open("rb") as file:
        data = file.read(start)
    if len(data) < start:
        raise ValueError(f"{broken} (it has {size:,} bytes)")
    header = np.frombuffer(data, types.HeaderType)[0]
    fields, samples = int(header["num_fields"]), int(header["num_samples"])
    if start + fields * types.FieldDescType.itemsize + samples > size or int(header["alloc_table_ptr"]) > size:
        raise ValueError(
            f"{broken} (its header says {samples:,} samples, {fields:,} fields; it has {size:,} bytes)"
        )


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
