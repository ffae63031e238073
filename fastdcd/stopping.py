"""Ending a run early without losing anything: SIGTERM, SIGINT, or a limit of steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator


class StopRequest:
    """Within its context a first SIGTERM or Ctrl-C asks the loop to stop; a second ends the process.

    All processes must stop at the same step, so with several of them the question is put to all every
    few steps only.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.requested = False
        self._accelerator, self._received = accelerator, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def poll(self, step: int, *, every: int, limit: int) -> None:
        """Decide after `step` whether to stop: at step `limit` (0: never), or on a signal to any process."""
        if limit and step >= limit:
            self.requested = True
        elif self._accelerator.num_processes == 1:
            self.requested = self._received
        elif step % every == 0:
            flag = torch.tensor(float(self._received), device=self._accelerator.device)
            self.requested = bool(self._accelerator.reduce(flag, reduction="sum") > 0)
