"""Laps of a step. On a GPU they are read off its own timeline by events, on the CPU off the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch.profiler import record_function

BLOCK = 8  # steps
Step = TypeVar("Step")


def spread(values: Sequence[float], kept: Sequence[float] | None = None) -> dict[str, float]:
    """Median, quartiles and number of `values`; the mean of those that were `kept`, by default of all."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    mean = float(np.mean(values if kept is None else kept))
    return {"mean": mean, "median": median, "quartile_25": low, "quartile_75": high, "samples": len(values)}


def steady(steps: Sequence[Step], seconds: Callable[[Step], float]) -> list[Step]:
    """The steps without the times when the machine was busy with something else: those of the middle half of
    blocks, by their length. Whole blocks, since a loader's waits come in bursts that belong to the mean."""
    blocks = [list(steps[start : start + BLOCK]) for start in range(0, len(steps) - BLOCK + 1, BLOCK)]
    if len(blocks) < 4:
        return list(steps)
    blocks.sort(key=lambda block: sum(map(seconds, block)))
    kept = blocks[len(blocks) // 4 : -(len(blocks) // 4)]
    return [step for block in kept for step in block]


def call_seconds(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Median time of a call, after two to warm up."""
    found = []
    for _ in range(times + 2):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return float(np.median(found[2:]))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Splits steps into named stages without gaps: a lap is what passed since the last mark.

    On a GPU a mark is an event in its stream, so that a lap is the time the *device* spent between two marks:
    host work that hides behind the device costs nothing here, as it costs nothing in training.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[list[tuple[str, Any]]] = []
        self._spans: list[dict[str, float]] = []
        self._running = False
        self.marking, self.tracing = True, False
        self._traced: Any = None

    def start(self, *, marking: bool = True) -> None:
        """A step begins; without marking only its whole time is taken."""
        self.marking, self._running = marking, True
        self._steps.append([("", self._now())])
        self._spans.append({})
        self._trace("first stage")

    def lap(self, name: str, *, trace: bool = True) -> None:
        """What passed since the last mark belongs to stage `name`."""
        if self._running and self.marking:
            self._steps[-1].append((name, self._now()))
            if trace:
                self._trace(f"after {name}")

    def move(self, source: str, target: str, seconds: float) -> None:
        """Of this step's `source`, `seconds` belong to `target`."""
        if self._running and self.marking:
            spans = self._spans[-1]
            spans[source] = spans.get(source, 0.0) - seconds
            spans[target] = spans.get(target, 0.0) + seconds

    def stop(self) -> None:
        """The step ends; what is left of it is `other`."""
        self._steps[-1].append(("other" if self.marking else "whole", self._now()))
        self._running = False
        self._trace(None)

    def drop(self) -> None:
        """Forget the step that has just ended."""
        self._steps.pop()
        self._spans.pop()

    def take(self) -> tuple[list[dict[str, float]], list[float]]:
        """Stages of the marked steps, and whole times of the others, in seconds; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        marked: list[dict[str, float]] = []
        whole: list[float] = []
        for marks, spans in zip(self._steps, self._spans, strict=True):
            stages = dict(spans)
            for (_, before), (name, after) in pairwise(marks):
                seconds = before.elapsed_time(after) / 1000 if self._cuda else after - before
                stages[name] = stages.get(name, 0.0) + seconds
            if "whole" in stages:
                whole.append(stages["whole"])
            else:
                marked.append(stages)
        self._steps, self._spans = [], []
        return marked, whole

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _trace(self, name: str | None) -> None:
        """Ranges for a Chrome trace. A range is named when it begins, a lap when it ends: so `after X`."""
        if self._traced is not None:
            self._traced.__exit__(None, None, None)
            self._traced = None
        if self.tracing and name is not None:
            self._traced = record_function(name)
            self._traced.__enter__()
