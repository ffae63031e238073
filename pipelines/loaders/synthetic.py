"""The ceiling of every loader: no data at all. One batch of noise, made once, shown at every step.

What a run reaches with it is what the model alone can take; the distance to a real loader's rate is what
the data costs. Ids, labels, batch counts and shapes are those of the plan; the pixels are not.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch

from pipelines.base import Batch, Loader, LoaderOptions
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan

STORED_SIZE = 512  # height and width that boxes are planned for, pixels


class SyntheticLoader(Loader):
    """Executes plans over images that do not exist. Its path names a size, as in 50000x1000: samples x classes."""

    backend = "synthetic"
    reads_files = False

    def __init__(self, index: DatasetIndex, device: torch.device) -> None:
        """Show noise under the ids and labels of `index`; it lies on `device` already."""
        self.index, self._device = index, device
        self._labels = torch.from_numpy(index.labels).to(device)

    @classmethod
    def open(cls, path: Path, options: LoaderOptions) -> Self:
        size = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", path.name)
        if not size:
            raise ValueError(
                f"{path}: the synthetic backend reads nothing; name a size: SAMPLESxCLASSES, as 50000x1000"
            )
        samples, classes = int(size[1]), int(size[2])
        names = options.classes or tuple(str(label) for label in range(classes))
        if len(names) != classes:
            raise ValueError(f"{path}: {classes} classes, but {len(names)} class names are given")
        index = DatasetIndex(
            classes=names,
            labels=np.arange(samples, dtype=np.int64) % classes,
            sizes=np.full((samples, 2), STORED_SIZE, np.int32),
            names=[str(sample) for sample in range(samples)],
        )
        return cls(index, options.device)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {"backend": "synthetic"}

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        generator = torch.Generator().manual_seed(0)
        noise = [
            torch.randint(
                0, 256, (rank_plan.batch_size, r.size, r.size, 3), dtype=torch.uint8, generator=generator
            )
            for r in rank_plan.crops
        ]
        images = [each.to(self._device).permute(0, 3, 1, 2) for each in noise]
        ids = torch.from_numpy(rank_plan.ids)
        device_ids = ids.to(self._device)  # once: ids from the host would make every batch wait for the device
        for number in range(rank_plan.batches):
            rows = rank_plan.rows(number)
            if count := len(ids[rows]):
                yield Batch(
                    images=tuple(each[:count] for each in images),
                    labels=self._labels[device_ids[rows]],
                    ids=ids[rows],
                )
