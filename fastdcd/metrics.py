"""What a run says of itself: metrics.jsonl, trackers, and sums that stay on the device between lines."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.files import explain_full_disk, replace_file
from pipelines.prefetch import Item

_log = logging.getLogger("fastdcd")


class RunningMeans:
    """Means of named 0-dimensional tensors over steps, kept on the device until asked for.

    One vector holds all sums: a step costs a few kernels, however many names there are.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [names]
        self._steps: Tensor | int = 0

    def add(self, values: dict[str, Tensor], *, taken: Tensor | None = None) -> None:
        """Add one step's values, unless `taken` (bool, 0-dimensional) is false; nothing waits for the device."""
        assert self._sums is None or self._names == tuple(values)
        row = torch.stack([value.detach() for value in values.values()])
        if taken is not None:
            row = torch.where(taken, row, 0.0)
        self._steps = self._steps + (1 if taken is None else taken.float())
        self._names, self._sums = tuple(values), row if self._sums is None else self._sums + row

    def take(
        self, accelerator: Accelerator, others: dict[str, Tensor], own: Sequence[float]
    ) -> tuple[dict[str, float], list[list[float]]]:
        """Means since the last call and `others` as they are, averaged over processes, and the numbers `own` of every
        process, [len(own)][processes], with one wait for the device. A mean over no steps is NaN."""
        values = {**self.on_device(), **others}
        count = accelerator.num_processes
        # the mean of matrices that are zero but for one column holds all of them
        each = torch.zeros(len(own), count, device=accelerator.device)
        for row, value in zip(each, own, strict=True):
            row[accelerator.process_index].fill_(value * count)  # a copy from the host would be a second wait
        vector = torch.cat([torch.stack([value.float() for value in values.values()]), each.flatten()])
        self._sums, self._steps = None, 0
        numbers = accelerator.reduce(vector, reduction="mean").tolist()
        of_processes = [numbers[len(values) + k * count :][:count] for k in range(len(own))]
        return dict(zip(values, numbers, strict=False)), of_processes

    def on_device(self) -> dict[str, Tensor]:
        """Means so far as tensors; nothing waits for the device."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self._steps).unbind(), strict=True))


class Stopwatch:
    """Images per second and the share of time spent waiting for data, and seconds of training in all.

    Attributes:
        waited: seconds this process waited for data since the last line.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        """`seconds` were spent before this process."""
        self._before, self._running = seconds, False
        self._begin = self._mark = time.perf_counter()
        self.waited, self._images = 0.0, 0

    @property
    def seconds(self) -> float:
        """Time between start and stop so far: training without evaluation."""
        return self._before + (time.perf_counter() - self._begin if self._running else 0.0)

    def start(self) -> None:
        self._begin = self._mark = time.perf_counter()
        self.waited, self._images, self._running = 0.0, 0, True

    def stop(self) -> None:
        self._before, self._running = self.seconds, False

    def data_wait(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items on and time how long each was waited for."""
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def count(self, rows: int) -> None:
        """A step over `rows` images of all processes was taken."""
        self._images += rows

    def take(self, waits: list[float]) -> dict[str, Any]:
        """images_per_second of all processes and data_wait, the mean of theirs (0..1), since the last call. Of
        several processes also data_wait_ranks, each one's: it identifies a slow process.

        Call it when the device was waited for, with every process's `waited`.
        """
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        shares = [each / seconds for each in waits]
        rates = {"images_per_second": self._images / seconds, "data_wait": sum(shares) / len(shares)}
        self._mark, self.waited, self._images = now, 0.0, 0
        return {**rates, "data_wait_ranks": shares} if len(shares) > 1 else rates


class MetricsWriter:
    """Lines of metrics.jsonl, one JSON object each, and the same numbers to Accelerate's trackers."""

    def __init__(self, path: Path, accelerator: Accelerator, *, resume_step: int) -> None:
        """Go on writing at `path`; lines of steps after `resume_step` belong to work that was lost."""
        self._accelerator = accelerator
        self._path = path
        if accelerator.is_main_process:
            lines = list(read_lines(path)) if path.is_file() else []
            for number, line in lines:
                if line is None:
                    _log.warning("%s: line %d is damaged and is left out", path, number)
            kept = [line for _, line in lines if line is not None and line["step"] <= resume_step]
            with replace_file(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """One line: kind is train, eval or epoch; step counts optimizer steps done since the start.

        A number that is not finite is written as null: JSON has no other.
        """
        if not self._accelerator.is_main_process:
            return
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with explain_full_disk(self._path, "resume with --resume auto"):
            self._file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")
            self._file.flush()
        known = {f"{kind}/{name}": value for name, value in _scalars(values)}
        self._accelerator.log(known, step=step)

    def close(self) -> None:
        if self._accelerator.is_main_process:
            self._file.close()


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What trackers can draw: numbers by name, those of a list as name/0, name/1, ..."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{number}", each) for number, each in enumerate(value))
        elif value is not None:
            yield name, value


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The lines of a metrics.jsonl with their numbers, from 1; None for one that is damaged. A last line cut short by
    a crash is left out."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            line = None
            with suppress(ValueError, RecursionError):  # a text that is not UTF-8 or JSON
                line = json.loads(text)
            whole = isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int
            yield number, line if whole else None
