"""Top-1 and top-5 of a classifier over a dataset, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from fastdcd.config import Eval
from fastdcd.progress import ProgressBar
from pipelines.base import Loader
from pipelines.plan import evaluation_plan
from pipelines.prefetch import prefetch


class Accuracy(NamedTuple):
    """Result of an evaluation: percent, and mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    loader: Loader,
    accelerator: Accelerator,
    config: Eval,
    *,
    size: int,
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Accuracy of `predict` (uint8 [n, 3, size, size] -> logits [n, classes]) over centre crops of all samples.

    `stop` is asked before each batch, by all processes; None if it says so.
    """
    batch_size = max(config.batch_size, accelerator.num_processes)
    plan = evaluation_plan(loader.index, crop_ratio=config.crop_ratio, batch_size=batch_size)
    rank_plan = plan.for_rank((size,), rank=accelerator.process_index, world_size=accelerator.num_processes)
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # top-1, top-5, summed loss
    bar = ProgressBar("evaluate", len(loader.index), "images", shown=accelerator.is_main_process, leave=False)
    for batch, _ in prefetch(loader.epoch(rank_plan), lambda ids: None, accelerator.device):
        if stop():
            bar.close()
            return None
        bar.update(min(len(batch.labels) * accelerator.num_processes, bar.left))
        if not len(batch.labels):
            continue
        images = batch.at(size)
        with accelerator.autocast():
            logits = predict(images).float()
        if config.flip:
            with accelerator.autocast():
                logits = (logits + predict(images.flip(3)).float()) / 2
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [n, 5], best first
        hits = (best == batch.labels[:, None]).double()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum").double()
        totals += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
    bar.close()
    totals = accelerator.reduce(totals, reduction="sum") / len(loader.index)
    top1, top5, loss_mean = totals.tolist()
    return Accuracy(100 * top1, 100 * top5, loss_mean)
