"""Rows from a GPU, copied while it keeps working and stored by a thread when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_MOST_TRAVELLING = 8  # batches of rows between a GPU and the disk


class RowWriter:
    """One thread and one queue for all views of a cache."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "cache-write")
        self._travelling: deque[Future[None]] = deque()

    def write(self, rows: Tensor, store: Callable[[Tensor], None]) -> None:
        """Call `store` with `rows` on the host: at once if they are there, else in the thread when they have arrived.

        An error of the thread is raised by a later call, or by `wait`.
        """
        if not rows.is_cuda:
            return store(rows)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        copied = torch.cuda.current_stream(rows.device).record_event()
        self._travelling.append(self._thread.submit(_store_arrived, host, copied, store))
        if len(self._travelling) > _MOST_TRAVELLING:  # the disk is slower than the teacher
            self._travelling.popleft().result()
        return None

    def wait(self) -> None:
        """Wait until all rows are stored."""
        while self._travelling:
            self._travelling.popleft().result()


def _store_arrived(rows: Tensor, copied: torch.cuda.Event, store: Callable[[Tensor], None]) -> None:
    copied.synchronize()
    store(rows)
