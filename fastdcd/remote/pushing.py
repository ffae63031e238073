"""Copying a local folder to an object store, with a manifest of sizes and SHA-256 that staging compares."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastdcd.progress import ProgressBar
from fastdcd.remote.address import Address, explained, open_address
from fastdcd.remote.listing import MANIFEST, Entry, fetch_manifest, manifest_of
from pipelines.files import file_sha256, human_bytes
from pipelines.image_folder import check_name, walk_files

WORKERS = 4  # files at a time
NOTE_SECONDS = 10.0  # between manifests of an unfinished push: what a kill can cost


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was pushed: all files of the folder, and how many of them were not there before."""

    files: int
    bytes: int
    sent: int

    def __str__(self) -> str:
        return f"{self.files:,} files, {human_bytes(self.bytes)}, {self.sent:,} of them sent now"


def push(folder: Path, url: str, *, workers: int = WORKERS) -> Pushed:
    """Copy all files of `folder` to an address. Killed at any moment, it continues when started again.

    Raises ValueError if the folder is none, is being written, or changes meanwhile, or the address cannot be written
    to; OSError if the connection is lost.
    """
    names = list(_files(folder))
    address = open_address(url)
    if not address.scheme.writes:
        raise ValueError(
            f"{address}: cannot be pushed to; use {address.scheme.instead}, or push to s3:// or gs://"
        )
    before = fetch_manifest(address)
    there = before.files if before else {}
    sizes = _sizes(address)
    done: dict[str, Entry] = {}
    sent, noted = 0, time.monotonic()
    total = sum((folder / name).stat().st_size for name in names)
    bar = ProgressBar(f"push {folder.name}", total, "B", scaled=True)
    pool = ThreadPoolExecutor(workers)
    running: set[Future[tuple[int, bool]]] = set()
    failed = threading.Event()

    def one(name: str) -> tuple[int, bool]:
        """Send a file if it is not there, and note it as done. Returns its bytes, and whether it was sent."""
        if failed.is_set():
            return 0, False
        try:
            entry, new = send(name)
        except BaseException:
            failed.set()
            raise
        done[name] = entry
        return entry.bytes, new

    def send(name: str) -> tuple[Entry, bool]:
        stamp = _stamp(folder / name)
        entry = Entry(bytes=stamp[0], sha256=file_sha256(folder / name))
        known = there.get(name) == entry and sizes.get(address.below(name)) == entry.bytes
        if not known:
            with explained(f"{address}/{name}", address.scheme):
                address.fs.put_file(str(folder / name), address.below(name))
            if _stamp(folder / name) != stamp:
                raise ValueError(f"{folder / name}: changes while it is pushed; wait until nothing writes there")
        return entry, not known

    if before is None or before.complete:
        _write(address, _kept(there, names), complete=False)
    try:
        todo = iter(names)
        while True:
            while len(running) < 2 * workers and (name := next(todo, None)) is not None:
                running.add(pool.submit(one, name))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                size, new = future.result()
                sent += new
                bar.update(size)
            if time.monotonic() - noted > NOTE_SECONDS:
                _write(address, {**_kept(there, names), **done}, complete=False)
                noted = time.monotonic()
    except BaseException:
        failed.set()
        pool.shutdown(wait=True, cancel_futures=True)  # what is under way is noted too
        with suppress(Exception):  # the connection may be what failed
            _write(address, {**_kept(there, names), **done}, complete=False)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    _check(address, done)
    _write(address, done, complete=True)
    return Pushed(files=len(done), bytes=total, sent=sent)


def _kept(there: dict[str, Entry], names: list[str]) -> dict[str, Entry]:
    """What an earlier push has noted of files that are still to come: compared with them when their turn comes."""
    return {name: there[name] for name in names if name in there}


def _files(folder: Path) -> Iterator[str]:
    """Relative names of what is pushed. Raises ValueError for what is no folder, is empty, or is being written."""
    if not folder.is_dir():
        what = "a file, expected a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}")
    found = False
    for name in sorted(walk_files(folder)):
        last = name.rpartition("/")[2]
        if name.endswith("/") or last == MANIFEST or last.endswith((".lock", ".tmp")):
            continue
        if last.startswith(".") and last.endswith((".partial", ".journal")):
            raise ValueError(f"{folder / name}: is of work that is not finished; finish it first")
        check_name(folder, name)
        found = True
        yield name
    if not found:
        raise ValueError(f"{folder}: no files in it")


def _stamp(path: Path) -> tuple[int, int]:
    """Another one after a file was written to."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _sizes(address: Address) -> dict[str, int]:
    """The objects below an address and their sizes."""
    with explained(address, address.scheme):
        address.fs.invalidate_cache()
        try:
            return {path: about["size"] for path, about in address.fs.find(address.path, detail=True).items()}
        except FileNotFoundError:
            return {}


def _check(address: Address, files: dict[str, Entry]) -> None:
    """Raises OSError if an object is not there in its size."""
    sizes = _sizes(address)
    if wrong := [name for name, entry in files.items() if sizes.get(address.below(name)) != entry.bytes]:
        raise OSError(
            f"{address}/{wrong[0]}: not there as it was sent ({len(wrong)} such); run the same command again"
        )


def _write(address: Address, files: dict[str, Entry], *, complete: bool) -> None:
    with explained(address, address.scheme):
        address.fs.pipe_file(address.below(MANIFEST), manifest_of(files, complete=complete).encode())
