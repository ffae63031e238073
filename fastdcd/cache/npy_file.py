"""A uint8 .npy file whose rows begin at a page, laid out whole before its rows are written."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from pipelines.files import explain_full_disk, replace_file

# The header of a view's .npy is padded to a page, so that rows of 4096 bytes are one page each, not parts of two.
PAGE = 4096


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of a uint8 .npy file (NumPy's format 1.0), padded with spaces to a page."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    length = PAGE - len(np.lib.format.magic(1, 0)) - 2
    return np.lib.format.magic(1, 0) + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def lay_out(path: Path, shape: tuple[int, ...]) -> None:
    """A uint8 .npy file of zeros. Its room is taken now: a write to a mapped page cannot say that the disk is full."""
    with explain_full_disk(path), replace_file(path) as file:
        file.write(npy_header(shape))
        file.flush()
        os.posix_fallocate(file.fileno(), 0, PAGE + math.prod(shape))


def is_laid_out(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is as `lay_out` makes it, whatever its rows."""
    if not path.is_file() or path.stat().st_size < PAGE + math.prod(shape):
        return False
    with path.open("rb") as file:
        return file.read(PAGE) == npy_header(shape)
