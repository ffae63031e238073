"""The files of a source, in a folder or in archives that are read in place: their names, and readers of their bytes.

Layouts are recognised by names alone, so each layout is written once for all of these.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

from pipelines.files import MAX_FILE, open_file, path_of, read_file
from pipelines.image_folder import IMAGE_SUFFIXES, Skipped, check_name, is_hidden, walk_files

SMALL = 1 << 26  # bytes; what tables and labels are never larger than

# How compressed files begin, what they are, and how to undo it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its name there, and where its bytes lie; in a zip, where its header lies."""

    name: str
    archive: Path
    offset: int
    length: int
    size: int  # unpacked


class Files:
    """Files of a source by their names, relative with / between the parts; hidden ones are left out and counted.

    Attributes:
        path: the source, for messages.
        names: of all files.
        folders: of all folders known, with a / at the end; archives know those with files in them.
        skipped: what was left out.
    """

    path: Path
    names: Sequence[str]
    folders: frozenset[str]
    skipped: Skipped

    def reader(self, names: Sequence[str]) -> Callable[[int], bytes]:
        """Reads the file names[row]. Raises OSError or ValueError. Worker processes may share it."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """The bytes of a small file: a table, a list. Raises ValueError that names it."""
        try:
            data = self.reader([name])(0)
        except ValueError as error:
            raise ValueError(f"{self.path}/{name}: {error}") from None
        if len(data) > SMALL:
            raise ValueError(f"{self.path}/{name}: {len(data):,} bytes, expected a small file")
        return data

    def text(self, name: str) -> str:
        """The text of a small file in UTF-8, with or without a BOM."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}/{name}: not text in UTF-8 ({error.reason})") from None

    def images(self) -> list[str]:
        """The names of all images; the others are counted as skipped. Raises ValueError for a name that is refused."""
        images = []
        for name in self.names:
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                check_name(self.path, name)
                images.append(name)
            else:
                self.skipped.add(name)
        return images

    def above(self, *names: str) -> Iterator[tuple[Files, str]]:
        """Files with one of these names in the source or in a folder that holds it, the nearest first."""
        raise NotImplementedError


class FolderFiles(Files):
    """Files of a folder."""

    def __init__(self, root: Path) -> None:
        self.path, self.skipped = root, Skipped()
        names, folders = [], set()
        for name in walk_files(root):
            if is_hidden(name):
                self.skipped.add(name)
            elif name.endswith("/"):
                folders.add(name)
            else:
                names.append(name)
        self.names, self.folders = sorted(names), frozenset(folders)

    def reader(self, names: Sequence[str]) -> Callable[[int], bytes]:
        return _FileReader(self.path, names)

    def above(self, *names: str) -> Iterator[tuple[Files, str]]:
        root = self.path.absolute()
        for folder in (root, *root.parents[:5]):
            for name in names:
                if (folder / name).is_file():
                    yield _OneFile(folder, name), name


class _OneFile(Files):
    """A file beside a source."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.names, self.folders, self.skipped = folder, [name], frozenset(), Skipped()

    def reader(self, names: Sequence[str]) -> Callable[[int], bytes]:
        return _FileReader(self.path, names)


class ArchiveFiles(Files):
    """Files of an archive, or of several, below a folder in it."""

    def __init__(self, path: Path, members: Sequence[Member], inside: str = "") -> None:
        """Raises ValueError if a name is there twice, or there is nothing below `inside`."""
        self.path, self.skipped = path, Skipped()
        self._all = {member.name: member for member in members}
        if len(self._all) < len(members):
            twice = [name for name, count in Counter(each.name for each in members).items() if count > 1]
            if twice := [name for name in twice if not is_hidden(name) and not name.endswith("/")]:
                raise ValueError(f"{path}: {twice[0]} ({len(twice):,} such) is in it twice; pack each file once")
        self._inside = f"{inside}/" if inside else ""
        names, folders = [], set()
        for full in self._all:
            name = full.removeprefix(self._inside)
            if not full.startswith(self._inside) or full.endswith("/"):
                continue
            if is_hidden(name):
                self.skipped.add(name)
                continue
            names.append(name)
            folders |= {f"{parent}/" for parent in PurePosixPath(name).parents if str(parent) != "."}
        if inside and not names:
            raise ValueError(f"{path}: no such folder in the archive")
        self.names, self.folders = sorted(names), frozenset(folders)

    def members(self, names: Sequence[str]) -> list[Member]:
        """Where files lie."""
        return [self._all[self._inside + name] for name in names]

    def reader(self, names: Sequence[str]) -> Callable[[int], bytes]:
        return SpanReader(self.members(names))

    def above(self, *names: str) -> Iterator[tuple[Files, str]]:
        for folder in (PurePosixPath(self._inside), *PurePosixPath(self._inside).parents):
            for name in names:
                full = str(folder / name)
                if full in self._all:
                    yield ArchiveFiles(self.path, [self._all[full]]), full
        archive = next(iter(self._all.values())).archive
        for name in names:
            if (archive.parent / name).is_file():
                yield _OneFile(archive.parent, name), name


class _FileReader:
    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def __call__(self, row: int) -> bytes:
        return read_file(path_of(self._root, self._names[row]))


class SpanReader:
    """Bytes of members of tar and zip files."""

    _HEADER = struct.Struct("<4sHHHHHIIIHH")  # of a zip's member

    def __init__(self, members: Sequence[Member]) -> None:
        self._archives = sorted({member.archive for member in members})
        number = {archive: at for at, archive in enumerate(self._archives)}
        self._archive = np.array([number[member.archive] for member in members], np.int32)
        spans = [(member.offset, member.length, member.size) for member in members]
        self._spans = np.array(spans, np.int64).reshape(-1, 3)
        self._zips = [is_zip(archive) for archive in self._archives]
        self._files: dict[int, IO[bytes]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # every process opens its own

    def __call__(self, row: int) -> bytes:
        offset, length, size = self._spans[row].tolist()
        if max(length, size) > MAX_FILE:
            raise ValueError(f"{max(length, size):,} bytes, expected at most {MAX_FILE:,}")
        number = int(self._archive[row])
        return (
            self._unzip(number, offset, length, size)
            if self._zips[number]
            else self._pread(number, offset, length)
        )

    def _pread(self, number: int, offset: int, length: int) -> bytes:
        if number not in self._files:
            self._files[number] = open_file(self._archives[number])
        data = os.pread(self._files[number].fileno(), length, offset)
        if len(data) != length:
            raise ValueError(f"{self._archives[number]} ends before its member does")
        return data

    def _unzip(self, number: int, offset: int, length: int, size: int) -> bytes:
        header = self._HEADER.unpack(self._pread(number, offset, self._HEADER.size))
        data = self._pread(number, offset + self._HEADER.size + header[-2] + header[-1], length)
        if header[3] != zipfile.ZIP_DEFLATED:
            return data
        try:
            stream = zlib.decompressobj(-zlib.MAX_WBITS)
            data = stream.decompress(data, size + 1)  # more than that: it lies about its size
        except zlib.error as error:
            raise ValueError(f"damaged in its zip file: {error}") from None
        if len(data) != size:
            raise ValueError("damaged in its zip file: of another size than it says")
        return data


def compression(path: Path) -> tuple[str, str] | None:
    """How a file is compressed, by its first bytes, and the program that undoes it."""
    with open_file(path) as file:
        start = file.read(8)
    return next((found for magic, found in _COMPRESSED.items() if start.startswith(magic)), None)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip."""
    try:
        with open_file(path) as file:
            return zipfile.is_zipfile(file)
    except ValueError:
        return False


def is_tar(path: Path) -> bool:
    """Whether a file is a tar that is not compressed."""
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except (tarfile.TarError, ValueError):
        return False


@lru_cache(maxsize=2)  # one archive may hold several sets
def list_archive(path: Path) -> list[Member]:
    """The files of a tar or zip. Members of a tar in a tar appear in a folder of its name (ImageNet's training set).

    Raises ValueError if it is damaged, encrypted or compressed as a whole, or if an image in it is a link.
    """
    if is_zip(path):
        return list(_zip_members(path))
    if packed := compression(path):
        raise ValueError(
            f"{path}: compressed ({packed[0]}): no image in it can be found without reading all before it; first: "
            f"{packed[1]} -k {path}"
        )
    with open_file(path) as file:
        members = _tar_members(path, file, 0, "")
        return list(tqdm(members, f"list {path.name}", disable=None, unit=" files", leave=False))


def _zip_members(path: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, UnicodeError) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); copy it again") from None
    for info in infos:
        name = _zip_name(info)
        if info.is_dir() or is_hidden(name):
            yield Member(name, path, 0, 0, 0)
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: {name} is encrypted or of a rare compression; zip it again")
        if info.external_attr >> 28 == 0o12:
            raise ValueError(f"{path}: {name} is a link; zip the files themselves")
        yield Member(name, path, info.header_offset, info.compress_size, info.file_size)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A name in UTF-8: macOS writes it so, without saying so."""
    if not info.flag_bits & 0x800:
        try:
            return info.filename.encode("cp437").decode()
        except UnicodeError:
            pass
    return info.filename


def _tar_members(path: Path, file: IO[bytes], start: int, prefix: str) -> Iterator[Member]:
    file.seek(start)
    nested = []
    try:
        archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every one it has seen
            name = prefix + info.name.removeprefix("./")
            is_image = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
            if is_hidden(name) and info.isreg():
                yield Member(name, path, 0, 0, 0)
            elif PurePosixPath(name).suffix.lower() == ".tar" and info.isreg():
                nested.append((info.offset_data, f"{name[:-4]}/"))
            elif info.isreg() and not info.issparse():
                yield Member(name, path, info.offset_data, info.size, info.size)
            elif is_image:
                kind = "a link" if info.issym() or info.islnk() else "no plain file"
                raise _NotPlain(f"{path}: {name} is {kind}; make the tar with --dereference --hard-dereference")
    except _NotPlain:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); copy it again") from None
    for start, folder in nested:
        yield from _tar_members(path, file, start, folder)


class _NotPlain(ValueError):
    pass


def prefixed(members: Sequence[Member]) -> list[Member]:
    """Members of several tars, each in a folder of its tar's name."""
    return [replace(member, name=f"{member.archive.stem}/{member.name}") for member in members]
