"""Hugging Face's parquet files: rows of an encoded image and its class; needs pyarrow.

The columns and the names of the classes come from the metadata that `datasets` writes into the schema; without it, an
image is a struct with a field `bytes`, or a binary column, and the class an integer or text column.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pipelines.conversion.sources.samples import Sources
from pipelines.image_folder import ClassList, check_name

_LABELS = ("label", "labels", "fine_label", "cls", "class")  # columns, the likeliest first


def import_parquet() -> ModuleType:
    """pyarrow.parquet. Raises ValueError with what to install."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading parquet needs pyarrow ({error}): pip install 'fastdcd[parquet]'") from None
    module: ModuleType = pyarrow.parquet
    return module


class _Columns(NamedTuple):
    """Which columns hold what.

    Attributes:
        image: the column of images. bytes: the path of their encoded bytes in it; path: of their file names, or "".
        label: the column of classes.
        names: of the classes, in label order; None: unknown.
    """

    image: str
    bytes: str
    path: str
    label: str
    names: tuple[str, ...] | None


def open_parquet(path: Path, files: Sequence[Path], classes: Sequence[str] | None) -> Sources:
    """The rows of parquet files, in the order of the files' names and of their rows.

    Raises ValueError for a file that is damaged, of another schema, or without images, classes or labels.
    """
    parquet = import_parquet()
    first: _Columns | None = None
    names: list[str] = []
    labels: list[int | str] = []
    for file in files:
        with _open(parquet, file) as reader:
            columns = _columns(file, reader)
            if first is not None and columns != first:
                raise ValueError(
                    f"{file}: other columns or classes than in {files[0].name}; choose one kind by a glob"
                )
            first = columns
            wanted = [columns.label] + ([columns.path] if columns.path else [])
            with _named(f"{file}: damaged or cut off", "; download it again"):
                table = reader.read(columns=wanted, use_threads=False)
                found = table.column(columns.label).to_pylist()
                paths = table.column(columns.image).combine_chunks() if columns.path else None
                given = paths.field("path").to_pylist() if paths is not None else [None] * len(found)
        labels += found
        names += [text or f"{file.stem}/{row:07d}" for row, text in enumerate(given)]
    if first is None or not labels:
        raise ValueError(f"{path}: no rows in its parquet files")
    if any(label is None or label == -1 for label in labels):
        raise ValueError(f"{path}: rows without a label (a test set has none); choose another set")
    for name in names:
        check_name(path, name)
    class_names, numbers = _classes(path, labels, first.names, classes)
    return Sources(
        classes=class_names,
        names=names,
        labels=numbers,
        read=_RowReader(files, first),
        rows=np.arange(len(names)),
        notes=(f"Hugging Face parquet: column {first.image!r}, classes from {first.label!r}",),
    )


def _open(parquet: ModuleType, file: Path) -> Any:
    with _named(f"{file}: not a whole parquet file", "; download it again"):
        return parquet.ParquetFile(file, memory_map=True)


@contextmanager
def _named(what: str, advice: str) -> Iterator[None]:
    """pyarrow raises almost anything for a damaged file: ValueError with a line that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise  # the storage
        raise ValueError(f"{what} ({_first_line(error)}){advice}") from None
    except Exception as error:
        raise ValueError(f"{what} ({_first_line(error)}){advice}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _columns(file: Path, reader: Any) -> _Columns:
    schema = reader.schema_arrow
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        described = {}
    described = described if isinstance(described, dict) else {}
    kinds = {name: about.get("_type") for name, about in described.items() if isinstance(about, dict)}
    plain = {field.name: str(field.type) for field in schema}
    images = [name for name in plain if kinds.get(name) == "Image"] or [
        name for name, kind in plain.items() if "binary" in kind
    ]
    labels = [name for name in plain if kinds.get(name) == "ClassLabel"] or [
        name for name in _LABELS if plain.get(name, "").startswith(("int", "uint", "string", "large_string"))
    ]
    labels.sort(key=lambda name: _LABELS.index(name) if name in _LABELS else len(_LABELS))
    if not images or not labels:
        lacks = "no column of images (bytes)" if not images else f"no column of classes ({', '.join(_LABELS)})"
        raise ValueError(f"{file}: {lacks} in it; it has {', '.join(f'{name} ({plain[name]})' for name in plain)}")
    if len(images) > 1:
        raise ValueError(f"{file}: several columns of images: {', '.join(images)}; keep one")
    image, label = images[0], labels[0]
    inner = plain[image]
    if inner.startswith("struct") and "bytes: " not in inner:
        raise ValueError(f"{file}: column {image!r} is {inner}, expected a struct with bytes")
    of_struct = inner.startswith("struct")
    names = described.get(label, {}).get("names") if kinds.get(label) == "ClassLabel" else None
    return _Columns(
        image=image,
        bytes=f"{image}.bytes" if of_struct else image,
        path=f"{image}.path" if of_struct and "path: " in inner else "",
        label=label,
        names=tuple(map(str, names)) if isinstance(names, list) and names else None,
    )


def _classes(
    path: Path, labels: Sequence[int | str], own: tuple[str, ...] | None, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels. A list of classes gives the order where it has the file's own names, else the names."""
    texts = not all(isinstance(label, int) for label in labels)
    if texts:
        own = tuple(sorted({str(label) for label in labels}))
        place = {name: label for label, name in enumerate(own)}
        numbers = np.array([place[str(label)] for label in labels], np.int64)
    else:
        numbers = np.array(labels, np.int64)
    given = tuple(classes.named(own or ())) if isinstance(classes, ClassList) else tuple(classes or ())
    if own and given and set(own) <= set(given):
        return given, np.array([given.index(name) for name in own], np.int64)[numbers]
    if texts and given:
        unknown = sorted(set(own or ()) - set(given))
        raise ValueError(f"{path}: class {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes")
    names = given or own or tuple(map(str, range(min(int(numbers.max()) + 1, 1_000_000))))
    if own and given and len(own) != len(given):
        raise ValueError(f"{path}: it has {len(own)} classes, and the list of classes {len(given)}")
    if numbers.min() < 0 or numbers.max() >= len(names):
        raise ValueError(
            f"{path}: labels go from {numbers.min()} to {numbers.max()}, expected 0 to {len(names) - 1}"
        )
    return names, numbers


_LARGEST = 1 << 31  # bytes of a row group, which is in memory while its images are read


class _RowReader:
    """The encoded image of a row. Keeps the images of one row group: rows are asked for mostly in order."""

    def __init__(self, files: Sequence[Path], columns: _Columns) -> None:
        self._files, self._columns = list(files), columns
        self._starts: list[tuple[int, int, int]] = []  # first row, file, row group
        total, parquet = 0, import_parquet()
        for number, file in enumerate(files):
            with _open(parquet, file) as reader:
                for group in range(reader.metadata.num_row_groups):
                    about = reader.metadata.row_group(group)
                    if about.total_byte_size > _LARGEST:
                        raise ValueError(
                            f"{file}: a row group of {about.total_byte_size:,} bytes, expected at most {_LARGEST:,}; "
                            "write it with a smaller row_group_size"
                        )
                    self._starts.append((total, number, group))
                    total += about.num_rows
        self._kept: tuple[int, int, Any] | None = None  # process, row group, its images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __call__(self, row: int) -> bytes:
        at = bisect.bisect_right(self._starts, row, key=lambda start: start[0]) - 1
        first, number, group = self._starts[at]
        if self._kept is None or self._kept[:2] != (os.getpid(), at):
            self._kept = None  # its memory, before the next
            self._kept = (os.getpid(), at, self._read(number, group))
        data = self._kept[2][row - first].as_py()
        if data is None:
            raise ValueError("no bytes in its row: it names a file elsewhere")

        return bytes(data)

    def _read(self, number: int, group: int) -> Any:
        with _named("its row group is damaged", ""), _open(import_parquet(), self._files[number]) as reader:
            column = reader.read_row_group(group, columns=[self._columns.bytes], use_threads=False).column(0)
            rows = column.combine_chunks()
            return rows.field("bytes") if self._columns.bytes != self._columns.image else rows
