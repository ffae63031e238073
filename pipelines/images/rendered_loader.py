"""A loader whose batches the renderer makes: what is left to it is where the bytes of an image come from."""

from __future__ import annotations

from collections.abc import Generator

import torch

from pipelines.base import Batch, Loader, LoaderOptions
from pipelines.images.renderer import Renderer, Source
from pipelines.index import DatasetIndex
from pipelines.plan import RankPlan


class RenderedLoader(Loader):
    """Executes plans over the images of a `source`, which are `index`'s; closes both."""

    def __init__(self, index: DatasetIndex, source: Source, options: LoaderOptions) -> None:
        self.index, self._source, self._options = index, source, options
        self._labels = torch.from_numpy(index.labels)
        self._renderer = Renderer(source, index.sizes, workers=options.workers, device=options.device)

    def _execute(self, rank_plan: RankPlan) -> Generator[Batch, None, None]:
        batches = self._renderer.run(rank_plan)
        try:
            for rendered in batches:
                for error in rendered.errors:
                    self._handle(error, self._options)
                yield Batch(images=rendered.images, labels=self._labels[rendered.ids], ids=rendered.ids)
        finally:
            batches.close()

    def close(self) -> None:
        super().close()
        self._renderer.close()
        self._source.close()
