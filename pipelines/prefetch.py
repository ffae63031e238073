"""Getting a loader's batches to the device ahead of time, with rows looked up beside them."""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipelines.base import Batch

# Batches ready on the device before the step that uses them: one in use, one complete, one on its way.
DEPTH = 2

PATIENCE = 1800.0  # seconds without a batch, as long as processes wait for each other (train.timeout)
TICK = 5.0  # seconds

Item = tuple[Batch, Tensor | None]


def prefetch(
    batches: Iterator[Batch], read_cached: Callable[[Tensor], Tensor | None], device: torch.device
) -> Generator[Item, None, None]:
    """Yield (batch, read_cached(batch.ids)), both on `device`, the batch with its planned augmentation done there.

    On a GPU a thread runs the loader and the lookup, and copies and augmentation run on a stream of their own, so that
    none of it delays a step. On the CPU the cores belong to the step, and there is nothing to
    copy: batches are made when asked for.

    A batch that does not come for PATIENCE seconds ends the process with one line.

    Args:
        batches: from Loader.epoch; closed when this generator is.
        read_cached: host rows [n, ...] for ids int64 [n], or None.
        device: where the step runs.
    """
    made = _on_host(batches, read_cached) if device.type != "cuda" else _on_stream(batches, read_cached, device)
    try:
        while True:
            with _patience():
                item = next(made, None)
            if item is None:
                return
            yield item
            del item  # not kept while the next one is made
    finally:
        with _patience():
            made.close()


def _on_host(
    batches: Iterator[Batch], read_cached: Callable[[Tensor], Tensor | None]
) -> Generator[Item, None, None]:
    for batch in batches:
        yield batch.augmented(), read_cached(batch.ids)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which batches are made and copied, one for the life of the process: torch's allocator keeps
    freed memory for the stream that it was made on, and what an earlier epoch's stream left would lie idle."""
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU that the host does not wait for, whatever memory it comes from."""
    if not (tensor.is_cuda or tensor.is_pinned()):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _on_stream(
    batches: Iterator[Batch], read_cached: Callable[[Tensor], Tensor | None], device: torch.device
) -> Generator[Item, None, None]:
    ready: queue.Queue[tuple[Item, torch.cuda.Event] | BaseException | None] = queue.Queue(DEPTH)
    stop = threading.Event()
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # a loader may hold its images on the device

    def put(item: tuple[Item, torch.cuda.Event] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            # A thread begins on GPU 0, and what it starts inherits that: DataLoader's pinning thread would make a
            # context there in every process.
            torch.cuda.set_device(device)
            with torch.cuda.stream(stream):
                for batch in batches:
                    cached = read_cached(batch.ids)
                    moved = replace(
                        batch,
                        images=tuple(to_device(image, device) for image in batch.images),
                        labels=to_device(batch.labels, device),
                    ).augmented()
                    put(((moved, None if cached is None else to_device(cached, device)), stream.record_event()))
                    if stop.is_set():
                        break
            put(None)
        except BaseException as error:
            put(error)
        finally:
            batches.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            (batch, rows), copied = item
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for tensor in (*batch.images, batch.labels, *(batch.mixed or ()), *([] if rows is None else [rows])):
                tensor.record_stream(current)  # its memory may be reused only after this step's work
            yield batch, rows
    finally:
        stop.set()
        thread.join()


class _Wait:
    """One wait for a batch."""

    ticks = 0


class _Watcher(threading.Thread):
    """Ends the process when a batch has been waited for too long.

    A thread that reads from a dead file server is stuck in the kernel: it cannot be told to stop, and whoever waits for
    it cannot leave either. Time is counted in ticks of this thread: a process that was stopped meanwhile loses none.
    """

    def __init__(self) -> None:
        super().__init__(name="patience", daemon=True)
        self.waits: set[_Wait] = set()

    def run(self) -> None:
        while True:
            time.sleep(TICK)
            for wait in self.waits.copy():
                wait.ticks += 1
                if wait.ticks * TICK >= PATIENCE and wait in self.waits:
                    _give_up()


_watcher: _Watcher | None = None


@contextmanager
def _patience() -> Iterator[None]:
    """Wait for a batch, for PATIENCE seconds at most."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # a forked process has no threads
        _watcher = _Watcher()
        _watcher.start()
    waits, wait = _watcher.waits, _Wait()
    waits.add(wait)
    try:
        yield
    finally:
        waits.discard(wait)


def _give_up() -> None:
    text = (
        f"{Path(sys.argv[0]).name}: failed: no batch came for {PATIENCE / 60:.0f} minutes: the storage hangs, perhaps; "
        "the same command continues from what is saved (train: --resume auto)\n"
    )
    os.write(2, text.encode(errors="replace"))
    os._exit(1)
