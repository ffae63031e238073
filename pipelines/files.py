"""Writing files so that a crash never leaves half of one under its final name, and mapping large ones to read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, ClassVar

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: ~ is the home folder, and $NAME a variable of the environment, if it is set.

    Raises ValueError where there is no such home folder, and for what cannot be a path.
    """
    if "\0" in str(text):
        raise ValueError(f"{str(text)!r} cannot be a path: it holds a null character")
    try:
        return Path(os.path.expandvars(text)).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no such home folder; write the whole path") from None


def expand_braces(text: str) -> list[str]:
    """train-{0000..0003}.tar and {a,b}.tar, as shells and the webdataset package expand them.

    Raises ValueError for a range that is none.
    """
    part = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if part is None:
        return [text]
    if part[3] is None:
        first, last = int(part[1]), int(part[2])
        if not 0 <= last - first < 1_000_000:
            raise ValueError(f"{text}: {part[0]} is no range")
        choices = [f"{number:0{len(part[1])}d}" for number in range(first, last + 1)]
    else:
        choices = part[3].split(",")
    return [
        each for choice in choices for each in expand_braces(text[: part.start()] + choice + text[part.end() :])
    ]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    Raises OSError with the path in it if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # write() names no file
        raise


class Lock:
    """The right to write to a place, for this process alone, until it is closed or the process ends, however.

    A record lock of the operating system on a file that is made for it and removed again. It is the process's own:
    workers that are forked meanwhile do not keep it alive. It works between machines on a shared file system that
    has locks; where there are none, a warning says so.
    """

    _held: ClassVar[set[tuple[int, int]]] = set()  # by this process: it could take a record lock twice

    def __init__(self, path: Path, refusal: str) -> None:
        """Take the lock on the file `path`, whose folder exists. An existing file is neither read nor changed.

        Raises ValueError with `refusal` if another process, or another part of this one, has it; or if `path` is no
        plain file.
        """
        self._path = path
        while True:
            with suppress(FileNotFoundError):
                if _identity(path.lstat()) in Lock._held:  # not even opened: closing it would release the lock
                    raise ValueError(refusal)
            self._file = self._open()
            self._key = _identity(os.fstat(self._file))
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(self._file)
                    raise ValueError(refusal) from None
                _log.warning("%s: this file system has no locks; nothing keeps others from writing here", path)
            with suppress(FileNotFoundError):
                if _identity(path.lstat()) == self._key:
                    break
            os.close(self._file)  # whoever had it has removed it meanwhile
        Lock._held.add(self._key)

    def _open(self) -> int:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise
        else:
            if stat.S_ISREG(os.fstat(file).st_mode):
                return file
            os.close(file)
        raise ValueError(f"{self._path}: is to be a lock and is a link or no plain file; remove it")

    def close(self) -> None:
        """Let go of it. May be called twice."""
        if self._key in Lock._held:
            with suppress(OSError):  # a folder that was removed, or made unwritable: the lock goes all the same
                self._path.unlink()
            Lock._held.discard(self._key)
            os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextmanager
def explain_full_disk(place: Path, again: str = "run the same command again") -> Iterator[None]:
    """Explain a full disk and what to do in an OSError: for work that continues when started again."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            f"{place}: no space left ({os.strerror(error.errno)}); what is done is kept: free some space "
            f"and {again}"
        ) from None


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with replace_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


MAX_FILE = 1 << 29  # bytes; an encoded image is never that large

# Errors that say something of one file, not of the storage.
_OF_A_FILE = frozenset([errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EACCES])
_OF_A_FILE |= {errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL, errno.ENODEV}


def path_of(root: Path, name: str) -> bytes:
    """The path of `name`, relative with / between its parts, below `root`: names are UTF-8 in any locale."""
    return os.fsencode(root) + b"/" + name.encode()


def open_file(path: Path | bytes) -> IO[bytes]:
    """Open a regular file to read. A FIFO, device or socket is refused and never waited for.

    Raises ValueError with a reason that does not name the file, OSError if the storage fails.
    """
    descriptor, _ = _open_regular(path)
    return os.fdopen(descriptor, "rb")


def _open_regular(path: Path | bytes) -> tuple[int, int]:
    """Descriptor and size of a regular file. Raises as open_file does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _OF_A_FILE:
            raise
        reason = "a socket or device" if error.errno == errno.ENXIO else (error.strerror or "").lower()
        raise ValueError(reason) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, found.st_size
    os.close(descriptor)
    raise ValueError(f"{_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, expected a file")


_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}


def read_file(path: Path | bytes, limit: int = MAX_FILE) -> bytes:
    """The bytes of a regular file of at most `limit` bytes: see open_file."""
    descriptor, size = _open_regular(path)  # three system calls: loaders do this for every image
    try:
        if size > limit:
            raise ValueError(f"{size:,} bytes, expected at most {limit:,}")
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more  # a read gives 2 GiB at most
        return data
    finally:
        os.close(descriptor)


def read_into(path: Path | bytes, memory: memoryview) -> int | None:
    """Read a regular file into the beginning of `memory`; its size, or None if it does not fit. Raises as open_file does."""
    descriptor, size = _open_regular(path)
    try:
        if size > len(memory):
            return None
        done = 0
        while done < size and (count := os.readv(descriptor, [memory[done:size]])):
            done += count
        return done
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int = 1 << 26) -> str:
    """The text of a file in UTF-8, with or without a BOM. Raises ValueError that names the file."""
    try:
        return read_file(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def map_file(path: Path) -> mmap.mmap:
    """A file mapped to be read. Its pages belong to the page cache: the kernel takes them back when memory is short.

    Raises ValueError for an empty file.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file; copy or convert it again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


SCARCE = 0.7  # of the memory: a larger file will not stay in it beside the processes


def fits_in_memory(size: int) -> bool:
    """Whether the page cache will keep a file of `size` bytes once it was read."""
    return size <= SCARCE * memory_bytes()


def memory_bytes() -> int:
    """What this process may keep in memory, of its own and of the page cache: the machine's memory, or the limit of
    one of its cgroups (versions 1 and 2), if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    files = {"memory": "memory/{}/memory.limit_in_bytes", "": "{}/memory.max"}  # by controllers: version 1, 2
    own = Path("/proc/self/cgroup")
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers in files:
            # a limit may be an ancestor's, and in a container the root is all there is
            for group in (Path(name), *Path(name).parents):
                with suppress(OSError, ValueError):  # not there; "max"
                    limits.append(
                        int(
                            Path("/sys/fs/cgroup", files[controllers].format(str(group)[1:])).read_text(
                                encoding="utf-8"
                            )
                        )
                    )
    return min(limits)


def will_need(file: mmap.mmap, start: int, length: int) -> None:
    """Let the kernel read a part of a mapped file in the background: a microsecond, and no waiting for storage."""
    page = start - start % mmap.PAGESIZE
    file.madvise(mmap.MADV_WILLNEED, page, start + length - page)


def human_bytes(count: float) -> str:
    """A number of bytes for people: three digits and a decimal unit, as in 1.28 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
