"""Ending a run early without losing anything: SIGTERM, SIGINT."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator

# A launcher passes on a signal that the terminal or the scheduler has sent to all: the same one, twice.
_REPEATS_SECONDS = 2.0
# Steps that a vote travels for before it is read. On a GPU the host is ahead of the device: it must not wait for it.
_TRAVELS = {"cuda": 4}


class StopRequest:
    """Within its context a first SIGTERM or Ctrl-C asks the loop to stop; another one, later, ends the process.

    All processes must stop at the same step. Each step sends a vote around that is read some steps later, when it has
    long arrived: nothing waits for it.

    Attributes:
        requested: whether to stop, as of the last `poll`: the same on all processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.requested = False
        self._accelerator = accelerator
        self._received: float | None = None  # when
        self._votes: deque[_Vote] = deque()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > _REPEATS_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def poll(self) -> bool:
        """Whether to stop, asked for by a signal to any process. All processes call it in step."""
        received = self._received is not None
        if self._accelerator.num_processes == 1:
            self.requested = received
        elif not self.requested:
            device = self._accelerator.device
            self._votes.append(_Vote(received, device))
            if len(self._votes) > _TRAVELS.get(device.type, 1):
                self.requested = self._votes.popleft().result()
        return self.requested


class _Vote:
    """One process's vote on its way to all, and theirs to it."""

    def __init__(self, stop: bool, device: torch.device) -> None:
        self._sent = torch.full((1,), float(stop), device=device)
        self._work = dist.all_reduce(self._sent, dist.ReduceOp.MAX, async_op=True)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            with torch.cuda.stream(_copies(device)):
                self._work.wait()  # the stream does, not the host
                self._host = torch.empty(1, pin_memory=True).copy_(self._sent, non_blocking=True)
                self._arrived = torch.cuda.current_stream().record_event()

    def result(self) -> bool:
        """Whether any process voted to stop."""
        if self._arrived is None:
            self._work.wait()
            return bool(self._sent.numpy()[0])
        self._arrived.synchronize()
        return bool(self._host.numpy()[0])


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copies(device: torch.device) -> torch.cuda.Stream:
    """A stream beside the step's."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
