"""The frame of every command-line program: a user's mistake is one line and exit code 2, no traceback."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with what it returns: 0 done, 1 failed, 2 bad usage or input.

    ValueError and what the file system refuses are the user's to mend: their message, one line each, goes
    to stderr. Anything else is our bug and keeps its traceback.
    """
    program = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # names that the terminal's character set lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    try:
        code = main()
    except (ValueError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
        code = 2
    except (OSError, FloatingPointError) as error:  # a full disk, a storage error; a run that diverged
        print(f"{program}: failed: {error}", file=sys.stderr)  # noqa: T201
        code = 1
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        print(  # noqa: T201
            f"{program}: failed: another process of this run was lost, or did not answer ({str(error).splitlines()[0]}); "
            "the last checkpoint is whole: go on with --resume auto",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        code = 1
    _leave(code)


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


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether communication failed. Gloo says so in words only."""
    distributed = sys.modules.get("torch.distributed")
    known = isinstance(error, distributed.DistError) if distributed else False
    return known or "gloo" in str(error).lower() or "connection closed by peer" in str(error).lower()


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
