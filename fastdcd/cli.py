"""The frame of every command-line program: a user's mistake is one line and exit code 2, no traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with what it returns: 0 done, 1 failed, 2 bad usage or input.

    ValueError and what the file system refuses are the user's to mend: their message, one line each, goes
    to stderr. Anything else is our bug and keeps its traceback.
    """
    program = Path(sys.argv[0]).name
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    try:
        code = main()
    except (ValueError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
        code = 2
    except OSError as error:  # a full disk, a storage error
        print(f"{program}: failed: {error}", file=sys.stderr)  # noqa: T201
        code = 1
    except KeyboardInterrupt:
        code = 1
    sys.exit(code)
