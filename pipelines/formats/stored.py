"""The bytes of sample i, as they are stored: in a folder of images, in shards, in a .beton.

The one place that knows: loaders, the profiler and the comparison of backends read samples here. Where a dataset has
checksums, the bytes of a sample are compared with its own when they are first read.
"""

from __future__ import annotations

import mmap
import resource
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.files import fits_in_memory, map_file, path_of, read_file, read_into, will_need
from pipelines.formats import beton, shards
from pipelines.images.decode import Encoded, decode
from pipelines.index import DatasetIndex
from pipelines.views import hash_key

CHANGED = "fails its checksum; copy or convert it again"
_DRAWN = 16  # samples that are looked at when a dataset is opened


class StoredSamples(ABC):
    """The stored bytes of every sample of a dataset."""

    @abstractmethod
    def read(self, sample: int) -> Encoded:
        """The bytes of a sample, uint8 [length]: an encoded image, or raw pixels (see `pixels`).

        Raises ValueError with a reason that does not name the sample, or OSError.
        """

    def read_all(self, samples: NDArray[np.int64]) -> list[Encoded]:
        """The bytes of `samples` [n]. Raises as `read` does if one cannot be read."""
        return [self.read(sample) for sample in samples.tolist()]

    @abstractmethod
    def file(self, sample: int) -> Path:
        """The file that a sample lies in."""

    def pixels(self, sample: int) -> Tensor:
        """A sample decoded as the reference does it: uint8 [3, H, W]. Raises as `read` does."""
        return decode(self.read(sample).tobytes())

    def close(self) -> None:  # noqa: B027  # files that are opened one by one need nothing
        """Let go of the files."""


def _references_to_an_unused_buffer() -> int:
    """As FileSamples counts them; versions of Python count differently."""
    for buffer in [np.empty(0)]:
        return sys.getrefcount(buffer)
    raise AssertionError


_UNUSED = _references_to_an_unused_buffer()  # every file that lies in one adds another


class FileSamples(StoredSamples):
    """One file a sample, below one folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names
        self._buffers: list[NDArray[np.uint8]] = []
        self._usual = 0  # bytes of the most samples that were read at once so far

    def read(self, sample: int) -> Encoded:
        return np.frombuffer(read_file(path_of(self._root, self._names[sample])), np.uint8)

    def read_all(self, samples: NDArray[np.int64]) -> list[Encoded]:
        buffer, at, files = self._free_buffer(), 0, []
        memory = memoryview(buffer)  # type: ignore[arg-type]  # to mypy, an array is no Buffer
        for sample in samples.tolist():
            size = read_into(path_of(self._root, self._names[sample]), memory[at:])
            files.append(self.read(sample) if size is None else buffer[at : at + size])
            at += len(files[-1])
        self._usual = max(self._usual, at)
        return files

    def _free_buffer(self) -> NDArray[np.uint8]:
        """Memory for several files, one that no file lies in any more: fresh pages cost as much as reading does."""
        self._buffers = [each for each in self._buffers if len(each) >= self._usual]
        for buffer in self._buffers:
            if sys.getrefcount(buffer) == _UNUSED:
                return buffer
        buffer = np.empty(self._usual + self._usual // 8, np.uint8)
        self._buffers.append(buffer)
        return buffer

    def file(self, sample: int) -> Path:
        return self._root / self._names[sample]


class PackedSamples(StoredSamples):
    """Samples that lie in a few large, memory-mapped files: nothing is copied.

    Mapped pages belong to the page cache, and the system takes them back when it needs them. Views handed out keep
    their file open.

    Attributes:
        maps: the files, uint8 [bytes] each.
        bytes: of all files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        files: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        checksums: NDArray[np.uint32] | None,
    ) -> None:
        """Sample i is `lengths[i]` bytes from `starts[i]` on of `paths[files[i]]`.

        Raises ValueError if the checksums are of other files.
        """
        self._paths, self._numbers, self._starts, self._lengths = paths, files, starts, lengths
        _allow_open_files(len(paths))
        self._files = [map_file(path) for path in paths]
        self.maps = [np.frombuffer(file, np.uint8) for file in self._files]
        self.bytes = sum(map(len, self._files))
        self._stays, self._asked = fits_in_memory(self.bytes), np.zeros(len(starts), np.bool_)
        self._checksums = checksums
        self._checked = np.zeros(len(starts), np.bool_)
        self._refuse_other_files()

    def _refuse_other_files(self) -> None:
        """Look at some samples, drawn by hash: one that is damaged is its reader's matter, many are another dataset."""
        if self._checksums is None or not len(self._starts):
            return
        drawn = np.unique(hash_key(0, np.arange(_DRAWN), 0) % np.uint64(len(self._starts))).astype(np.int64)
        if self.damaged(drawn).mean() > 0.5:
            raise ValueError(
                f"{self._paths[0]}: not the file that its index was made of; copy or convert both again"
            )

    def damaged(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `samples` [n] fail their checksum; each is summed once, when first asked for."""
        found = np.zeros(len(samples), np.bool_)
        if self._checksums is None:
            return found
        for row in np.flatnonzero(~self._checked[samples]).tolist():
            sample = int(samples[row])
            found[row] = zlib.crc32(self._view(sample).data) != self._checksums[sample]
            self._checked[sample] = not found[row]
        return found

    def read(self, sample: int) -> Encoded:
        if self._checksums is not None and not self._checked[sample] and self.damaged(np.array([sample]))[0]:
            raise ValueError(CHANGED)
        return self._view(sample)

    def read_all(self, samples: NDArray[np.int64]) -> list[Encoded]:
        if self.damaged(samples).any():
            raise ValueError(CHANGED)
        maps, spans = self.maps, (self._numbers[samples], self._starts[samples], self._lengths[samples])
        spans_of = zip(*(each.tolist() for each in spans), strict=True)
        return [maps[number][start : start + length] for number, start, length in spans_of]

    def _view(self, sample: int) -> Encoded:
        start = self._starts[sample]
        return self.maps[self._numbers[sample]][start : start + self._lengths[sample]]

    def file(self, sample: int) -> Path:
        return self._paths[self._numbers[sample]]

    def read_sample_by_sample(self) -> None:
        """Tell the kernel not to read around what is asked for: for files larger than memory."""
        for file in self._files:
            file.madvise(mmap.MADV_RANDOM)

    def will_need(self, samples: NDArray[np.int64]) -> None:
        """Let the kernel read `samples` [n] in the background; does not wait for the storage.

        Where memory holds all files, what was read once stays in the page cache and is not asked for again.
        """
        if self._stays:
            samples, asked = samples[~self._asked[samples]], samples
            self._asked[asked] = True
        spans = (self._numbers[samples].tolist(), self._starts[samples].tolist(), self._lengths[samples].tolist())
        for number, start, length in zip(*spans, strict=True):
            will_need(self._files[number], start, length)

    def close(self) -> None:
        self.maps, self._files = [], []


class BetonSamples(PackedSamples):
    """The images of a .beton: JPEGs and raw pixels."""

    def __init__(self, path: Path, layout: beton.BetonLayout, checksums: NDArray[np.uint32] | None = None) -> None:
        super().__init__(
            [path], np.zeros(len(layout.pointers), np.int64), layout.pointers, layout.lengths, checksums
        )
        self._layout = layout

    def pixels(self, sample: int) -> Tensor:
        if not self._layout.raw[sample]:
            return super().pixels(sample)
        pixels = self.read(sample).reshape(*self._layout.sizes[sample], 3)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def open_shards(folder: Path) -> tuple[DatasetIndex, PackedSamples]:
    """A folder of shards. Raises ValueError for a missing or damaged index and a missing or cut tar."""
    index = DatasetIndex.load(folder / shards.INDEX)
    layout = shards.read_layout(folder, index)
    assert index.lengths is not None
    return index, PackedSamples(layout.paths, layout.shards, layout.starts, index.lengths, index.checksums)


def open_stored(path: Path, index: DatasetIndex) -> StoredSamples | None:
    """The stored samples of any dataset, without comparing them with checksums. None where nothing is stored apart
    from the pixels themselves (resident arrays, synthetic data), and for an empty dataset."""
    if not len(index):
        return None
    if (path.is_file() and beton.index_folder(path).is_dir()) or path.suffix == ".beton":
        return BetonSamples(path, beton.read_layout(path))
    if index.offsets is not None and index.lengths is not None:
        layout = shards.read_layout(path, index)
        return PackedSamples(layout.paths, layout.shards, layout.starts, index.lengths, None)
    if path.is_dir() and (path / index.names[0]).is_file():
        return FileSamples(path, index.names)
    return None


def _allow_open_files(count: int) -> None:
    """Every map keeps its file open: raise this process's own limit if a data set has many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == -1 else min(needed, hard), hard))
