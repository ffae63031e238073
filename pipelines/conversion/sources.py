"""Where a conversion takes its images from: a list of samples, each read by its position.

    class folders                SRC/class/**/image
    tar or zip of class folders  read in place, never unpacked; also ImageNet's tar of one tar a class
    WebDataset shards            a folder of tars, or one tar, whose samples have an image and a .cls
    CIFAR-10, CIFAR-100          cifar-100-python.tar.gz/train, as torchvision downloads them

A path may go on inside an archive: data.zip/imagenet/train. Whatever the kind, the same images in the same
classes give the same samples in the same order. Reading is stateless (pread), so worker processes share it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.conversion.encode import Source
from pipelines.files import path_of, read_file
from pipelines.image_folder import IMAGE_SUFFIXES, SETS, list_image_folder
from pipelines.images import Pixels
from pipelines.index import DatasetIndex

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All samples of a source; `sources[position]` reads one.

    Attributes:
        classes: class names; a label is a position here.
        names: one relative path a sample, with / between its parts.
        labels: int64 [N].
        read: encoded bytes, or pixels uint8 [H, W, 3], of a row; raises OSError or ValueError.
        rows: int64 [N], the row that `read` is asked for, of each position.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: NDArray[np.int64]
    read: Callable[[int], bytes | Pixels]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Source:
        """Read a sample. Raises OSError or ValueError if that fails."""
        data = self.read(int(self.rows[position]))
        return Source(name=self.names[position], label=int(self.labels[position]), data=data)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over classes, labels and names."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\n".join(self.classes).encode() + b"\0" + self.labels.astype("<i8").tobytes())
        state.update("\n".join(self.names).encode())
        return state.hexdigest()

    def select(self, positions: NDArray[np.int64]) -> Sources:
        """Some of the samples, in this order."""
        names = [self.names[position] for position in positions.tolist()]
        return replace(self, names=names, labels=self.labels[positions], rows=self.rows[positions])

    def limit(self, count: int) -> Sources:
        """At most `count` samples, spread evenly, so that classes stay balanced."""
        if count >= len(self):
            return self
        return self.select(np.arange(count, dtype=np.int64) * len(self) // count)

    def keep(self, patterns: Sequence[str]) -> Sources:
        """Only the classes whose names match a shell pattern. Raises ValueError if none does."""
        kept = [name for name in self.classes if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
        if not kept:
            raise ValueError(f"--keep: no class matches {' '.join(patterns)}; the first is {self.classes[0]!r}")
        label_of = np.array([kept.index(name) if name in kept else -1 for name in self.classes], np.int64)
        part = self.select(np.flatnonzero(label_of[self.labels] >= 0))
        return replace(part, classes=tuple(kept), labels=label_of[part.labels])


def open_sources(path: Path, classes: Sequence[str] | None = None) -> Sources:
    """List the samples of `path`, whatever its kind.

    Args:
        path: see above.
        classes: class names in label order. None: the source's own, or sorted folder names.

    Raises ValueError if there is nothing of the kind, a name leads outside the source, a link stands where an
    image should, or a class is not in `classes`.
    """
    container, inside = _split(path)
    if container.is_dir():
        sources = _open_folder(container, classes)
    elif zipfile.is_zipfile(container):
        sources = _class_folders(path, inside, _list_zip(container), classes, _ZipReader)
    elif tarfile.is_tarfile(container):
        sources = _open_tar(path, container, inside, classes)
    else:
        raise ValueError(f"{path}: neither a folder nor a tar or zip file")
    if not len(sources):
        raise ValueError(f"{path}: no samples in it")
    for name in sources.names:
        _check_name(path, name)
    return sources


def _split(path: Path) -> tuple[Path, str]:
    """A path that exists, and the rest of `path` inside it."""
    container, inside = path, ""
    while not container.exists() and container != container.parent:
        container, inside = container.parent, f"{container.name}/{inside}".rstrip("/")
        if container.is_file():
            return container, inside
    if inside or not container.exists():
        raise ValueError(f"{path}: no such file or folder")
    return container, ""


def _check_name(path: Path, name: str) -> None:
    """Names end up in messages, indexes and archives: none may lead outside."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name.isprintable():
        raise ValueError(f"{path}: the name {name!r} leads outside or has control characters; rename it")


# Class folders, in a folder or in an archive


def _open_folder(root: Path, classes: Sequence[str] | None) -> Sources:
    tars = sorted(root.glob("*.tar"))
    if tars and not any(entry.is_dir() and _has_images(entry) for entry in root.iterdir()):
        index = root / "index"
        if classes is None and (index / "index.json").is_file():
            classes = DatasetIndex.load(index).classes
        return _web_dataset(root, tars, [member for tar in tars for member in _list_tar(tar)], classes)
    class_names, names = list_image_folder(root, classes)
    return _of_class_folders(class_names, names, _FileReader(root, names))


def _has_images(folder: Path) -> bool:
    return any(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES or entry.is_dir() for entry in os.scandir(folder))


def _of_class_folders(
    classes: Sequence[str], names: Sequence[str], read: Callable[[int], bytes | Pixels]
) -> Sources:
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name.partition("/")[0]] for name in names], np.int64)
    return Sources(classes=tuple(classes), names=names, labels=labels, read=read, rows=np.arange(len(names)))


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its name there, and where its bytes lie."""

    name: str
    archive: Path
    offset: int
    length: int


def _class_folders(
    path: Path,
    inside: str,
    members: Iterable[_Member],
    classes: Sequence[str] | None,
    reader: Callable[[list[_Member]], Callable[[int], bytes]],
) -> Sources:
    """The images of an archive below `inside`, or below the folder that holds all class folders."""
    images = []
    for member in members:
        name = member.name.removeprefix("./")
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith("."):
            _check_name(path, name)
            images.append(replace(member, name=name))
    if inside:
        images = [each for each in images if each.name.startswith(f"{inside}/")]
    folders = {each.name.rpartition("/")[0] for each in images}
    if not images or "" in folders:
        raise ValueError(f"{path}: no class folders of images in it; expected class/image.jpg")
    root = inside or _common_folder(folders)
    start = len(root) + 1 if root else 0
    images = [replace(each, name=each.name[start:]) for each in images]
    images.sort(key=lambda each: (each.name.partition("/")[0], each.name))
    found = sorted({each.name.partition("/")[0] for each in images})
    if any("/" not in each.name for each in images):
        raise ValueError(f"{path}: images outside of class folders in it; expected class/image.jpg")
    if SETS.issuperset(found):
        choices = " or ".join(f"{path}/{f'{root}/{name}'.lstrip('/')}" for name in found)
        raise ValueError(f"{path}: holds {' and '.join(found)}, not classes; choose: {choices}")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise ValueError(
            f"{path}: class folder {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes"
        )
    return _of_class_folders(tuple(classes or found), [each.name for each in images], reader(images))


def _common_folder(folders: Iterable[str]) -> str:
    """The deepest folder that holds every class folder; with one folder only, its parent."""
    paths = list(folders)
    common = os.path.commonpath(paths)
    return common.rpartition("/")[0] if paths == [common] else common


class _FileReader:
    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def __call__(self, row: int) -> bytes:
        return read_file(path_of(self._root, self._names[row]))


class _SpanReader:
    """Bytes of members that stand in their archive as they are."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self._archives = sorted({member.archive for member in members})
        number = {archive: at for at, archive in enumerate(self._archives)}
        self._archive = np.array([number[member.archive] for member in members], np.int32)
        self._spans = np.array([(member.offset, member.length) for member in members], np.int64).reshape(-1, 2)
        self._files: dict[int, IO[bytes]] = {}

    def __call__(self, row: int) -> bytes:
        offset, length = self._spans[row].tolist()
        return self._pread(row, offset, length)

    def _pread(self, row: int, offset: int, length: int) -> bytes:
        number = int(self._archive[row])
        if number not in self._files:
            self._files[number] = self._archives[number].open("rb")
        data = os.pread(self._files[number].fileno(), length, offset)
        if len(data) != length:
            raise ValueError(f"{self._archives[number]} ends before its member does")
        return data


class _ZipReader(_SpanReader):
    """Bytes of zip members, stored or deflated; a span begins at the local header."""

    _HEADER = struct.Struct("<4sHHHHHIIIHH")

    def __call__(self, row: int) -> bytes:
        offset, length = self._spans[row].tolist()
        header = self._HEADER.unpack(self._pread(row, offset, self._HEADER.size))
        start = offset + self._HEADER.size + header[-2] + header[-1]
        data = self._pread(row, start, length)
        if header[3] == zipfile.ZIP_DEFLATED:
            try:
                return zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise ValueError(f"damaged in its zip file: {error}") from None
        return data


def _list_zip(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path}: {info.filename} is encrypted or of a rare compression; zip it again")
            if info.external_attr >> 28 == 0o12:
                raise ValueError(f"{path}: {info.filename} is a link; zip the files themselves")
            yield _Member(info.filename, path, info.header_offset, info.compress_size)


def _list_tar(path: Path) -> Iterator[_Member]:
    """Members of a tar; those of a tar inside it appear in a folder of that tar's name (ImageNet's train set)."""
    if _starts(path, _GZIP):
        raise ValueError(f"{path}: compressed, so that no image can be found without reading all; gunzip it first")
    with path.open("rb") as file:
        yield from tqdm(
            _tar_members(path, file, 0, ""), f"list {path.name}", disable=None, unit=" files", leave=False
        )


def _starts(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _tar_members(path: Path, file: IO[bytes], start: int, prefix: str) -> Iterator[_Member]:
    file.seek(start)
    nested = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every one it has seen
                name = prefix + info.name.removeprefix("./")
                if PurePosixPath(name).suffix.lower() == ".tar" and info.isreg():
                    nested.append((info.offset_data, f"{name[:-4]}/"))
                elif info.isreg():
                    yield _Member(name, path, info.offset_data, info.size)
                elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    raise ValueError(
                        f"{path}: {name} is a link; make the tar with --dereference --hard-dereference"
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); copy it again") from None
    for start, folder in nested:
        yield from _tar_members(path, file, start, folder)


def _open_tar(path: Path, container: Path, inside: str, classes: Sequence[str] | None) -> Sources:
    if _starts(container, _GZIP):
        return _open_cifar(path, container, inside, classes)
    members = list(_list_tar(container))
    if any(member.name.endswith(".cls") for member in members):
        return _web_dataset(path, [container], members, classes)
    return _class_folders(path, inside, members, classes, _SpanReader)


# WebDataset


def _web_dataset(
    path: Path, tars: Sequence[Path], members: Iterable[_Member], classes: Sequence[str] | None
) -> Sources:
    """Samples of WebDataset tars in the order they stand there: an image and .cls each, sometimes a .json."""
    samples: dict[tuple[Path, str], dict[str, _Member]] = {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        key, _, extension = file.partition(".")
        sample = samples.setdefault((member.archive, f"{folder}/{key}".lstrip("/")), {})
        sample["image" if f".{extension.lower()}" in IMAGE_SUFFIXES else extension] = member
    images, labels, names = [], [], []
    for (tar, key), sample in samples.items():
        if "image" not in sample or "cls" not in sample:
            raise ValueError(f"{tar}: sample {key} has {' '.join(sample)}; expected an image and .cls")
        images.append(sample["image"])
        labels.append(sample["cls"])
        names.append(sample.get("json"))
    read_label = _SpanReader(labels)
    try:
        numbers = np.array([int(read_label(row)) for row in range(len(labels))], np.int64)
    except ValueError as error:
        raise ValueError(f"{path}: a .cls is not a number ({error})") from None
    top = int(numbers.max(initial=-1)) + 1
    if (classes is not None and top > len(classes)) or numbers.min(initial=0) < 0:
        raise ValueError(
            f"{path}: labels go from {numbers.min()} to {top - 1}, expected 0 to {len(classes or ()) - 1}"
        )
    read_about = _SpanReader([name for name in names if name])
    abouts = iter(range(len(names)))
    return Sources(
        classes=tuple(classes or map(str, range(top))),
        names=[
            _name_of(read_about(next(abouts)), image) if about else image.name
            for about, image in zip(names, images, strict=True)
        ],
        labels=numbers,
        read=_SpanReader(images),
        rows=np.arange(len(images)),
    )


def _name_of(about: bytes, image: _Member) -> str:
    """The name that our own shards keep in their .json."""
    try:
        value = json.loads(about)
    except ValueError:
        return image.name
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else image.name


# CIFAR


class _CifarUnpickler(pickle.Unpickler):
    """CIFAR's files are pickles of dictionaries, lists, byte strings and one uint8 array: that and no more."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


class _PixelReader:
    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images

    def __call__(self, row: int) -> Pixels:
        return self._images[row]


def _open_cifar(path: Path, archive: Path, inside: str, classes: Sequence[str] | None) -> Sources:
    if inside not in ("train", "test"):
        raise ValueError(
            f"{path}: a compressed tar can only be CIFAR-10 or CIFAR-100 ({archive}/train or {archive}/test); "
            "gunzip others first"
        )
    parts: dict[str, Mapping[bytes, Any]] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for info in tar:
            name = PurePosixPath(info.name).name
            wanted = "meta" in name or name.startswith((inside, f"{inside}_batch", "data_batch"))
            if info.isreg() and wanted and not name.endswith((".html", ".txt")):
                file = tar.extractfile(info)
                assert file is not None
                try:
                    parts[name] = _CifarUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
                except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
                    raise ValueError(f"{archive}: {info.name} is not one of CIFAR's files: {error}") from None
    meta = parts.pop("meta", None) or parts.pop("batches.meta", None)
    if inside == "test":
        parts = {name: part for name, part in parts.items() if name.startswith("test")}
    if meta is None or not parts:
        raise ValueError(
            f"{path}: not CIFAR's Python archive; expected cifar-100-python.tar.gz or cifar-10-python"
        )
    try:
        own = [name.decode() for name in meta.get(b"fine_label_names") or meta[b"label_names"]]
        batches = [parts[name] for name in sorted(parts)]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch.get(b"fine_labels") or batch[b"labels"] for batch in batches])
        files = [name.decode() for batch in batches for name in batch[b"filenames"]]
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its files are not those of CIFAR's Python archive ({error!r})") from None
    unknown = sorted(set(own) - set(classes or own))
    if unknown:
        raise ValueError(f"{path}: class {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes")
    names = [f"{own[label]}/{file}" for label, file in zip(labels, files, strict=True)]
    order = sorted(range(len(names)), key=lambda row: (own[labels[row]], names[row]))
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    sources = _of_class_folders(tuple(classes or sorted(own)), [names[row] for row in order], _PixelReader(images))
    return replace(sources, rows=np.array(order, np.int64))
