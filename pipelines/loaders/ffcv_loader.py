"""The FFCV executor: threads that decode and render a memory-mapped .beton, driven by the plan.

The file is FFCV's, and so are its reader and the TurboJPEG it decodes with; the loop is our own
(ffcv_kernel.py). FFCV's Loader cannot run a plan: it draws its crops itself, hangs when its thread fails,
hands out views of a ring that it overwrites, returns a damaged JPEG as noise, and touches every GPU.

Sets larger than memory: pages of the mapped file belong to the system's page cache, which gives them up
when memory is short. The system then reads just the images of the batches in the making, asked for ahead: by itself
it reads what is around a page too, up to megabytes that nobody wants yet. With `order: paged` an epoch reads a bounded
window of the file at a time, the same window on every rank, so that slow storage is read nearly in sequence and once a
machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import threading
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import versions
from pipelines.base import Batch, DecodeError, Loader, LoaderOptions
from pipelines.files import map_file, memory_bytes, will_need
from pipelines.formats.beton import BetonLayout, import_ffcv, index_folder, read_layout
from pipelines.image_folder import same_classes
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan

AHEAD = 3  # batches in the making, besides the one in use; FFCV's batches_ahead
CHUNK = 16  # rows a thread takes at a time
# Values of a teacher cache's fingerprint: another wording would refuse every cache ever filled.
FINGERPRINT = {
    "backend": "ffcv",
    "decode": "turbojpeg, accurate DCT",
    "resize": "bilinear, antialiased, uint8",
}
SCARCE = 0.7  # of the memory: a larger file will not stay in it beside the processes


class FFCVLoader(Loader):
    """Executes plans over a .beton file."""

    backend = "ffcv"

    def __init__(self, path: Path, layout: BetonLayout, index: DatasetIndex, options: LoaderOptions) -> None:
        self.index, self._layout, self._options = index, layout, options
        mapped = map_file(path)
        self._file = np.frombuffer(mapped, np.uint8)
        self._scarce = mapped if len(mapped) > SCARCE * memory_bytes() else None  # to be read image by image
        if self._scarce:
            self._scarce.madvise(mmap.MADV_RANDOM)
        self._labels = torch.from_numpy(index.labels)
        self._decoders = _Decoders(layout)
        self._threads = ThreadPoolExecutor(max(options.workers, 1), "ffcv")
        stored = hashlib.blake2b(digest_size=16)
        for array in (layout.sizes, layout.raw, layout.lengths):
            stored.update(np.ascontiguousarray(array).tobytes())
        self._stored = stored.hexdigest()

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        if not path.is_file():
            raise ValueError(f"{path}: not a .beton file; make one: python tools/convert.py ffcv SRC OUT.beton")
        layout = read_layout(path)
        return cls(path, layout, _read_index(path, layout, options), options)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        # of the encoded lengths: another JPEG quality is another data set
        return {**FINGERPRINT, "stored": self._stored}

    @property
    def environment(self) -> Mapping[str, str]:
        return {"libjpeg-turbo": versions.loaded_turbojpeg()}  # the rest is our own kernel

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        from pipelines.loaders.ffcv_kernel import render_samples  # compiles, or loads what was compiled

        task = _Task(rank_plan, self._layout, self._file, self._decoders, render_samples)
        making: deque[_Making] = deque()
        try:
            for number in range(rank_plan.batches):
                if len(rank_plan.ids[rank_plan.rows(number)]):
                    making.append(self._start(task, number))
                if len(making) > AHEAD:
                    yield self._finish(making.popleft(), rank_plan)
            while making:
                yield self._finish(making.popleft(), rank_plan)
        finally:
            for batch in making:  # chunks that have begun finish into memory that they keep alive
                for chunk in batch.chunks:
                    chunk.cancel()

    def _start(self, task: _Task, number: int) -> _Making:
        """Allocate batch `number` and give its rows to the threads."""
        rows = task.rank_plan.rows(number)
        if self._scarce:
            ids = task.rank_plan.ids[rows]
            pointers, lengths = self._layout.pointers[ids], self._layout.lengths[ids]
            for pointer, length in zip(pointers.tolist(), lengths.tolist(), strict=True):
                will_need(self._scarce, pointer, length)
        count, sizes = rows.stop - rows.start, [each.size for each in task.rank_plan.crops]
        cuda = self._options.device.type == "cuda"
        # pinning belongs to the GPU that trains: torch would create a context on the first one
        with torch.cuda.device(self._options.device) if cuda else nullcontext():
            memory = torch.empty(
                sum(count * size * size * 3 for size in sizes), dtype=torch.uint8, pin_memory=cuda
            )
        starts = range(rows.start, rows.stop, CHUNK)
        chunks = [
            self._threads.submit(task, memory, rows, slice(start, min(start + CHUNK, rows.stop)))
            for start in starts
        ]
        return _Making(rows, memory, chunks)

    def _finish(self, making: _Making, rank_plan: RankPlan) -> Batch:
        failed = np.concatenate([chunk.result() for chunk in making.chunks])
        ids = rank_plan.ids[making.rows]
        for sample_id in ids[failed].tolist():
            name = self.index.names[sample_id]
            self._handle(DecodeError(sample_id, name, "its JPEG data is damaged"), self._options)
        parts = making.memory.split([len(ids) * r.size * r.size * 3 for r in rank_plan.crops])
        images = tuple(
            part.view(len(ids), each.size, each.size, 3).permute(0, 3, 1, 2)
            for part, each in zip(parts, rank_plan.crops, strict=True)
        )
        ids_on_cpu = torch.from_numpy(ids)
        return Batch(images=images, labels=self._labels[ids_on_cpu], ids=ids_on_cpu)

    def close(self) -> None:
        super().close()
        self._threads.shutdown(cancel_futures=True)
        self._decoders.close()
        self._file, self._scarce = np.empty(0, np.uint8), None  # lets go of the map, and with it of the file


@dataclass(frozen=True)
class _Making:
    """A batch that threads are working on."""

    rows: slice
    memory: Tensor  # uint8: all renderings one after the other
    chunks: list[Future[NDArray[np.bool_]]]


class _Task:
    """Renders rows of an epoch; called by the threads."""

    def __init__(
        self, rank_plan: RankPlan, layout: BetonLayout, file: NDArray[np.uint8], decoders: _Decoders, render: Any
    ) -> None:
        self.rank_plan, self._layout, self._file, self._decoders, self._render = (
            rank_plan,
            layout,
            file,
            decoders,
            render,
        )
        self._boxes = np.stack([r.boxes for r in rank_plan.crops])  # [R, M, 4]
        self._flips = np.stack([r.flips for r in rank_plan.crops])  # [R, M]
        self._sizes = np.array([r.size for r in rank_plan.crops], np.int64)

    def __call__(self, memory: Tensor, batch: slice, rows: slice) -> NDArray[np.bool_]:
        """Render `rows`, a part of `batch`, into their place in `memory`; return which rows failed."""
        layout, ids = self._layout, self.rank_plan.ids[rows]
        pixels = self._sizes**2 * 3
        starts = np.concatenate([[0], np.cumsum(pixels[:-1] * (batch.stop - batch.start))])
        failed = np.zeros(len(ids), np.bool_)
        decoder = self._decoders.of_this_thread(int(self._sizes.max()))
        self._render(
            self._decoders.decompress,
            decoder.handle,
            self._file,
            layout.pointers[ids],
            layout.lengths[ids],
            layout.sizes[ids],
            layout.raw[ids],
            np.ascontiguousarray(self._boxes[:, rows]),
            np.ascontiguousarray(self._flips[:, rows]),
            self._sizes,
            memory.numpy(),
            starts + pixels * (rows.start - batch.start),
            failed,
            decoder.pixels,
            decoder.tile,
        )
        return failed


@dataclass
class _Decoder:
    """What one thread decodes with: a TurboJPEG handle and scratch memory (see ffcv_kernel.render_samples)."""

    handle: int
    pixels: NDArray[np.uint8]
    tile: NDArray[np.uint8]


class _Decoders:
    """One _Decoder a thread."""

    def __init__(self, layout: BetonLayout) -> None:
        import_ffcv()
        from ffcv.libffcv import lib  # finds symbols of the TurboJPEG that it is linked against

        self._library = lib
        lib.tjInitDecompress.restype = ctypes.c_void_p
        lib.tjDestroy.argtypes = [ctypes.c_void_p]
        address = ctypes.cast(lib.tjDecompress2, ctypes.c_void_p).value
        assert address is not None
        self.decompress = address
        self._bytes = int(layout.sizes.astype(np.int64).prod(1).max()) * 3
        self._rows = int(layout.sizes[:, 0].max())
        self._local = threading.local()
        self._all: list[_Decoder] = []

    def of_this_thread(self, size: int) -> _Decoder:
        """This thread's decoder, with scratch for renderings of up to `size` pixels."""
        decoder: _Decoder | None = getattr(self._local, "decoder", None)
        if decoder is None:
            pixels, nothing = np.empty(self._bytes + 8, np.uint8), np.empty(0, np.uint8)
            decoder = _Decoder(self._library.tjInitDecompress(), pixels, nothing)
            self._local.decoder = decoder
            self._all.append(decoder)
        tile_bytes = (self._rows + 1) * size * 3 + 1
        if len(decoder.tile) < tile_bytes:
            decoder.tile = np.empty(tile_bytes, np.uint8)
        return decoder

    def close(self) -> None:
        while self._all:
            self._library.tjDestroy(self._all.pop().handle)


def _read_index(path: Path, layout: BetonLayout, options: LoaderOptions) -> DatasetIndex:
    """The index that the converter left, or one made from the file itself, whoever wrote it."""
    folder = index_folder(path)
    if folder.is_dir():
        index = DatasetIndex.load(folder)
        if not np.array_equal(index.offsets, layout.pointers) or not np.array_equal(index.sizes, layout.sizes):  # type: ignore[arg-type]
            raise ValueError(f"{folder}: belongs to another file than {path.name}; copy both, or delete it")
        if not same_classes(options.classes, index.classes):
            raise ValueError(f"{path}: its classes differ from the list given; convert again with --classes")
        return index
    classes = options.classes or tuple(str(label) for label in range(int(layout.labels.max()) + 1))
    if len(classes) <= int(layout.labels.max()) or int(layout.labels.min()) < 0:
        raise ValueError(
            f"{path}: labels from {layout.labels.min()} to {layout.labels.max()}, expected 0 to {len(classes) - 1}"
        )
    return DatasetIndex(
        classes=classes,
        labels=layout.labels,
        sizes=layout.sizes,
        names=[f"{path.name}#{sample}" for sample in range(len(layout.labels))],
    )
