"""The frame of every command-line program: a user's mistake is one line and exit code 2, no traceback."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastdcd import launchers

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but line breaks


def run(main: Callable[[], int], *, again: str = "the same command continues where this one stopped") -> NoReturn:
    """Run `main` and exit with what it returns: 0 done, 1 failed, 2 bad usage or input.

    ValueError and what the file system refuses are the user's to mend: their message, one line each, goes
    to stderr, once for all processes of a machine. Anything else is our bug and keeps its traceback.

    Args:
        main: the program.
        again: how to continue after a loss that is nobody's mistake.
    """
    program = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # names that the terminal's character set lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_make_printable)
    launchers.end_with_launcher()
    try:
        code = main()
    except (ValueError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        code = _say(f"{program}: error: {error}", 2)
    except (OSError, FloatingPointError) as error:  # a full disk, a storage error; a run that diverged
        code = _say(f"{program}: failed: {error}", 1)
    except RuntimeError as error:
        reason = _loss(error)
        if reason is None:
            raise
        code = _say(f"{program}: failed: {reason}; {again}", 1)
    except KeyboardInterrupt:
        code = 1
    _leave(code)


def positive(text: str) -> int:
    """An argument that is a whole number above 0, as argparse's `type`. Raises ValueError."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


positive.__name__ = "number above 0"  # in argparse's messages


def printable(text: str) -> str:
    """Text whose control characters, as in the name of a file, do nothing to a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _say(text: str, code: int) -> int:
    if not launchers.reported(printable(text)):
        print(printable(text), file=sys.stderr)  # noqa: T201
    return code


def _leave(code: int) -> NoReturn:
    """Exit; a process of several without Python's own shutdown.

    DistributedDataParallel leaves gloo's threads running after destroy_process_group (torch 2.15), and one that
    still holds a tensor when the interpreter goes down aborts the process (pytorch/pytorch#179291): a finished
    run that failed, now and then. Nothing of ours is left for the shutdown: files and loaders are closed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _loss(error: RuntimeError) -> str | None:
    """What was lost, if an error says so: another process, a worker, a port. Libraries say it in words only."""
    text = str(error).splitlines()[0] if str(error) else ""
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"port {port} of this machine is taken, by another run perhaps: give another one "
            "(accelerate launch --main_process_port, torchrun --master_port)"
        )
    if text.startswith("DataLoader worker"):
        return (
            f"a worker process was lost ({text.rstrip('. ')}): killed for want of memory, or by somebody; fewer workers "
            "take less memory"
        )
    if text.startswith("DataLoader timed out"):
        return f"the workers gave nothing for a long time ({text}): storage hangs, perhaps"
    distributed = sys.modules.get("torch.distributed")
    known = isinstance(error, distributed.DistError) if distributed else False
    if known or "gloo" in text.lower() or "connection closed by peer" in text.lower():
        return f"another process of this run was lost, or did not answer ({text})"
    return None


def human_time(seconds: float) -> str:
    """A time for people: one unit, as in 1.5 h."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises ValueError if it is not installed: only drawing needs it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'fastdcd[plots]'") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
