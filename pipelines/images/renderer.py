"""Threads that render batches: read, decode, crop, resize, mirror. What every CPU loader of stored images runs on.

JPEGs go through the compiled kernel (renderer_kernel.py), which holds no GIL: one process, no shared memory, no copies
between processes. What the kernel does not take (PNG, CMYK, damaged files, ...) its source decodes, more slowly, into
the same bytes as ever; so does everything where TurboJPEG is not installed. Of JPEGs only the box is decoded, if
jpeg_box.c was built; a file damaged below its box is then shown as if it were not, which the box's pixels are.

Threads of their own read the encoded images, so that no decoder waits for the storage. Memory holds AHEAD batches,
their encoded images, and one decoded image per thread.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.base import DecodeError
from pipelines.images.decode import render
from pipelines.plan import RankPlan

AHEAD = 3  # batches in the making, besides the one in use
CHUNK = 16  # rows a thread takes at a time
KEPT = 1 << 26  # bytes of scratch that a thread keeps: ImageNet has a few images of 180 MB

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredImages:
    """Some images as they are stored.

    Attributes:
        file: uint8 [bytes]: the images, or the file that they are in. Five bytes more than a raw image at its end.
        pointers, lengths: int64 [n], each image in `file`; length 0 if it could not be read.
        raw: bool [n], raw pixels [H, W, 3] rather than an encoded file.
    """

    file: NDArray[np.uint8]
    pointers: NDArray[np.int64]
    lengths: NDArray[np.int64]
    raw: NDArray[np.bool_]

    @classmethod
    def joined(cls, files: Sequence[memoryview]) -> Self:
        """Encoded images, copied one after the other."""
        together = np.frombuffer(b"".join(files), np.uint8)
        lengths = np.array([each.nbytes for each in files], np.int64)
        return cls(together, np.cumsum(lengths) - lengths, lengths, np.zeros(len(files), np.bool_))

    def bytes_of(self, row: int) -> bytes:
        """The encoded image of a row."""
        return self.file[self.pointers[row] : self.pointers[row] + self.lengths[row]].tobytes()


class Source(Protocol):
    """Where stored images come from. Called by several threads."""

    def read(self, ids: NDArray[np.int64]) -> StoredImages:
        """Samples `ids` [n] as stored; may wait for the storage."""
        ...

    def decode(self, sample_id: int, data: bytes) -> Tensor:
        """uint8 [3, H, W] of an image that the kernel does not take. Raises DecodeError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Rendered:
    """One batch: images as in Batch, ids int64 [n], and what is black in it."""

    images: tuple[Tensor, ...]
    ids: Tensor
    errors: list[DecodeError]


class Renderer:
    """Renders the plans of one dataset. Close it to end its threads and free its memory."""

    def __init__(self, source: Source, sizes: NDArray[np.int32], *, workers: int, device: torch.device) -> None:
        """Start no thread yet.

        Args:
            source: the stored images.
            sizes: int32 [N, 2], height and width of every stored image.
            workers: threads that decode, and as many that read.
            device: where training runs; memory is pinned for a GPU.
        """
        self._source, self._sizes, self._device = source, sizes, device
        self._readers = ThreadPoolExecutor(max(workers, 1), "read")
        self._threads = ThreadPoolExecutor(max(workers, 1), "decode")
        self._decoders = _Decoders()

    def run(self, rank_plan: RankPlan) -> Generator[Rendered, None, None]:
        """Yield the batches of `rank_plan` that have rows; closed early, it drops what is not begun."""
        self._decoders.prepare()
        task = _Task(rank_plan, self._source, self._sizes, self._decoders)
        making: deque[_Making] = deque()
        try:
            for number in range(rank_plan.batches):
                if len(rank_plan.ids[rank_plan.rows(number)]):
                    making.append(self._start(task, rank_plan, rank_plan.rows(number)))
                if len(making) > AHEAD:
                    yield making.popleft().result(rank_plan)
            while making:
                yield making.popleft().result(rank_plan)
        finally:
            for batch in making:  # chunks that have begun finish into memory that they keep alive
                for chunk, read in zip(batch.chunks, batch.reads, strict=True):
                    chunk.cancel()
                    read.cancel()

    def _start(self, task: _Task, rank_plan: RankPlan, rows: slice) -> _Making:
        """Allocate a batch and give its rows to the threads."""
        count, sizes = rows.stop - rows.start, [each.size for each in rank_plan.crops]
        cuda = self._device.type == "cuda"
        # pinning belongs to the GPU that trains: torch would create a context on the first one
        with torch.cuda.device(self._device) if cuda else nullcontext():
            memory = torch.empty(
                sum(count * size * size * 3 for size in sizes), dtype=torch.uint8, pin_memory=cuda
            )
        chunks = [slice(start, min(start + CHUNK, rows.stop)) for start in range(rows.start, rows.stop, CHUNK)]
        reads = [self._readers.submit(self._source.read, rank_plan.ids[chunk]) for chunk in chunks]
        made = [
            self._threads.submit(task, memory, rows, chunk, read)
            for chunk, read in zip(chunks, reads, strict=True)
        ]
        return _Making(rows, memory, reads, made)

    def close(self) -> None:
        """May be called twice."""
        self._readers.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        self._decoders.close()


@dataclass(frozen=True)
class _Making:
    """A batch that threads are working on."""

    rows: slice
    memory: Tensor  # uint8: all renderings one after the other
    reads: list[Future[StoredImages]]
    chunks: list[Future[list[DecodeError]]]

    def result(self, rank_plan: RankPlan) -> Rendered:
        errors = [error for chunk in self.chunks for error in chunk.result()]
        ids = torch.from_numpy(rank_plan.ids[self.rows])
        parts = self.memory.split([len(ids) * each.size**2 * 3 for each in rank_plan.crops])
        images = tuple(
            part.view(len(ids), each.size, each.size, 3).permute(0, 3, 1, 2)
            for part, each in zip(parts, rank_plan.crops, strict=True)
        )
        return Rendered(images, ids, errors)


class _Task:
    """Renders rows of an epoch; called by the threads."""

    def __init__(self, rank_plan: RankPlan, source: Source, sizes: NDArray[np.int32], decoders: _Decoders) -> None:
        self._rank_plan, self._source, self._sizes, self._decoders = rank_plan, source, sizes, decoders
        self._boxes = np.stack([each.boxes for each in rank_plan.crops])  # [R, M, 4]
        self._flips = np.stack([each.flips for each in rank_plan.crops])  # [R, M]
        self._outputs = np.array([each.size for each in rank_plan.crops], np.int64)

    def __call__(self, memory: Tensor, batch: slice, rows: slice, read: Future[StoredImages]) -> list[DecodeError]:
        """Render `rows`, a part of `batch`, into their place in `memory`; return what could not be decoded."""
        stored, ids, out = read.result(), self._rank_plan.ids[rows], memory.numpy()
        pixels = self._outputs**2 * 3
        places = np.concatenate([[0], np.cumsum(pixels[:-1] * (batch.stop - batch.start))])
        places += pixels * (rows.start - batch.start)
        left = self._decoders.render(
            stored, self._sizes[ids], self._boxes[:, rows], self._flips[:, rows], self._outputs, out, places
        )
        errors = []
        for row in left.tolist():
            try:
                image = self._source.decode(int(ids[row]), stored.bytes_of(row))
            except DecodeError as error:
                errors.append(error)
                image = torch.zeros(3, *self._sizes[ids[row]].tolist(), dtype=torch.uint8)
            for number, size in enumerate(self._outputs.tolist()):
                at = rows.start + row
                made = render(image, self._boxes[number, at], bool(self._flips[number, at]), size)
                target = out[places[number] + row * pixels[number] :][: pixels[number]]
                target.reshape(size, size, 3)[:] = made.permute(1, 2, 0).numpy()
        return errors


@dataclass
class _Decoder:
    """What one thread decodes with: a TurboJPEG handle and scratch memory (see renderer_kernel.render_samples)."""

    handle: int
    pixels: NDArray[np.uint8]
    tile: NDArray[np.uint8]


class _Decoders:
    """The kernel, and one _Decoder per thread."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[_Decoder] = []
        self._library: ctypes.CDLL | None = None
        self._kernel: Any = None

    def prepare(self) -> None:
        """Load the library and the kernel, once: where it has never run, this compiles for some seconds."""
        self._library = turbojpeg()
        if self._library is not None and self._kernel is None:
            from pipelines.images.renderer_kernel import render_samples

            self._kernel = render_samples
            self._decode_box = box_decoder()
            self._decompress = ctypes.cast(self._library.tjDecompress2, ctypes.c_void_p).value

    def render(
        self,
        stored: StoredImages,
        sizes: NDArray[np.int32],
        boxes: NDArray[np.int32],
        flips: NDArray[np.bool_],
        outputs: NDArray[np.int64],
        out: NDArray[np.uint8],
        places: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Render n images (see render_samples) and return the rows that are left to do."""
        if self._kernel is None:
            return np.arange(len(sizes))
        decoded = int((sizes.astype(np.int64).prod(1) * ~stored.raw).max()) * 3 + 8
        decoder = self._of_this_thread(decoded, (int(sizes[:, 0].max()) + 1) * int(outputs.max()) * 3 + 1)
        failed = np.zeros(len(sizes), np.bool_)
        self._kernel(
            self._decode_box,
            self._decompress,
            decoder.handle,
            stored.file,
            stored.pointers,
            stored.lengths,
            np.ascontiguousarray(sizes),
            stored.raw,
            np.ascontiguousarray(boxes),
            np.ascontiguousarray(flips),
            outputs,
            out,
            places,
            failed,
            decoder.pixels,
            decoder.tile,
        )
        if len(decoder.pixels) > KEPT:
            decoder.pixels = np.empty(0, np.uint8)
        return np.flatnonzero(failed)

    def _of_this_thread(self, pixels: int, tile: int) -> _Decoder:
        """This thread's decoder, with scratch of so many bytes."""
        decoder: _Decoder | None = getattr(self._local, "decoder", None)
        if decoder is None:
            nothing = np.empty(0, np.uint8)
            assert self._library is not None
            decoder = _Decoder(self._library.tjInitDecompress(), nothing, nothing)
            self._local.decoder = decoder
            self._all.append(decoder)
        if len(decoder.pixels) < pixels:
            decoder.pixels = np.empty(pixels, np.uint8)
        if len(decoder.tile) < tile:
            decoder.tile = np.empty(tile, np.uint8)
        return decoder

    def close(self) -> None:
        while self._all:
            assert self._library is not None
            self._library.tjDestroy(self._all.pop().handle)


@cache
def turbojpeg() -> ctypes.CDLL | None:
    """The system's TurboJPEG library; None, with a warning, if there is none."""
    for name in ("libturbojpeg.so.0", f"{sys.prefix}/lib/libturbojpeg.so.0"):  # the system's, Conda's
        with suppress(OSError):
            library = ctypes.CDLL(name)
            library.tjInitDecompress.restype = ctypes.c_void_p
            library.tjDestroy.argtypes = [ctypes.c_void_p]
            return library
    _log.warning(
        "TurboJPEG is not installed: JPEGs are decoded without it, more slowly; "
        "apt-get install libturbojpeg0 (Debian, Ubuntu) or dnf install turbojpeg (Fedora)"
    )
    return None


@cache
def box_decoder() -> int:
    """Address of decode_box in jpeg_box.c; 0, with a warning, where it could not be built."""
    with suppress(ImportError):
        address: int = import_module("pipelines.images.jpeg_box").decode_box
        return address
    _log.warning(
        "JPEGs are decoded whole, not only the box that is shown, which is slower: fastdcd was installed without "
        "libjpeg-turbo's headers; apt-get install g++ libjpeg-dev (Debian, Ubuntu) and install fastdcd again"
    )
    return 0
