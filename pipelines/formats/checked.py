"""Reading what was stored: JSON and arrays, held to what they must be before anything looks at them.

Whatever is wrong with a file (cut off, one flipped bit, another kind of file) ends in one ValueError that names it.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipelines.files import open_file, read_text

MAX_JSON = 1 << 28  # bytes


class Record(BaseModel):
    """The fields of a stored JSON object: types are not converted, unknown fields are left to later versions."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, kind: type[AnyRecord], fix: str) -> AnyRecord:
    """A JSON file as a `kind`. Raises ValueError that names the file, what is wrong with it, and the `fix`."""
    return parse_record(read_text(path, MAX_JSON), kind, path, fix)


_OBJECT = TypeAdapter(dict[str, Any])


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """A JSON file that holds an object of any fields. Raises as read_record does."""
    try:
        return _OBJECT.validate_json(read_text(path, MAX_JSON))
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}; {fix}") from None


def parse_record(text: str | bytes, kind: type[AnyRecord], where: object, fix: str) -> AnyRecord:
    """The same for JSON that was read already."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first(error)}; {fix}") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    reason = " ".join(f"{key}: {first['msg']}".split()).removeprefix(": ")[:200]
    return f"damaged or of another kind ({reason})"


def read_array(
    path: Path, dtype: type[np.generic], shape: tuple[int | None, ...], fix: str, *, mode: Literal["r", "c"] = "c"
) -> NDArray[Any]:
    """The array of a .npy file: `mode` r maps it, c reads it.

    Raises ValueError that names the file unless it holds an array of `dtype` (little-endian) and `shape` (None: any
    length), and nothing else.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    try:
        with open_file(path) as file:
            size = path.stat().st_size
            major, _ = np.lib.format.read_magic(file)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
            found: tuple[int, ...]
            found, fortran, stored = read(file, max_header_size=1 << 16)
            start = file.tell()
            fits = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
            if not fits or stored != wanted or fortran or min(found, default=0) < 0:
                expected = ", ".join("any" if length is None else str(length) for length in shape)
                raise ValueError(f"got {stored} {list(found)}, expected {wanted} [{expected}]")
            count: int = prod(found)
            if size != start + count * wanted.itemsize:
                raise ValueError(f"got {size:,} bytes, expected {start + count * wanted.itemsize:,}")
            if mode == "r" and count:
                return np.memmap(path, wanted, "r", start, found)
            return np.frombuffer(file.read(), wanted).reshape(found).astype(dtype)  # writable, of this machine
    except Exception as error:  # NumPy reads a header as Python source, and fails in as many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: damaged or cut off ({reason}); {fix}") from None
