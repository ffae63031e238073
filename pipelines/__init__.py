"""Data loading by plan: everything random is computed up front, loaders only execute it.

    from pathlib import Path
    from pipelines import EpochPlan, LoaderOptions, RandomResizedCrop, open_loader, order

    with open_loader("torch", Path("imagenet/train"), LoaderOptions(workers=8)) as loader:
        for epoch in range(90):
            ids = order(len(loader.index), seed=0, epoch=epoch)
            plan = EpochPlan(
                index=loader.index, family=RandomResizedCrop(), view_seed=0, view=epoch, order=ids, batch_size=256
            )
            for batch in loader.epoch(plan.for_rank((224,))):
                batch.images[0], batch.labels, batch.ids  # uint8 [n, 3, 224, 224], int64 [n], int64 [n]

Names are imported when they are asked for: importing the package loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.base import Batch as Batch
    from pipelines.base import DecodeError as DecodeError
    from pipelines.base import Loader as Loader
    from pipelines.base import LoaderOptions as LoaderOptions
    from pipelines.base import open_loader as open_loader
    from pipelines.image_folder import index_image_folder as index_image_folder
    from pipelines.index import DatasetIndex as DatasetIndex
    from pipelines.plan import Crops as Crops
    from pipelines.plan import EpochPlan as EpochPlan
    from pipelines.plan import RankPlan as RankPlan
    from pipelines.plan import evaluation_plan as evaluation_plan
    from pipelines.plan import order as order
    from pipelines.views import Center as Center
    from pipelines.views import PadCrop as PadCrop
    from pipelines.views import RandomResizedCrop as RandomResizedCrop
    from pipelines.views import ViewFamily as ViewFamily

_HOMES = {
    "base": ("Batch", "DecodeError", "Loader", "LoaderOptions", "open_loader"),
    "image_folder": ("index_image_folder",),
    "index": ("DatasetIndex",),
    "plan": ("Crops", "EpochPlan", "RankPlan", "evaluation_plan", "order"),
    "views": ("Center", "PadCrop", "RandomResizedCrop", "ViewFamily"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"pipelines.{module}"), name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
