"""The plan of an epoch: which samples, in which order, on which rank, seen through which box.

Everything here is pure and vectorised. Global batch s of an epoch is order[s*B : (s+1)*B], and rank r
of W takes rows n*r//W to n*(r+1)//W of its n rows. So the data seen does not depend on the number of
ranks or workers, on the backend, or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import Augment, ViewAugment, aligned, partners
from pipelines.index import DatasetIndex
from pipelines.views import Boxes, Center, Flips, ViewFamily, hash_key

# Paged order: samples of a page lie beside each other on disk; a window of pages is mixed in memory.
PAGE_SAMPLES = 256
WINDOW_PAGES = 32


def _random(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    key = hash_key(seed, np.arange(count), epoch)
    return np.argsort(key, kind="stable")


def _paged(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    pages = -(-count // PAGE_SAMPLES)
    page_rank = np.empty(pages, np.int64)
    page_rank[_random(pages, seed ^ 0x5041_4745, epoch)] = np.arange(pages)
    window = page_rank[np.arange(count) // PAGE_SAMPLES] // WINDOW_PAGES
    return np.lexsort((hash_key(seed, np.arange(count), epoch), window))


def _sequential(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.arange(count)


ORDERS: dict[str, Callable[[int, int, int], NDArray[np.int64]]] = {
    "random": _random,
    "paged": _paged,
    "sequential": _sequential,
}


def order(count: int, *, seed: int, epoch: int, kind: str = "random") -> NDArray[np.int64]:
    """The order of sample ids [count] int64 in an epoch: a permutation, a function of its arguments only.

    `random` is a full shuffle. `paged` shuffles pages of 256 neighbouring samples, then the samples
    within windows of 32 pages: for sets larger than memory on slow storage. `sequential` does neither.
    """
    if kind not in ORDERS:
        raise ValueError(f"order: got {kind!r}, expected one of {', '.join(ORDERS)}")
    return ORDERS[kind](count, seed, epoch)


def epoch_order(
    count: int, *, seed: int, epoch: int, kind: str, augment: Augment, view_seed: int, view: int
) -> NDArray[np.int64]:
    """`order`, with partners beside each other where the view mixes images."""
    found = order(count, seed=seed, epoch=epoch, kind=kind)
    return aligned(found, partners(count, view_seed, view)) if augment.mixes else found


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One picture to make of every sample: crop the box, resize it to size x size, mirror it if flipped."""

    boxes: Boxes  # [M, 4] top, left, height, width in the stored image; may reach outside, which reads 0
    flips: Flips  # [M]
    size: int  # output height and width, pixels
    augment: ViewAugment | None = (
        None  # what happens to it then, on the device (pipelines/augment.py); not the loader's
    )


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What one loader executes in one epoch: `batches` batches of `batch_size` rows, the last one shorter.

    The last batch may have no rows (fewer samples left than ranks): it is delivered all the same, so
    that every rank takes the same number of steps.
    """

    ids: NDArray[np.int64]  # [M] sample ids in order
    crops: tuple[Crops, ...]  # of the same rows; decode once, render each
    batch_size: int
    batches: int

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and self.batches >= 0
        assert len(self.ids) <= self.batch_size * self.batches
        assert len(self.ids) > self.batch_size * (self.batches - 2), "only the last batch may be short"
        assert all(len(r.boxes) == len(r.flips) == len(self.ids) for r in self.crops)

    def rows(self, batch: int) -> slice:
        """The rows of batch number `batch`."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.ids)))


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The plan of one epoch over one dataset.

    Attributes:
        index: the dataset; its stored sizes place the boxes.
        family: how boxes are drawn.
        view_seed, view: seed of the views and which view this epoch shows (epoch modulo stored views).
        order: sample ids [N] in global order.
        batch_size: global, over all ranks.
        augment: what happens to the crops. If it mixes images, partners stand together in `order` (`epoch_order`).
    """

    index: DatasetIndex
    family: ViewFamily
    view_seed: int
    view: int
    order: NDArray[np.int64]
    batch_size: int
    augment: Augment | None = None

    @property
    def steps(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def rows(self, step: int) -> int:
        """Rows of global batch `step`, over all ranks."""
        return min(self.batch_size, len(self.order) - step * self.batch_size)

    def for_rank(
        self, sizes: tuple[int, ...], *, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> RankPlan:
        """This rank's part from `start_step` on, rendered once at each of `sizes` (pixels).

        Raises ValueError if the batch has fewer rows, or pairs of mixed images, than there are ranks.
        """
        unit = 2 if self.augment is not None and self.augment.mixes else 1
        if self.batch_size % unit or self.batch_size < unit * world_size:
            self._refuse(unit, world_size)
        full, rest = divmod(len(self.order), self.batch_size)
        first, last = _share(self.batch_size, rank, world_size, unit)
        rest_first, rest_last = _share(rest, rank, world_size, unit)
        start = min(start_step, full)
        body = self.order[start * self.batch_size : full * self.batch_size]
        body = body.reshape(-1, self.batch_size)[:, first:last].reshape(-1)
        tail = self.order[full * self.batch_size :][rest_first:rest_last] if start_step <= full else body[:0]
        ids = np.concatenate([body, tail])
        boxes, flips = self.family.boxes(self.view_seed, ids, self.view, self.index.sizes[ids])
        return RankPlan(
            ids=ids,
            crops=tuple(Crops(boxes=boxes, flips=flips, size=size, augment=self._augment) for size in sizes),
            batch_size=last - first,
            batches=max(self.steps - start_step, 0),
        )

    @property
    def _augment(self) -> ViewAugment | None:
        if self.augment is None or not self.augment.active:
            return None
        return ViewAugment(settings=self.augment, seed=self.view_seed, view=self.view)

    def _refuse(self, unit: int, world_size: int) -> NoReturn:
        expected = "at least one row a process" if unit == 1 else "an even number, at least two rows a process"
        why = "the batch size is global" + ("; mixed images come in pairs" if unit == 2 else "")
        raise ValueError(
            f"data.batch_size: got {self.batch_size} for {world_size} processes, expected {expected} ({why})"
        )


def evaluation_plan(index: DatasetIndex, *, crop_ratio: float, batch_size: int) -> EpochPlan:
    """Centre crops of all samples in the order of their ids."""
    return EpochPlan(
        index=index,
        family=Center(crop_ratio=crop_ratio),
        view_seed=0,
        view=0,
        order=np.arange(len(index)),
        batch_size=batch_size,
    )


def _share(rows: int, rank: int, world_size: int, unit: int) -> tuple[int, int]:
    """First and last of a rank's rows, in whole units of rows."""
    units = -(-rows // unit)
    first, last = units * rank // world_size, units * (rank + 1) // world_size
    return min(unit * first, rows), min(unit * last, rows)
