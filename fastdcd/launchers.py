"""What accelerate launch and torchrun expect of the processes they start, and what they leave undone."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch")


def _launcher() -> int | None:
    """The process that started this one, if it is a launcher."""
    parent = os.getppid()
    with suppress(OSError):  # Linux only
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
        if any(word.endswith(_LAUNCHERS) or "accelerate/commands" in word for word in words):
            return parent
    return None


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher ends. `accelerate launch` of one process dies of its own SIGTERM and would leave
    this one running."""
    parent = _launcher()
    if parent is None:
        return
    with suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGTERM)


def reported(text: str) -> bool:
    """Whether nobody needs to print why this process fails: another one of this machine has said why, or the launcher
    or a process that outlives it will, below what the launcher prints."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        attempt = Path(error_file).parent.parent  # of all processes of this machine; torchrun removes it
        try:
            os.close(os.open(attempt / "said", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        except OSError:
            return False
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            return False  # torchrun restarts and gives no reason
        # In whole seconds; before that of the processes that end because of this one.
        Path(error_file).write_text(
            json.dumps({"message": text, "timestamp": int(time.time()) - 1}), encoding="utf-8"
        )
        return True
    parent = _launcher()
    # SLURM, and a container whose first process ends, kill what is left: then nobody would say it
    if parent is None or parent == 1 or "SLURM_JOB_ID" in os.environ or "RANK" in os.environ:
        return False
    return _say_after(parent, text)


def _say_after(launcher: int, text: str) -> bool:
    """Print `text` when the launcher has ended: `accelerate launch` of one process prints a traceback of its own
    after ours. False if that cannot be done."""
    try:
        ended = os.pidfd_open(launcher)  # Linux only
    except (AttributeError, OSError):
        return False
    if os.fork():
        return True
    try:  # system calls only: the other threads are not in this process
        os.setsid()
        os.close(0)
        os.close(1)
        select.select([ended], [], [], 20)
    finally:
        os.write(2, f"{text}\n".encode(errors="replace"))
        os._exit(0)
