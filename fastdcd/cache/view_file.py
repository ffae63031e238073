"""The files of one view of a teacher cache: laid out, written row by row, summed, then read; see store.py."""

from __future__ import annotations

import mmap
import os
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdcd.cache.manifest import Manifest
from fastdcd.cache.npy_file import PAGE, is_laid_out, lay_out, npy_header
from fastdcd.cache.row_writer import RowWriter
from fastdcd.cache.verify import block_sums, damaged_blocks
from pipelines.files import explain_full_disk, fits_in_memory, replace_file
from pipelines.prefetch import copy_stream

_LOAD_ROWS = 1 << 14  # rows that `load` holds in pinned memory at a time


class CacheView:
    """One view of a cache, opened for reading and writing; `TeacherCache.view` makes it."""

    def __init__(self, folder: Path, number: int, manifest: Manifest, writer: RowWriter) -> None:
        self.folder, self.number, self.manifest = folder, number, manifest
        self._writer = writer
        self._reading: _Rows | None = None
        self._writing: tuple[np.memmap, np.memmap] | None = None  # rows and done marks, open for writing
        self._unmarked: list[NDArray[np.int64]] = []  # rows written but not yet marked as done

    # ---- reading

    def complete(self) -> bool:
        """Whether every row of a view is written and summed."""
        return self._path("crc32").is_file()

    def read(self, ids: Tensor, *, pin: bool = False) -> Tensor:
        """Stored rows uint8 [n, row_bytes] of samples `ids` int64 [n]; `manifest.codec.decode` makes features.

        With `pin` they are gathered straight into pinned memory, from which a copy to a GPU can run beside it.

        Raises ValueError if the view is not complete or its file is cut short.
        """
        out = torch.empty(len(ids), self.manifest.row_bytes, dtype=torch.uint8, pin_memory=pin)
        self._open().take(ids.numpy(), out.numpy())
        return out

    def _open(self) -> _Rows:
        if self._reading is None:
            if not self.complete():
                raise ValueError(
                    f"{self.folder}: view {self.number} is not complete; continue the fill: "
                    "tools/cache_teacher.py fill"
                )
            self._reading = _Rows(self._path(""), self._map("r"))
        return self._reading

    def load(self, device: torch.device) -> Tensor:
        """All rows uint8 [rows, row_bytes] of a complete view on `device`. Raises ValueError as `read` does."""
        rows, shape = self._open(), (self.manifest.rows, self.manifest.row_bytes)
        if device.type != "cuda":
            return torch.from_numpy(rows.span(0, len(rows.rows)))
        # on the stream of batches, which looks rows up: it may run in a thread beside the training
        with torch.cuda.device(device), torch.cuda.stream(copy_stream(device)):
            out = torch.empty(shape, dtype=torch.uint8, device=device)
            for start in range(0, len(out), _LOAD_ROWS):
                chunk = torch.from_numpy(rows.span(start, start + _LOAD_ROWS)).pin_memory()
                out[start : start + _LOAD_ROWS].copy_(chunk, non_blocking=True)
        return out

    def verify(self) -> list[range]:
        """Ranges of rows, one per block, that fail their checksum; empty if the complete view is intact."""
        return damaged_blocks(self._path(""), self._path("crc32"), self.manifest)

    # ---- writing

    def start(self) -> None:
        """Lay out a view's files if it is not complete and they are not there. One process does this for all.

        Raises OSError if the disk has no room for them.
        """
        if self.complete():
            return
        shape = (self.manifest.rows, self.manifest.row_bytes)
        rows, done = self._path(""), self._path("done")
        if not is_laid_out(rows, shape):
            done.unlink(missing_ok=True)  # what it says was done is gone
            lay_out(rows, shape)
        if not is_laid_out(done, shape[:1]):
            lay_out(done, shape[:1])
        self._unmark_unwritten()

    def _unmark_unwritten(self) -> None:
        """Take back marks of rows that nobody wrote: a damaged mark would pass off zeros as features."""
        rows, done = self._map("r"), np.load(self._path("done"), mmap_mode="r+", allow_pickle=False)
        marked = np.flatnonzero(done)
        for start in range(0, len(marked), _LOAD_ROWS):
            part = marked[start : start + _LOAD_ROWS]
            done[part[~rows[part].any(1)]] = 0
        done.flush()

    def done(self) -> NDArray[np.bool_]:
        """Which rows [rows] of a view are written."""
        if self.complete():
            return np.ones(self.manifest.rows, np.bool_)
        path, shape = self._path("done"), (self.manifest.rows,)
        if not is_laid_out(path, shape):
            return np.zeros(shape, np.bool_)
        marks: NDArray[np.bool_] = np.load(path, allow_pickle=False) == 1
        return marks

    def write(self, ids: Tensor, features: Tensor) -> None:
        """Store features float32 [n, d] of samples `ids` int64 [n] of a started view; see `TeacherCache.flush`.

        Rows from a GPU are copied while it keeps working, and a thread stores them: an error of it is raised by a later
        call, or by `TeacherCache.flush`.
        """
        rows = self.manifest.codec.encode(features.float())
        self._writer.write(rows, partial(self._store, ids))

    def _store(self, ids: Tensor, rows: Tensor) -> None:
        """Rows uint8 [n, row_bytes], on the host, into the view's map."""
        features, _ = self._open_for_writing()
        where = ids.cpu().numpy()
        if not (finite := self.manifest.codec.finite(rows)).all():
            first = int(ids[~finite.to(ids.device)][0])
            raise ValueError(
                f"{self.folder}: view {self.number}: features of {int((~finite).sum())} of {len(rows)} images (first: "
                f"sample {first}) are not finite, or beyond what {self.manifest.dtype} holds; they were not stored. "
                "Fill another cache.path with cache.dtype=bf16, or look at the teacher (teacher.precision, "
                "teacher.mean)"
            )
        features[where] = rows.numpy()
        self._unmarked.append(where)

    def _open_for_writing(self) -> tuple[np.memmap, np.memmap]:
        if self._writing is None:
            self._writing = self._map("r+"), np.load(self._path("done"), mmap_mode="r+", allow_pickle=False)
        return self._writing

    def mark_written(self) -> None:
        """Bring written rows to the disk, and only then mark them as done; `TeacherCache.flush` calls this."""
        written, self._unmarked = self._unmarked, []
        if written:
            assert self._writing is not None
            features, done = self._writing
            features.flush()
            for rows in written:
                done[rows] = 1
            done.flush()

    def finish(self) -> None:
        """Sum a view whose rows are all done: from here on it can be read. One process does this."""
        assert self.done().all(), f"view {self.number} has rows that were never written"
        sums = block_sums(self._path(""), self.manifest)
        assert (sums >= 0).all(), f"view {self.number} lost rows while it was filled"
        path = self._path("crc32")
        with explain_full_disk(path), replace_file(path) as file:
            np.save(file, sums.astype(np.uint32), allow_pickle=False)
        self.release()
        self._path("done").unlink()

    def release(self) -> None:
        """Let go of a view's files as this process has them open for writing."""
        self._reading = self._writing = None

    def reopen(self, rows: list[range]) -> None:
        """Take rows of a complete view back for refilling (after `verify` found them damaged)."""
        done = np.ones(self.manifest.rows, np.uint8)
        for block in rows:
            done[block.start : block.stop] = 0
        with replace_file(self._path("done")) as file:
            file.write(npy_header(done.shape) + done.tobytes())
        self._path("crc32").unlink()
        self.release()
        path = self._path("")
        if path.is_file():
            with path.open("r+b") as file:  # rows that were cut off get their room back; they are not done
                os.posix_fallocate(file.fileno(), 0, PAGE + self.manifest.rows * self.manifest.row_bytes)

    # ---- files

    def _path(self, kind: str) -> Path:
        name = f"view-{self.number:03d}"
        return self.folder / (f"{name}.{kind}.npy" if kind else f"{name}.npy")

    def _map(self, mode: Literal["r", "r+"]) -> np.memmap:
        path = self._path("")
        if not is_laid_out(path, (self.manifest.rows, self.manifest.row_bytes)):
            raise ValueError(f"{path}: missing, damaged or cut short; run tools/cache_teacher.py fill --repair")
        array: np.memmap = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array


class _Rows:
    """A complete view, open for reading in any order.

    Pages are read on demand. Left to itself the kernel reads a good deal around each. Where memory holds the view that
    soon brings all of it. From a larger view it is of no use for rows in random order: 50 times slower than asking
    for the rows of a batch, all at once, and taking them then.
    """

    def __init__(self, path: Path, rows: np.memmap) -> None:
        self.file = path.open("rb")
        self.rows, self.start, self.row_bytes = rows, rows.offset, rows.shape[1]
        self.scarce = not fits_in_memory(rows.nbytes)
        if self.scarce:
            rows._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]

    def take(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy the rows of `ids` to `out` [n, row_bytes]."""
        assert not len(ids) or (ids.min() >= 0 and ids.max() < len(self.rows))
        descriptor, size = self.file.fileno(), self.row_bytes
        # 45 to 86 % of the whole where nothing has to be read
        for offset in (self.start + ids * size).tolist() if self.scarce else ():
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        np.take(self.rows, ids, axis=0, out=out, mode="clip")  # the default mode copies once more

    def span(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows from `start` to `stop`, copied."""
        offset, size = self.start + start * self.row_bytes, (stop - start) * self.row_bytes
        os.posix_fadvise(self.file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
        return np.array(self.rows[start:stop])
