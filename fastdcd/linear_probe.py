"""Linear probes: how well a linear classifier does on a network's frozen features.

The transfer protocol of the DCD paper and of CRD (Tian et al. 2020): images at 32x32, SGD, 120 epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from fastdcd import config_file, models, weights
from fastdcd.config import STRICT, Count, Optim, Positive, Schedule
from fastdcd.evaluate import Accuracy
from fastdcd.optim import build_optimizer
from fastdcd.schedule import learning_rate, set_learning_rate
from fastdcd.teacher import Member, Teacher
from pipelines.base import Loader
from pipelines.plan import evaluation_plan, order
from pipelines.prefetch import prefetch


# What the paper's protocol sets where the defaults of an experiment differ.
@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """How a linear probe reads its images."""

    __pydantic_config__ = STRICT
    workers: Count = 2
    """Decoding processes, for image files."""
    batch_size: Positive = 64
    """Rows of one step of the classifier."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Side of the centre crop over the shorter side of the image."""


@dataclass(frozen=True, kw_only=True)
class ProbeStudent:
    """The frozen network."""

    __pydantic_config__ = STRICT
    model: str
    """As in an experiment: torchvision:NAME, timm:NAME, cifar:NAME or path/to/file.py:callable."""
    classes: Positive | None = None
    """Classes it was trained on; read from the checkpoint if not given."""
    image_size: Positive = 32
    """Pixels."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeTrain:
    """Training of the classifier."""

    __pydantic_config__ = STRICT
    epochs: Positive = 120
    seed: int = 0
    """Seed of the order of rows."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear probe: sections and keys mean what they mean in an experiment."""

    __pydantic_config__ = STRICT
    student: ProbeStudent
    data: ProbeData = field(default_factory=ProbeData)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: ProbeTrain = field(default_factory=ProbeTrain)


PROTOCOL: dict[str, Any] = {
    "student": {"image_size": 32},
    "optim": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "decay_norms_and_biases": True},
    "schedule": {"name": "step", "milestones": [30, 60, 90], "gamma": 0.1},
    "train": {"epochs": 120},
}
# Images of one forward pass.
ROWS = 256


class Features(NamedTuple):
    """Features float32 [n, d] of a data set, and its labels int64 [n]."""

    features: Tensor
    labels: Tensor


def settings(checkpoint: Path, overrides: Sequence[str]) -> Probe:
    """The protocol for a checkpoint; which network it is says the config.yaml of its run, beside it.

    Raises ValueError if there is no such file, nothing says which network it is, or overrides do not fit.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file")
    tree = deepcopy(PROTOCOL)
    beside = checkpoint.parent / "config.yaml"
    if beside.is_file():
        run = config_file.load(beside)
        tree["student"] = {
            "model": run.student.model,
            "image_size": run.eval_size,
            "mean": run.student.mean,
            "std": run.student.std,
        }
    config_file.override_tree(tree, overrides)
    if "model" not in tree["student"]:
        raise ValueError(
            f"{checkpoint}: no config.yaml beside it that says which network it is; add --set student.model=..."
        )
    return config_file.parse_as(Probe, tree, "linear probe")


def load_frozen(section: ProbeStudent, checkpoint: Path, device: torch.device) -> Teacher:
    """The network of a checkpoint, in evaluation mode and without gradients.

    Raises ValueError if the checkpoint is not one of this network.
    """
    classes = section.classes or models.trained_classes(section.model, checkpoint)
    network = models.build(section.model, classes=classes)
    weights.load_into(network, checkpoint)
    normalize = models.normalize_for(section.model, section.mean, section.std)
    frozen = Teacher([Member(network, normalize)], size=section.image_size, rows=ROWS, precision="fp32")
    frozen.to(memory_format=torch.channels_last)
    return frozen.to(device)


def extract(frozen: Teacher, loader: Loader, *, crop_ratio: float, device: torch.device) -> Features:
    """Pooled features of centre crops of all samples, each computed once, in the order of their ids."""
    plan = evaluation_plan(loader.index, crop_ratio=crop_ratio, batch_size=ROWS)
    batches = prefetch(loader.epoch(plan.for_rank((frozen.size,))), lambda ids: None, device)
    parts = [
        Features(frozen.features(batch.at(frozen.size)), batch.labels)
        for batch, _ in tqdm(batches, "features", plan.steps, leave=False, disable=None)
    ]
    features, labels = zip(*parts, strict=True)
    return Features(torch.cat(features), torch.cat(labels))


def fit(train: Features, *, classes: int, cfg: Probe) -> nn.Linear:
    """A linear classifier [classes, d] of features. It starts at zero: the problem is convex."""
    count, dim = train.features.shape
    classifier = nn.Linear(dim, classes).to(train.features.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    # named as in training, so that optim.decay_norms_and_biases means the same
    optimizer = build_optimizer(nn.ModuleDict({"student": classifier}), cfg.optim)
    steps = -(-count // cfg.data.batch_size)
    for epoch in tqdm(range(cfg.train.epochs), "probe", leave=False, disable=None, unit="epoch"):
        ids = torch.from_numpy(order(count, seed=cfg.train.seed, epoch=epoch)).to(train.features.device)
        for number, rows in enumerate(ids.split(cfg.data.batch_size)):
            rate = learning_rate(
                epoch * steps + number, steps, epochs=cfg.train.epochs, schedule=cfg.schedule, peak=cfg.optim.lr
            )
            set_learning_rate(optimizer, rate)
            loss = F.cross_entropy(classifier(train.features[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


@torch.no_grad()
def accuracy(classifier: nn.Linear, test: Features) -> Accuracy:
    """Top-1 and top-5 of a classifier of features."""
    logits = classifier(test.features)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == test.labels[:, None]  # [n, 5], best first
    top1, top5 = hits[:, 0].double().mean(), hits.any(1).double().mean()
    return Accuracy(100 * top1.item(), 100 * top5.item(), F.cross_entropy(logits, test.labels).item())
