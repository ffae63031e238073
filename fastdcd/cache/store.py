"""The teacher cache: pooled features of (sample, view), stored once, read beside the images.

On disk a cache is a folder:

    manifest.json              rows, feature dimensions, dtype, views, and the fingerprint of what they are of
    classifier.safetensors     the teacher's final linear layer: logits are recomputed from features
    view-000.npy               uint8 [rows, bytes a row], memory-mapped; `.view(dtype)` of a row is its features
    view-000.done.npy          uint8 [rows], 1 where a row is written; while the view is being filled
    view-000.crc32.npy         uint32 [blocks], one for 1024 rows; its presence says that the view is complete

Rows reach the disk before their done marks, so a fill killed at any moment continues where it stopped. A view
is readable once complete. Nothing is pickled.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdcd import models, weights
from fastdcd.cache.manifest import (
    BLOCK_ROWS,
    CODECS,
    ENVIRONMENT,
    FORMAT,
    PIXELS,
    CacheMismatch,
    Manifest,
    StoredManifest,
    different_environment,
)
from pipelines.files import Lock, explain_full_disk, fits_in_memory, human_bytes, replace_file, write_json
from pipelines.formats.checked import read_array, read_record
from pipelines.prefetch import copy_stream

_LOAD_ROWS = 1 << 14  # rows that `load` holds in pinned memory at a time
_MOST_TRAVELLING = 8  # batches of rows between a GPU and the disk
# The header of a view's .npy is padded to a page, so that rows of 4096 bytes are one page each, not parts of two.
_PAGE = 4096


class TeacherCache:
    """One cache folder, opened for reading and writing.

    Reading needs no lock. Writing takes one: `lock_for_filling` refuses a second writer.
    """

    def __init__(self, path: Path, manifest: Manifest, classifier_digest: str) -> None:
        self.path, self.manifest, self._classifier_digest = path, manifest, classifier_digest
        self._reading: dict[int, _Rows] = {}
        self._features: dict[int, NDArray[np.uint8]] = {}  # open for writing
        self._done: dict[int, NDArray[np.uint8]] = {}
        self._unmarked: list[tuple[int, NDArray[np.int64]]] = []  # rows written but not yet flushed
        # rows from a GPU, stored by a thread when they have arrived
        self._writer = ThreadPoolExecutor(1, "cache-write")
        self._travelling: deque[Future[None]] = deque()

    # ---- opening

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Open an existing cache. Raises ValueError if there is none, or one of another format."""
        manifest_path = path / "manifest.json"
        if not manifest_path.is_file():
            raise ValueError(
                f"{path}: no teacher cache here; fill one: python tools/cache_teacher.py fill --config ... "
                f"--set cache.path={path}"
            )
        fix = "fill the cache again in a new folder"
        found = read_record(manifest_path, StoredManifest, fix)
        if found.format != FORMAT or found.dtype not in CODECS:
            raise ValueError(f"{manifest_path}: {found.dtype} of format {found.format}, expected {FORMAT}; {fix}")
        return cls(path, Manifest(**found.model_dump(exclude={"format", "classifier"})), found.classifier)

    @classmethod
    def create(cls, path: Path, manifest: Manifest, classifier: nn.Linear) -> TeacherCache:
        """Start a cache, or open the one that is there. Raises CacheMismatch if that is of something else.

        Raises ValueError if the disk has less free space than the cache will take.
        """
        if (path / "manifest.json").is_file():
            cache = cls.open(path)
            cache.check(manifest)
            return cache
        path.mkdir(parents=True, exist_ok=True)
        need, free = manifest.views * manifest.view_bytes, free_bytes(path)
        if free < need:
            raise ValueError(
                f"{path}: the cache takes {human_bytes(need)} and {human_bytes(free)} are free; choose another "
                "cache.path, fewer views.count, or cache.dtype uint8"
            )
        cache = cls(path, manifest, weights.digest(_tensors(classifier)))
        cache.write_classifier(classifier)
        settled = {"format": FORMAT, "classifier": cache._classifier_digest}
        write_json(
            path / "manifest.json", {**settled, **vars(manifest), "fingerprint": dict(manifest.fingerprint)}
        )
        return cache

    def check(self, expected: Manifest, *, allow: tuple[str, ...] = (), allow_environment: bool = False) -> None:
        """Compare with what this run would fill. Raises CacheMismatch that names both values.

        A cache may have more views than are asked for. `allow` lists backend pairs "FROM->TO" that may
        differ in their backend and its settings. The environment is compared as far as both know it: caches
        filled before it was noted open as ever.
        """
        mine, theirs = self.manifest, expected
        for name in ("rows", "dim", "dtype"):
            self._compare(name, getattr(mine, name), getattr(theirs, name))
        if mine.views < theirs.views:
            self._compare("views", mine.views, theirs.views)
        if not allow_environment:
            for name, stored, wanted in different_environment(mine.fingerprint, theirs.fingerprint):
                raise CacheMismatch(
                    f"{self.path}: the cache was filled with {name} = {stored}, this run has {wanted}: pixels or features "
                    "may differ. Go back to that, fill another cache.path, or read it all the same with "
                    "cache.allow_environment=true: the live check then says how far the features agree"
                )
        pair = f"{mine.fingerprint.get('loader.backend')}->{theirs.fingerprint.get('loader.backend')}"
        for name in dict.fromkeys([*theirs.fingerprint, *mine.fingerprint]):
            if name.startswith(ENVIRONMENT) or (name.startswith("loader.") and pair in allow):
                continue
            if name == PIXELS and not (mine.fingerprint.get(name) and theirs.fingerprint.get(name)):
                continue  # filled, or converted, before stored pixels were summed
            self._compare(name, mine.fingerprint.get(name), theirs.fingerprint.get(name))

    def _compare(self, name: str, stored: object, wanted: object) -> None:
        if stored != wanted:
            hint = " (or allow the pair with cache.allow_backend)" if name.startswith("loader.") else ""
            raise CacheMismatch(
                f"{self.path}: the cache was filled with {name} = {stored}, this run has {wanted}; change the "
                f"config back or fill another cache.path{hint}"
            )

    def classifier(self) -> nn.Linear:
        """The teacher's final layer, frozen. Raises ValueError if its file is missing or not as it was written."""
        path = self.path / "classifier.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            tensors = {}
        if not tensors or self._classifier_digest != weights.digest(tensors):
            raise ValueError(f"{path}: missing or damaged; write it again: tools/cache_teacher.py fill --repair")
        classes, dim = tensors["weight"].shape
        layer = nn.Linear(dim, classes) if classes else models.no_outputs(dim)  # features alone
        layer.requires_grad_(False)
        layer.load_state_dict(tensors)
        return layer

    def write_classifier(self, classifier: nn.Linear) -> None:
        """Write the teacher's final layer, as `create` does."""
        weights.save(self.path / "classifier.safetensors", _tensors(classifier))

    # ---- reading

    def complete(self, view: int) -> bool:
        """Whether every row of a view is written and summed."""
        return self._path(view, "crc32").is_file()

    def read(self, view: int, ids: Tensor, *, pin: bool = False) -> Tensor:
        """Stored rows uint8 [n, row_bytes] of samples `ids` int64 [n]; `manifest.codec.decode` makes features.

        With `pin` they are gathered straight into pinned memory, from which a copy to a GPU can run beside it.

        Raises ValueError if the view is not complete or its file is cut short.
        """
        out = torch.empty(len(ids), self.manifest.row_bytes, dtype=torch.uint8, pin_memory=pin)
        self._open(view).take(ids.numpy(), out.numpy())
        return out

    def _open(self, view: int) -> _Rows:
        if view not in self._reading:
            if not self.complete(view):
                raise ValueError(
                    f"{self.path}: view {view} is not complete; continue the fill: tools/cache_teacher.py fill"
                )
            self._reading[view] = _Rows(self._path(view, ""), self._map(view, "r"))
        return self._reading[view]

    def load(self, view: int, device: torch.device) -> Tensor:
        """All rows uint8 [rows, row_bytes] of a complete view on `device`. Raises ValueError as `read` does."""
        rows, shape = self._open(view), (self.manifest.rows, self.manifest.row_bytes)
        if device.type != "cuda":
            return torch.from_numpy(rows.span(0, len(rows.rows)))
        # on the stream of batches, which looks rows up: it may run in a thread beside the training
        with torch.cuda.device(device), torch.cuda.stream(copy_stream(device)):
            out = torch.empty(shape, dtype=torch.uint8, device=device)
            for start in range(0, len(out), _LOAD_ROWS):
                chunk = torch.from_numpy(rows.span(start, start + _LOAD_ROWS)).pin_memory()
                out[start : start + _LOAD_ROWS].copy_(chunk, non_blocking=True)
        return out

    def verify(self, view: int) -> list[range]:
        """Ranges of rows, a block each, that are not as they were written: empty if all of a complete view is."""
        actual = self._sums(view)
        try:
            wrong = read_array(self._path(view, "crc32"), np.uint32, actual.shape, "") != actual
        except ValueError:
            wrong = np.ones(len(actual), np.bool_)
        return [
            range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.manifest.rows))
            for block in np.flatnonzero(wrong).tolist()
        ]

    def _sums(self, view: int) -> NDArray[np.int64]:
        """CRC-32 of each block of rows as the file is now: int64 [blocks]; -1 for a block that is not all there."""
        path, rows, row_bytes = self._path(view, ""), self.manifest.rows, self.manifest.row_bytes
        sums = np.full(-(-rows // BLOCK_ROWS), -1)
        if not path.is_file():
            return sums
        with path.open("rb") as file:
            if file.read(_PAGE) == _npy_header((rows, row_bytes)):
                for block in range(len(sums)):
                    size = min(BLOCK_ROWS, rows - block * BLOCK_ROWS) * row_bytes
                    data = file.read(size)
                    if len(data) == size:
                        sums[block] = zlib.crc32(data)
        return sums

    # ---- writing

    @classmethod
    def begin_filling(cls, path: Path, manifest: Manifest, classifier: nn.Linear) -> Lock:
        """Take the right to write to a cache and begin it, unless it was begun. Raises ValueError as `lock_for_filling`
        and `create` do; the lock is free again then."""
        lock = cls.lock_for_filling(path)
        try:
            cls.create(path, manifest, classifier)
        except BaseException:
            lock.close()
            raise
        return lock

    @staticmethod
    def lock_for_filling(path: Path) -> Lock:
        """Take the right to write to a cache, started or not, until the lock is closed.

        Raises ValueError if another process has it.
        """
        path.mkdir(parents=True, exist_ok=True)
        return Lock(path / "fill.lock", f"{path}: another process is filling this cache; wait for it")

    def start(self, view: int) -> None:
        """Lay out a view's files if it is not complete and they are not there. One process does this for all.

        Raises OSError if the disk has no room for them.
        """
        if self.complete(view):
            return
        shape = (self.manifest.rows, self.manifest.row_bytes)
        rows, done = self._path(view, ""), self._path(view, "done")
        if not _is_laid_out(rows, shape):
            done.unlink(missing_ok=True)  # what it says was done is gone
            _lay_out(rows, shape)
        if not _is_laid_out(done, shape[:1]):
            _lay_out(done, shape[:1])
        self._unmark_unwritten(view)

    def _unmark_unwritten(self, view: int) -> None:
        """Take back marks of rows that nobody wrote: a damaged mark would pass off zeros as features."""
        rows, done = self._map(view, "r"), np.load(self._path(view, "done"), mmap_mode="r+", allow_pickle=False)
        marked = np.flatnonzero(done)
        for start in range(0, len(marked), _LOAD_ROWS):
            part = marked[start : start + _LOAD_ROWS]
            done[part[~rows[part].any(1)]] = 0
        done.flush()

    def done(self, view: int) -> NDArray[np.bool_]:
        """Which rows [rows] of a view are written."""
        if self.complete(view):
            return np.ones(self.manifest.rows, np.bool_)
        path, shape = self._path(view, "done"), (self.manifest.rows,)
        if not _is_laid_out(path, shape):
            return np.zeros(shape, np.bool_)
        marks: NDArray[np.bool_] = np.load(path, allow_pickle=False) == 1
        return marks

    def write(self, view: int, ids: Tensor, features: Tensor) -> None:
        """Store features float32 [n, d] of samples `ids` int64 [n] of a started view; see `flush`.

        Rows from a GPU are copied while it keeps working, and a thread stores them: an error of it is raised by a later
        call, or by `flush`.
        """
        rows = self.manifest.codec.encode(features.float())
        if not rows.is_cuda:
            return self._store(view, ids, rows)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        copied = torch.cuda.current_stream(rows.device).record_event()
        self._travelling.append(self._writer.submit(self._store_arrived, view, ids, host, copied))
        if len(self._travelling) > _MOST_TRAVELLING:  # the disk is slower than the teacher
            self._travelling.popleft().result()
        return None

    def _store_arrived(self, view: int, ids: Tensor, rows: Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._store(view, ids, rows)

    def _store_travelling(self) -> None:
        while self._travelling:
            self._travelling.popleft().result()

    def _store(self, view: int, ids: Tensor, rows: Tensor) -> None:
        """Rows uint8 [n, row_bytes], on the host, into the view's map."""
        if view not in self._done:
            self._features[view] = self._map(view, "r+")
            self._done[view] = np.load(self._path(view, "done"), mmap_mode="r+", allow_pickle=False)
        where = ids.cpu().numpy()
        if not (finite := self.manifest.codec.finite(rows)).all():
            first = int(ids[~finite.to(ids.device)][0])
            raise ValueError(
                f"{self.path}: view {view}: features of {int((~finite).sum())} of {len(rows)} images (first: sample "
                f"{first}) are not finite, or beyond what {self.manifest.dtype} holds; they were not stored. Fill "
                "another cache.path with cache.dtype=bf16, or look at the teacher (teacher.precision, teacher.mean)"
            )
        self._features[view][where] = rows.numpy()
        self._unmarked.append((view, where))

    def flush(self) -> None:
        """Bring written rows to the disk, and only then mark them as done."""
        self._store_travelling()
        written, self._unmarked = self._unmarked, []
        views = {view for view, _ in written}
        for view in views:
            self._features[view].flush()  # type: ignore[attr-defined]  # a memmap
        for view, rows in written:
            self._done[view][rows] = 1
        for view in views:
            self._done[view].flush()  # type: ignore[attr-defined]

    def finish(self, view: int) -> None:
        """Sum a view whose rows are all done: from here on it can be read. One process does this."""
        assert self.done(view).all(), f"view {view} has rows that were never written"
        sums = self._sums(view)
        assert (sums >= 0).all(), f"view {view} lost rows while it was filled"
        path = self._path(view, "crc32")
        with explain_full_disk(path), replace_file(path) as file:
            np.save(file, sums.astype(np.uint32), allow_pickle=False)
        self.release(view)
        self._path(view, "done").unlink()

    def release(self, view: int) -> None:
        """Let go of a view's files as this process has them open for writing."""
        self._reading.pop(view, None)
        self._features.pop(view, None)
        self._done.pop(view, None)

    def reopen(self, view: int, rows: list[range]) -> None:
        """Take rows of a complete view back for refilling (after `verify` found them damaged)."""
        done = np.ones(self.manifest.rows, np.uint8)
        for block in rows:
            done[block.start : block.stop] = 0
        with replace_file(self._path(view, "done")) as file:
            file.write(_npy_header(done.shape) + done.tobytes())
        self._path(view, "crc32").unlink()
        self.release(view)
        path = self._path(view, "")
        if path.is_file():
            with path.open("r+b") as file:  # rows that were cut off get their room back; they are not done
                os.posix_fallocate(file.fileno(), 0, _PAGE + self.manifest.rows * self.manifest.row_bytes)

    # ---- files

    def _path(self, view: int, kind: str) -> Path:
        return self.path / (f"view-{view:03d}.{kind}.npy" if kind else f"view-{view:03d}.npy")

    def _map(self, view: int, mode: Literal["r", "r+"]) -> NDArray[np.uint8]:
        path = self._path(view, "")
        if not _is_laid_out(path, (self.manifest.rows, self.manifest.row_bytes)):
            raise ValueError(f"{path}: missing, damaged or cut short; run tools/cache_teacher.py fill --repair")
        array: NDArray[np.uint8] = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array


class _Rows:
    """A complete view, open for reading in any order.

    Pages are read on demand. Left to itself the kernel reads a good deal around each. Where memory holds the view that
    soon brings all of it. From a larger view it is of no use for rows in random order: 50 times slower than asking
    for the rows of a batch, all at once, and taking them then.
    """

    def __init__(self, path: Path, rows: NDArray[np.uint8]) -> None:
        self.file = path.open("rb")
        assert isinstance(rows, np.memmap)
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


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of a uint8 .npy file (NumPy's format 1.0), padded with spaces to a page."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    length = _PAGE - len(np.lib.format.magic(1, 0)) - 2
    return np.lib.format.magic(1, 0) + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def _lay_out(path: Path, shape: tuple[int, ...]) -> None:
    """A uint8 .npy file of zeros. Its room is taken now: a write to a mapped page cannot say that the disk is full."""
    with explain_full_disk(path), replace_file(path) as file:
        file.write(_npy_header(shape))
        file.flush()
        os.posix_fallocate(file.fileno(), 0, _PAGE + math.prod(shape))


def _is_laid_out(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is as `_lay_out` makes it, whatever its rows."""
    if not path.is_file() or path.stat().st_size < _PAGE + math.prod(shape):
        return False
    with path.open("rb") as file:
        return file.read(_PAGE) == _npy_header(shape)


def _tensors(classifier: nn.Linear) -> dict[str, Tensor]:
    bias = classifier.bias
    return {
        "weight": classifier.weight,
        "bias": classifier.weight.new_zeros(classifier.out_features) if bias is None else bias,
    }


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
