"""The ceiling of decoding: the first batches of another loader, kept in memory and shown again and again.

Unlike noise they are real pixels with their own ids and labels, they are copied to the device as any
batch is, and a teacher cache has rows for them: what is free is reading, decoding and augmenting only.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Self

from pipelines.base import Batch, Loader, LoaderOptions, open_loader
from pipelines.plan import RankPlan

KEPT = 4  # batches


class ReplayLoader(Loader):
    """Executes the first batches of a plan and repeats them. By name: replay:torch, replay:ffcv, ..."""

    backend = "replay"

    def __init__(self, loader: Loader, *, kept: int = KEPT) -> None:
        """Repeat the first `kept` batches of `loader`, which this closes."""
        assert kept > 0
        self.index, self._loader, self._kept = loader.index, loader, kept
        self._batches: list[Batch] = []
        self._shape: tuple[int, ...] = ()

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        if not options.replays:
            raise ValueError("data.backend: replay repeats batches of another backend; name it, as replay:torch")
        return cls(open_loader(options.replays, path, replace(options, replays="")))

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {**self._loader.fingerprint, "replayed": str(self._kept)}

    @property
    def environment(self) -> Mapping[str, str]:
        return self._loader.environment

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        shape = (rank_plan.batch_size, *(each.size for each in rank_plan.crops))
        if shape != self._shape or not self._batches:
            self._batches, self._shape = self._record(rank_plan), shape
        for number in range(rank_plan.batches):
            rows = rank_plan.rows(number)
            if count := len(rank_plan.ids[rows]):
                yield _first(self._batches[number % len(self._batches)], count)

    def _record(self, rank_plan: RankPlan) -> list[Batch]:
        epoch = self._loader.epoch(rank_plan)
        try:
            batches = list(islice(epoch, self._kept))
        finally:
            epoch.close()
        whole = [batch for batch in batches if len(batch.ids) == rank_plan.batch_size]
        return whole or batches[:1]

    def close(self) -> None:
        super().close()
        self._batches = []
        self._loader.close()


def _first(batch: Batch, count: int) -> Batch:
    """The first `count` rows of a batch."""
    return Batch(
        images=tuple(image[:count] for image in batch.images), labels=batch.labels[:count], ids=batch.ids[:count]
    )
