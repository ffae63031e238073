"""What test_processes.py runs on several processes. Apart from it, so that they import no more than a run does."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcd import checkpoint, config_file, experiment
from fastdcd.cache import fill as filling
from fastdcd.cache.store import TeacherCache
from fastdcd.config import Loss
from fastdcd.losses import dcd, tiled
from fastdcd.losses.terms import LossInputs, loss_section
from fastdcd.models import ModelOutput
from fastdcd.train import train
from pipelines.augment import Mixed
from pipelines.plan import _share

Target = Callable[..., None]


def as_rank(rank: int, count: int, port: int, target: Target, arguments: tuple[Any, ...]) -> None:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    if count > 1:
        os.environ.update({name: str(value) for name, value in named.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    target(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


class Small(nn.Module):
    """A student of two layers without BatchNorm, with every term but those in `without`."""

    def __init__(self, loss: Loss, without: str) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(12, 10), nn.Linear(10, 5)
        self.terms = nn.ModuleDict(
            {name: term(loss.settings(name), 10, 9) for name, term in loss.terms.items() if name != without}
        )

    def forward(
        self, x: Tensor, teacher: ModelOutput, labels: Tensor, mixed: Mixed | None, divisor: float
    ) -> Tensor:
        features = self.body(x).relu()
        output = ModelOutput(features, self.classifier(features))
        inputs = LossInputs(output, teacher, labels, divisor, 0, mixed)
        return torch.stack([term(inputs)[0] for term in self.terms.values()]).sum()


def gradients_equal(tolerances: dict[torch.dtype, float]) -> None:
    dist.init_process_group("gloo")
    tiled.TILE["cpu"] = 5
    count = dist.get_world_size()
    with pytest.raises(ValueError, match=f"rows of one process only, and there are {count}"):
        dcd.dcd(torch.eye(3), torch.eye(3), torch.tensor(1.0), negatives="global", form="naive")
    for dtype, tolerance in tolerances.items():
        for rows in (1, count - 1, count, 17, 40, 41):  # empty shares, even and uneven ones
            for masked in (False, True):
                for mixes in (False, True):
                    _compare(rows, masked, mixes, dtype, tolerance)


def _compare(rows: int, masked: bool, mixes: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Gradients over DDP's processes against the same batch on one."""
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rows)
    torch.set_default_dtype(dtype)
    section: Any = loss_section()
    section = section(kd=1.0, dcd=1.0, feat_dim=6, negatives="global", mask_same_class=masked)
    # a class hardly varies over a few rows: its correlation amplifies float32's rounding a hundred times
    module: Any = Small(section, without="dist" if dtype == torch.float32 else "")
    x, features, logits = torch.randn(rows, 12), torch.randn(rows, 9), torch.randn(rows, 5)
    torch.set_default_dtype(torch.float32)
    labels = torch.randint(0, 5, (rows,))
    mixed = Mixed(torch.randint(0, 5, (rows,)), torch.rand(rows, dtype=dtype)) if mixes else None
    first, last = _share(rows, rank, count, 2 if mixes else 1)
    own = slice(first, last)
    own_mixed = Mixed(*(each[own] for each in mixed)) if mixed is not None else None
    found = DistributedDataParallel(module)
    found(x[own], ModelOutput(features[own], logits[own]), labels[own], own_mixed, rows / count).backward()
    gradients = [each.grad.clone() for each in module.parameters()]
    module.zero_grad()
    module.terms["dcd"].settings = replace(module.terms["dcd"].settings, negatives="local")
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(dist, "is_initialized", lambda: False)
        module(x, ModelOutput(features, logits), labels, mixed, float(rows)).backward()
    largest = max(float(each.grad.abs().max()) for each in module.parameters())
    for (name, each), ours in zip(module.named_parameters(), gradients, strict=True):
        off = float((ours - each.grad).abs().max()) / largest
        assert off <= tolerance, (rows, masked, mixes, dtype, name, off)
    assert module.terms["dcd"].b.grad == 0


def run_training(file: Path, overrides: list[str]) -> None:
    """Train, and leave each process's state beside the run."""
    cfg, write = config_file.load(file, overrides), experiment.write_results

    def keep_state(cfg: Any, accelerator: Any, module: Any, *rest: Any) -> Any:
        torch.save(module.state_dict(), cfg.run.dir / f"rank-{accelerator.process_index}.pt")
        return write(cfg, accelerator, module, *rest)

    experiment.write_results = keep_state  # type: ignore[assignment]
    train(cfg)


def with_bad_rank(bad: str, file: Path) -> None:
    os.environ["BAD_RANK"] = bad
    run_training(file, [])


class Lists(TorchFunctionMode):
    """Counts Tensor.tolist, which reads all numbers of a tensor at once."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


class Numbers(TorchDispatchMode):
    """Counts reads of a single number: item(), float(), bool() and their like."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_reads(file: Path) -> None:
    """Train, and write how often numbers were read from tensors."""
    with Numbers() as numbers, Lists() as lists:
        train(config_file.load(file))
    (file.parent / f"reads-{os.environ.get('RANK', 0)}").write_text(str(numbers.count + lists.count))


def run_fill(file: Path) -> None:
    filling.FLUSH_SECONDS = 0.0
    with (parts := filling.open_parts(config_file.load(file))).loader:
        filling.fill(parts)


def fill_with_a_slow_rank(file: Path) -> None:
    """Fill while training; the second process brings its rows to disk late. Note how many are there at a checkpoint."""
    flush, save = TeacherCache.flush, checkpoint.save

    def slow(cache: TeacherCache) -> None:
        time.sleep(2.0 if os.environ["RANK"] == "1" else 0.0)
        flush(cache)

    def note(cfg: Any, *rest: Any) -> None:
        done = int(TeacherCache.open(cfg.cache.path).view(0).done().sum())
        if os.environ["RANK"] == "0":
            (file.parent / "done").write_text(str(done))
        save(cfg, *rest)

    TeacherCache.flush, checkpoint.save = slow, note  # type: ignore[method-assign,assignment]
    train(config_file.load(file))
