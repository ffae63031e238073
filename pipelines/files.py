"""Writing files so that a crash never leaves half of one under its final name, and mapping large ones to read."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


@contextmanager
def explain_full_disk(place: Path) -> Iterator[None]:
    """Say of a full disk, in an OSError, what to do: for work that goes on where it was when it is started again."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{place}: no space left ({os.strerror(error.errno)}); what is done is kept: free some space "
            "and run the same command again"
        ) from None


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with replace_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def map_file(path: Path) -> mmap.mmap:
    """A file mapped to be read. Its pages belong to the page cache: the kernel takes them back when memory is short.

    Raises ValueError for an empty file.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file; copy or convert it again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def memory_bytes() -> int:
    """What this process may keep in memory, of its own and of the page cache: the machine's memory, or the limit of
    one of its cgroups (versions 1 and 2), if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    files = {"memory": "memory/{}/memory.limit_in_bytes", "": "{}/memory.max"}  # by controllers: version 1, 2
    own = Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers in files:
            # a limit may be an ancestor's, and in a container the root is all there is
            for group in (Path(name), *Path(name).parents):
                with suppress(OSError, ValueError):  # not there; "max"
                    limits.append(
                        int(Path("/sys/fs/cgroup", files[controllers].format(str(group)[1:])).read_text())
                    )
    return min(limits)


def will_need(file: mmap.mmap, start: int, length: int) -> None:
    """Let the kernel read a part of a mapped file in the background: a microsecond, and no waiting for storage."""
    page = start - start % mmap.PAGESIZE
    file.madvise(mmap.MADV_WILLNEED, page, start + length - page)
