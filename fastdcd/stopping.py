"""Ending a run early without losing anything: SIGTERM, SIGINT, or a limit of steps."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from accelerate import Accelerator


class StopRequest:
    """Within its context a first SIGTERM or Ctrl-C asks the loop to stop; a second ends the process.

    All processes must stop at the same step, so with several of them the question is put to all every
    few steps only, with the numbers that are logged.
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

    def vote(self) -> float:
        """1 if this process was asked to stop, else 0."""
        return float(self._received)

    def poll(self, step: int, *, limit: int, votes: Sequence[float] | None) -> None:
        """Decide after `step` whether to stop: at step `limit` (0: never), or on a signal to any process.

        `votes` has every process's vote, where they have just been exchanged.
        """
        if limit and step >= limit:
            self.requested = True
        elif self._accelerator.num_processes == 1:
            self.requested = self._received
        elif votes is not None:
            self.requested = any(votes)
