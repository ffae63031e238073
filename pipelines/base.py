"""The contract between a plan and the loaders that execute it.

A loader gets Work (sample ids, boxes, flips, output sizes, in order) and yields Batches. It has no
randomness, no shuffle and no sharding of its own. tests/test_loader_contract.py holds every backend to:
right pixels for (id, box, flip, size), right labels and ids, exactly the batches asked for, a last
partial (or empty) batch, early break without a leak, epoch after epoch, errors that name the sample.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from pipelines.augment import Mixed, ViewAugment
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan

_log = logging.getLogger(__name__)


class DecodeError(ValueError):
    """A stored image cannot be decoded. Carries the sample's id; the message names its file."""

    def __init__(self, sample_id: int, name: str, reason: str) -> None:
        super().__init__(f"sample {sample_id} ({name}): cannot be decoded: {reason}; repair or remove it")
        self.sample_id, self.name, self.reason = sample_id, name, reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[int, str, str]]:
        return DecodeError, (self.sample_id, self.name, self.reason)  # crosses worker processes whole


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of this rank.

    Attributes:
        images: one uint8 tensor [n, 3, size, size] RGB a rendering (any strides; decoders like channels
            last). Normalising belongs to the model that looks at them, on its device.
        labels: int64 [n].
        ids: int64 [n], on the CPU: they look up rows in host memory.
        augments: what the plan has in store for each of `images`; nothing once `augmented` has done it.
        mixed: the other labels of mixed images.
    """

    images: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor
    augments: tuple[ViewAugment | None, ...] = ()
    mixed: Mixed | None = None

    def augmented(self) -> Batch:
        """The batch as networks see it: planned augmentation done, on the images' own device."""
        if not any(self.augments):
            return self
        ids = self.ids.numpy()
        pairs = list(zip(self.images, self.augments, strict=True))
        images = tuple(each if augment is None else augment.pixels(each, ids) for each, augment in pairs)
        first, augment = pairs[0]
        mixed = augment.labels(self.labels, ids, first.shape[-1]) if augment else None
        return replace(self, images=images, augments=(), mixed=mixed)

    def at(self, size: int) -> Tensor:
        """The images of `size` x `size` pixels, uint8 [n, 3, size, size]."""
        return next(images for images in self.images if images.shape[-1] == size)


CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How a backend may use the machine. No option changes a pixel unless its fingerprint says so.

    Attributes:
        workers: decoding processes or threads.
        device: where the training runs; a GPU backend decodes there, others pin their host memory for it.
        classes: class names in label order, for folders (None: sorted folder names).
        index_cache: where the index of an image folder is kept between runs; None: nowhere.
        on_decode_error: `raise` ends the epoch with a DecodeError. `skip_and_report` continues: the sample is
            shown black under its own label and id, a warning names it once, and Loader.undecodable keeps it.
            The batch keeps its rows, so that ranks stay in step and cached teacher rows stay aligned.
        replays: the backend whose batches `replay` repeats; set from its name, as in replay:torch.
        repeatable: a sample's pixels must not depend on the batch around it, bit for bit: a teacher cache stores
            features of them. A backend that cannot promise it raises ValueError when opened.
        own: options of single backends by name, as their classes declare them (Loader.Options); each takes its own.
    """

    workers: int = 2
    device: torch.device = CPU
    classes: tuple[str, ...] | None = None
    index_cache: Path | None = None
    on_decode_error: Literal["raise", "skip_and_report"] = "raise"
    replays: str = ""
    repeatable: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A backend without options of its own."""


class Loader(ABC):
    """Executes plans over one dataset. Close it, or use it as a context manager.

    Class attributes:
        backend: its name.
        Options: frozen dataclass of options that only this backend has; every field has a default. Its __post_init__
            may raise ValueError, "OPTION: got ..., expected ...". In fastdcd they are keys of the section `data`.
    """

    backend: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    reads_files: ClassVar[bool] = True  # else its path names no file
    index: DatasetIndex

    @classmethod
    @abstractmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        """Open the dataset at `path`. Raises ValueError if this backend cannot read it."""

    @classmethod
    def own_options(cls, options: LoaderOptions) -> Any:
        """Its own options among all that are given: an instance of Options. Raises ValueError for a bad one."""
        names = [each.name for each in fields(cls.Options)]
        return cls.Options(**{name: options.own[name] for name in names if name in options.own})

    @property
    @abstractmethod
    def fingerprint(self) -> Mapping[str, str]:
        """The backend and each of its settings that can change a pixel, for a teacher cache's fingerprint."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What decides pixels beside the settings: versions of the decoding libraries, the device. A cache of another
        environment is read only if that is allowed."""
        return {}

    @abstractmethod
    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        """Yield the batches of `work` that have rows, releasing everything when closed early."""

    def epoch(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        """Yield `work.batches` batches. A loader runs one epoch at a time: starting one ends the last."""
        previous = self._running
        if previous is not None:
            previous.close()
        self._running = epoch = self._guard(rank_plan)
        return epoch

    _running: Generator[Batch, None, None] | None = None

    def _guard(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        batches = self._execute(rank_plan)
        augments = tuple(each.augment for each in rank_plan.crops)
        augments = augments if any(augments) else ()
        delivered = 0
        try:
            for batch in batches:
                assert len(batch.ids) == len(range(*rank_plan.rows(delivered).indices(len(rank_plan.ids))))
                delivered += 1
                yield replace(batch, augments=augments) if augments else batch
        finally:
            batches.close()
        if delivered == rank_plan.batches - 1 and len(rank_plan.ids) == delivered * rank_plan.batch_size:
            yield replace(
                empty_batch(rank_plan), augments=augments
            )  # fewer samples left than ranks: this rank has none, but takes the step
            delivered += 1
        assert delivered == rank_plan.batches, f"{self.backend}: {delivered} of {rank_plan.batches} batches"

    @cached_property
    def undecodable(self) -> dict[int, DecodeError]:
        """The samples shown black so far, by id (on_decode_error: skip_and_report)."""
        return {}

    def _handle(self, error: DecodeError, options: LoaderOptions) -> None:
        """Raise `error`, or report it and let the caller show the sample black."""
        if options.on_decode_error == "raise":
            raise error
        if error.sample_id not in self.undecodable:
            self.undecodable[error.sample_id] = error
            _log.warning("%s; shown black (%d such so far)", error, len(self.undecodable))

    def close(self) -> None:
        """End the running epoch and release workers, files and memory. May be called twice."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def empty_batch(rank_plan: RankPlan) -> Batch:
    """A batch of no rows with the shapes of `work`."""
    images = tuple(torch.empty(0, 3, r.size, r.size, dtype=torch.uint8) for r in rank_plan.crops)
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(images=images, labels=nothing, ids=nothing)


# Backend name -> class, or module:class, which is imported when asked for.
BACKENDS: dict[str, str | type[Loader]] = {
    "torch": "pipelines.loaders.torch_loader:TorchLoader",
    "resident": "pipelines.loaders.resident_loader:ResidentLoader",
    "ffcv": "pipelines.loaders.ffcv_loader:FFCVLoader",
    "dali": "pipelines.loaders.dali_loader:DALILoader",
}

# Loaders that show other pixels than the plan's: what the rest of a run reaches when reading is free.
CEILINGS: dict[str, str | type[Loader]] = {
    "synthetic": "pipelines.loaders.synthetic:SyntheticLoader",
    "replay": "pipelines.loaders.replay:ReplayLoader",
}


def register_loader(name: str, loader: str | type[Loader]) -> None:
    """Add a backend from outside: its class, or module:class. Raises ValueError if the name is taken."""
    known = {**BACKENDS, **CEILINGS}
    if known.get(name, loader) != loader:
        raise ValueError(f"register_loader: {name!r} is taken; choose another name")
    if not name.isidentifier():
        raise ValueError(f"register_loader: got the name {name!r}, expected letters, digits and underscores")
    BACKENDS[name] = loader


def loader_class(name: str) -> type[Loader]:
    """The class of a backend by name. FFCV and DALI themselves are imported when one is opened."""
    found = {**BACKENDS, **CEILINGS}[name]
    if isinstance(found, type):
        return found
    module, _, class_name = found.partition(":")
    loader: type[Loader] = getattr(importlib.import_module(module), class_name)
    return loader


def open_loader(backend: str, path: Path, options: LoaderOptions) -> Loader:
    """Open `path` with a backend by name.

    Raises ValueError for an unknown backend, a missing optional package (with what to install), or a
    dataset that the backend cannot read.
    """
    name, _, replayed = backend.partition(":")
    known = {**BACKENDS, **CEILINGS}
    if name not in known or (replayed and (name != "replay" or replayed not in BACKENDS)):
        raise ValueError(f"data.backend: got {backend!r}, expected one of {', '.join(known)}")
    found = loader_class(name)
    if found.reads_files and not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return found.open(path, replace(options, replays=replayed) if replayed else options)
