"""A run's folder: held by one run at a time, looked at by one process, with one answer for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from fastdcd import checkpoint
from fastdcd.checkpoint import Saved
from pipelines.files import Lock

Answer = TypeVar("Answer")


@contextmanager
def hold(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it. A folder that nothing was written to is removed again.

    Raises ValueError, on every process, if another run has it.
    """
    held: list[Lock] = []
    new = not folder.exists()

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.lock"
        refusal = (
            f"{folder}: another run is writing there (it holds {path.name}; if its machine is gone, remove that): wait "
            "for it, or choose another folder with --set run.dir=..."
        )
        held.append(Lock(path, refusal))

    on_first(accelerator, take)
    try:
        yield
    finally:
        for lock in held:
            lock.close()
            if new:
                with suppress(OSError):
                    folder.rmdir()


def to_resume(folder: Path, resume: str, accelerator: Accelerator) -> Saved | None:
    """The checkpoint that train.resume asks for; None to start from scratch. A damaged one is set aside, and the one before
    it taken: it leads to the same weights.

    Raises ValueError, on every process, if none can be read, or what was asked for is not there.
    """
    read: list[Saved] = []

    def look() -> tuple[Path | None, list[str]]:
        candidates = checkpoint.find(folder / "checkpoints", resume)
        if not candidates:
            return None, []
        saved, damaged = checkpoint.read_newest(candidates)
        read.append(saved)
        for path in candidates[: len(damaged)]:
            path.rename(path.with_name(f"{path.name}.damaged"))
        return saved.path, damaged

    path, damaged = on_first(accelerator, look)
    for message in damaged:
        accelerator.print(f"{message}; set aside as .damaged, and {path.name if path else ''} taken instead")
    if path is None:
        return None
    return read[0] if read else checkpoint.read(path)


def on_first(accelerator: Accelerator, call: Callable[[], Answer]) -> Answer:
    """What `call` returns on the first process, on all of them. What it raises of a user's mistakes, all raise."""
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
