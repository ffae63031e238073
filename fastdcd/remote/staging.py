"""Copying remote data to a local folder: resumable to the byte, whole or not at all, compared with its checksums.

A file that arrives is hidden (.NAME.partial) and gets its name when all of it is on disk and, where the source has
checksums, equals its own. So a file under its final name is done, and whatever was killed continues where it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fastdcd.progress import ProgressBar
from fastdcd.remote.listing import MANIFEST, Entry, Listing, list_files, manifest_of, read_manifest
from pipelines.files import Lock, explain_full_disk, file_sha256, human_bytes, replace_file

CHUNK = 1 << 23  # bytes of one request
WORKERS = 8  # requests at a time
_READ = 1 << 20  # bytes of a local file that are hashed at a time


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What was staged.

    Attributes:
        path: the local copy of what the address names: the folder, or the file in it.
        files, bytes: of this part.
        fetched: files of it that were not there before.
        checksums: whether every one was compared with a checksum; else only sizes were.
    """

    path: Path
    files: int
    bytes: int
    fetched: int
    checksums: bool

    def __str__(self) -> str:
        compared = (
            "as their checksums say" if self.checksums else "whole; their source has no checksums to compare"
        )
        return f"{self.files:,} files, {human_bytes(self.bytes)}, {self.fetched:,} of them fetched now; {compared}"


def stage(url: str, folder: Path, *, part: int = 0, of: int = 1, workers: int = WORKERS) -> Staged:
    """Copy what lies at an address into `folder`. Killed at any moment, it continues when started again.

    Args:
        url: see `listing.list_files`.
        folder: made if it is not there. Files of other names in it are left alone.
        part, of: only each file whose number modulo `of` is `part`: several machines fill one shared folder.
        workers: requests at a time.

    Raises ValueError if there is nothing, a file is not as it was pushed, another file is in the way, or the disk is
    too small; OSError if the connection is lost.
    """
    listing = list_files(url)
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(
        folder / f".stage-{part}-of-{of}.lock",
        f"{folder}: another process is staging there; wait for it, or choose another folder",
    )
    with lock, explain_full_disk(folder):
        _make_way(folder, listing)
        names = sorted(listing.files)[part::of]
        todo = [name for name in names if not _is_there(folder / name, listing.files[name])]
        _check_space(folder, [(folder / name, listing.files[name]) for name in todo])
        damaged = _fetch(listing, folder, todo, workers)
        if damaged:  # what was there of it before may be to blame
            damaged = _fetch(listing, folder, damaged, workers)
        if damaged:
            raise ValueError(
                f"{listing.address}/{damaged[0]}: not as it was pushed, its SHA-256 differs ({len(damaged)} such file"
                f"{'s' if len(damaged) > 1 else ''}); push it again. The others are in {folder}"
            )
    entries = [listing.files[name] for name in names]
    local = folder / next(iter(listing.files)) / listing.inside if listing.single else folder
    return Staged(
        path=local,
        files=len(names),
        bytes=sum(entry.bytes for entry in entries),
        fetched=len(todo),
        checksums=all(entry.sha256 for entry in entries),
    )


def _make_way(folder: Path, listing: Listing) -> None:
    """Note in the folder what it is to hold, after removing what an earlier staging left of files that differ now.

    Raises ValueError if a file of these names is there that no staging has made, and that differs.
    """
    source = str(listing.address)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.source != source:
        raise ValueError(
            f"{folder}: holds what was staged from {manifest.source}, not from {source}; choose another folder"
        )
    before = manifest.files if manifest else {}
    for name, entry in before.items():
        if listing.files.get(name) != entry:
            _partial(folder / name).unlink(missing_ok=True)
            if not _same(folder / name, listing.files.get(name)):
                (folder / name).unlink(missing_ok=True)
    for name, entry in listing.files.items():
        path = folder / name
        if name not in before and os.path.lexists(path) and not _same(path, entry):
            raise ValueError(f"{path}: another file is there; remove it or choose another folder")
    if manifest is None or before != listing.files:
        with replace_file(folder / MANIFEST) as file:
            file.write(manifest_of(listing.files, source=source).encode())


def _same(path: Path, entry: Entry | None) -> bool:
    """Whether a file certainly is what an entry says."""
    if entry is None or not entry.sha256 or not _is_there(path, entry):
        return False
    return file_sha256(path) == entry.sha256


def _is_there(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _check_space(folder: Path, todo: Sequence[tuple[Path, Entry]]) -> None:
    missing = sum(entry.bytes - _begun(path, entry) for path, entry in todo)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ValueError(
            f"{folder}: {human_bytes(missing)} are to come and {human_bytes(free)} are free; choose another folder"
        )


def _begun(path: Path, entry: Entry) -> int:
    """Bytes of a file that are there from before."""
    partial = _partial(path)
    size = partial.stat().st_size if partial.is_file() else 0
    return size if size <= entry.bytes else 0


class _Arriving:
    """A file that is being written, under its hidden name."""

    def __init__(self, path: Path, entry: Entry, start: int) -> None:
        """Continue at byte `start`."""
        self._path, self._entry = path, entry
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sum = hashlib.sha256()
        self._file: IO[bytes] = _partial(path).open("r+b" if start else "wb")
        while self._file.tell() < start:
            self._sum.update(self._file.read(min(_READ, start - self._file.tell())))

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sum.update(data)

    def finish(self) -> bool:
        """Give the file its name; False if it is not as it should be, and removed."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._entry.sha256 not in ("", self._sum.hexdigest()):
            _partial(self._path).unlink()
            return False
        _partial(self._path).replace(self._path)
        return True

    def close(self) -> None:
        """Leave what is there to be continued."""
        self._file.close()


@dataclass(frozen=True)
class _Span:
    """Bytes `start` to `end` of the file `name`; `first` of what is fetched of it."""

    name: str
    start: int
    end: int
    first: bool


def _spans(listing: Listing, folder: Path, names: Iterable[str]) -> Iterator[_Span]:
    for name in names:
        entry = listing.files[name]
        begin = start = _begun(folder / name, entry)
        while True:
            end = min(start + CHUNK, entry.bytes)
            yield _Span(name, start, end, start == begin)
            if end == entry.bytes:
                break
            start = end


def _fetch(listing: Listing, folder: Path, names: Sequence[str], workers: int) -> list[str]:
    """Fetch files, one after the other, by several requests ahead. Returns the names of those whose checksums differ."""
    damaged: list[str] = []
    arriving: _Arriving | None = None
    total = sum(listing.files[name].bytes for name in names)
    begun = sum(_begun(folder / name, listing.files[name]) for name in names)
    bar = ProgressBar(f"stage {folder.name}", total, "B", initial=begun, shown=bool(names), scaled=True)

    def read(span: _Span) -> bytes:
        return listing.address.read(listing.paths[span.name], span.start, span.end)

    try:
        for span, data in _ahead(read, _spans(listing, folder, names), workers):
            entry = listing.files[span.name]
            if span.first:
                arriving = _Arriving(folder / span.name, entry, span.start)
            assert arriving is not None
            arriving.write(data)
            bar.update(len(data))
            if span.end == entry.bytes and not arriving.finish():
                damaged.append(span.name)
    finally:
        if arriving is not None:
            arriving.close()
        bar.close()
    return damaged


Task = TypeVar("Task")
Answer = TypeVar("Answer")


def _ahead(call: Callable[[Task], Answer], tasks: Iterable[Task], limit: int) -> Iterator[tuple[Task, Answer]]:
    """Tasks and what `call` returns of each, in order; `limit` of them run at a time, in threads."""
    pool = ThreadPoolExecutor(limit)
    waiting: deque[tuple[Task, Future[Answer]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(call, task)))
            if len(waiting) >= limit:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
