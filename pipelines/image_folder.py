"""Class folders of images (torchvision's ImageFolder layout): listing, indexing, class names."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from tqdm import tqdm

from pipelines.files import open_file, path_of, read_text
from pipelines.images.decode import image_size
from pipelines.index import DatasetIndex

_log = logging.getLogger(__name__)

# What torchvision's ImageFolder accepts (torchvision.datasets.folder.IMG_EXTENSIONS).
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])


# Folders that hold sets of samples rather than classes: a folder or archive of these is several datasets.
SETS = frozenset(["train", "training", "val", "valid", "validation", "test"])


class ClassList(tuple[str, ...]):
    """Class names from a file: the first word of each line, where the data set does not say otherwise.

    Attributes:
        lines: the whole lines.
    """

    lines: tuple[str, ...]

    def named(self, found: Iterable[str]) -> tuple[str, ...]:
        """The names, for a data set with classes `found`: a line that is one of these is that class."""
        names = set(found)
        whole = any(line in names and line not in self for line in self.lines)  # names of several words
        return tuple(
            line if line in names or (whole and word not in names) else word
            for line, word in zip(self.lines, self, strict=True)
        )


def read_classes(path: Path) -> ClassList:
    """Class names from a file of one name a line, in label order; words after the name are a comment.

    Raises ValueError for a file without names, with a name twice, or that is not text.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: no class names in it; expected one a line, in label order")
    if twice := [line for line, count in Counter(lines).items() if count > 1]:
        raise ValueError(f"{path}: the class name {twice[0]!r} appears twice")
    classes = ClassList(line.split()[0] for line in lines)
    classes.lines = tuple(lines)
    return classes


def name_classes(where: object, found: Sequence[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes of a data set that has `found`, in label order: those of the list `classes`, or `found` itself.

    Raises ValueError if the list lacks one that was found, or has a name twice.
    """
    if classes is None:
        return tuple(found)
    names = classes.named(found) if isinstance(classes, ClassList) else tuple(classes)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(
            f"{where}: class folder {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: the list of classes has {twice[0]!r} twice")
    return names


def same_classes(classes: Sequence[str] | None, names: tuple[str, ...]) -> bool:
    """Whether the list `classes`, if there is one, has just these `names`, in this order."""
    return not classes or names == (classes.named(names) if isinstance(classes, ClassList) else tuple(classes))


def check_name(where: object, name: str) -> None:
    """Raises ValueError for a name that leads outside, or that lists and messages cannot hold."""
    parts = name.split("/")
    if parts[0] == "" or ".." in parts or "\\" in name:
        raise ValueError(f"{where}: the name {name!r} leads outside; rename it")
    if not name.isprintable():
        for character in name:
            kind = unicodedata.category(character)
            if kind == "Cs":
                raise ValueError(f"{where}: the name {name!r} is not UTF-8; rename it, as with convmv -t utf8")
            if kind in ("Cc", "Zl", "Zp"):
                raise ValueError(f"{where}: the name {name!r} has a line break or control character; rename it")


def is_hidden(name: str) -> bool:
    """Whether a relative path is what a system leaves beside images: hidden (._x.JPEG, .git/x) or of __MACOSX."""
    if not name.startswith(".") and "/." not in name and "__MACOSX" not in name:
        return False
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/")
    )


class Skipped:
    """Files that are no samples, counted by their kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def copy(self) -> Skipped:
        other = Skipped()
        other._counts.update(self._counts)
        return other

    def add(self, name: str) -> None:
        """Count a file, or a hidden folder."""
        suffix = PurePosixPath(name).suffix.lower()
        self._counts["hidden" if is_hidden(name) else suffix or PurePosixPath(name).name] += 1

    def __str__(self) -> str:
        """As in "3 files (2 hidden, 1 .txt)", or nothing."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._counts.most_common(5))
        more = ", ..." if len(self._counts) > 5 else ""
        return f"{self._counts.total():,} files ({kinds}{more})" if self._counts else ""


def walk_files(root: Path) -> Iterator[str]:
    """Relative paths of all files below `root`, links followed, in no order; folders end with /.

    Names are decoded as UTF-8 in any locale. Hidden folders are not entered, but named.
    Raises ValueError for a folder that holds itself.
    """
    start = os.fsencode(root)
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while todo:
        folder, above = todo.pop()
        path = start + b"/" + folder.encode("utf-8", "surrogateescape")
        status = os.stat(path)  # noqa: PTH116
        key = (status.st_dev, status.st_ino)
        if key in above:
            raise ValueError(f"{root}/{folder}: a link to a folder that holds it; remove the link")
        with os.scandir(path) as entries:
            for entry in entries:
                name = folder + entry.name.decode("utf-8", "surrogateescape")
                try:
                    folder_too = entry.is_dir()
                except OSError:  # a link to itself
                    folder_too = False
                if not folder_too:
                    yield name
                    continue
                yield f"{name}/"
                if not is_hidden(f"{name}/"):
                    todo.append((f"{name}/", (*above, key)))


def list_image_folder(
    root: Path, classes: Sequence[str] | None = None, skipped: Skipped | None = None
) -> tuple[tuple[str, ...], list[str]]:
    """Class names and relative image paths of an ImageFolder tree (root/class/**/image), sorted.

    Without `classes`, the class folders in sorted order are the classes, as in torchvision's ImageFolder.
    With it, labels follow that list, which may name classes the tree lacks. Hidden files are skipped, and
    what is skipped is added to `skipped`.

    Raises ValueError for a missing tree, one without class folders, one of sets (train/, val/), an empty class
    folder, a name that check_name refuses, or a class folder that `classes` does not list.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected class folders of images (root/class/image.jpg)")
    images: dict[str, list[str]] = {}
    skipped = Skipped() if skipped is None else skipped
    for name in walk_files(root):
        folder, slash, _ = name.partition("/")
        if is_hidden(name):
            skipped.add(name)
        elif name.endswith("/"):
            images.setdefault(folder, [])
        elif slash and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            check_name(root, name)
            images.setdefault(folder, []).append(name)
        else:
            skipped.add(name)
    folders = sorted(images)
    if not folders:
        raise ValueError(f"{root}: no class folders in it; expected root/class/image.jpg")
    if SETS.issuperset(folders):
        choices = " or ".join(str(root / name) for name in folders)
        raise ValueError(f"{root}: holds {' and '.join(folders)}, not classes; choose: {choices}")
    names_of_classes = name_classes(root, folders, classes)
    for folder in folders:
        if not images[folder]:
            raise ValueError(
                f"{root / folder}: no images in this class folder; add some or remove the folder "
                f"(accepted: {' '.join(sorted(IMAGE_SUFFIXES))})"
            )
    return names_of_classes, [name for folder in folders for name in sorted(images[folder])]


# Tiny ImageNet's validation set: one folder of images, and a table of their classes beside it.
ANNOTATIONS = "val_annotations.txt"


def read_annotations(root: Path, text: str, names: Sequence[str]) -> list[str]:
    """The classes of Tiny ImageNet's validation images (images/val_0.JPEG, ...) from its table.

    Raises ValueError for an image that is not in the table.
    """
    rows = [line.split() for line in text.splitlines()]
    class_of = {f"images/{words[0]}": words[1] for words in rows if len(words) > 1}
    if missing := [name for name in names if name not in class_of]:
        raise ValueError(f"{root / ANNOTATIONS}: knows nothing of {missing[0]!r}; unpack the archive again")
    return [class_of[name] for name in names]


def _is_annotated(root: Path) -> bool:
    """Whether the table counts: it is left over where the images have been sorted into class folders."""
    if not (root / ANNOTATIONS).is_file():
        return False
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not is_hidden(f"{entry.name}/")] == [
            "images"
        ]


UNREADABLE = (1, 1)  # the stored size of an image whose size cannot be read: shown black


def index_image_folder(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    threads: int = 8,
    on_decode_error: Literal["raise", "skip_and_report"] = "raise",
) -> DatasetIndex:
    """Index an ImageFolder tree; ids follow the sorted paths. Reads each image's header for its size.

    Args:
        root: root/class/**/image.
        classes: class names in label order; sorted folder names if None.
        cache: folder to keep the index in; used again as long as no file has been written, replaced or renamed
            (its size, times and inode). None, or one that cannot be written: the index is not kept.
        threads: header readers (the work waits for storage).
        on_decode_error: `skip_and_report` gives files that are no images the size UNREADABLE and warns of them.

    Raises:
        ValueError: the tree is not an ImageFolder, or files in it are not images; it names some and counts all.
    """
    skipped = Skipped()
    if _is_annotated(root):
        _, names = list_image_folder(root, None, skipped)
        class_of = read_annotations(root, read_text(root / ANNOTATIONS), names)
        names_of_classes = name_classes(root, sorted(set(class_of)), classes)
    else:
        names_of_classes, names = list_image_folder(root, classes, skipped)
        class_of = [name.partition("/")[0] for name in names]
    entry = cache / _signature(root, names_of_classes, names, class_of, on_decode_error) if cache else None
    if entry is not None and (kept := _kept_index(entry)) is not None:
        return kept

    if str(skipped):
        _log.warning("%s: skipped %s", root, skipped)
    label_of = {name: label for label, name in enumerate(names_of_classes)}
    sizes = np.empty((len(names), 2), np.int32)
    bad: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        read = pool.map(lambda name: _stored_size(root, name), names)
        for row, size in enumerate(tqdm(read, f"index {root.name}", len(names), disable=None, unit="img")):
            if isinstance(size, str):
                bad.append(f"{root / names[row]}: {size}")
            sizes[row] = UNREADABLE if isinstance(size, str) else size
    if bad:
        some = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else "")
        if on_decode_error == "raise":
            raise ValueError(
                f"{some}: not {'a readable image' if len(bad) == 1 else 'readable images'}; repair or remove "
                f"{'it' if len(bad) == 1 else 'them'}, or data.on_decode_error: skip_and_report shows black"
            )
        _log.warning(
            "%s: %d of %d files are not readable images and shown black: %s", root, len(bad), len(names), some
        )
    labels = np.array([label_of[name] for name in class_of], np.int64)
    index = DatasetIndex(classes=names_of_classes, labels=labels, sizes=sizes, names=names)
    if entry is not None:
        try:
            index.save(entry)
        except OSError as error:
            _log.warning("the index of %s is not kept, but rebuilt every time: %s", root, error)
    return index


_NAMED = 5  # files that a message names


def _signature(
    root: Path, classes: Sequence[str], names: Sequence[str], class_of: Sequence[str], on_decode_error: str
) -> str:
    """32 hex digits of what an index is made from: a file that was replaced is another one, whatever its size."""
    state = hashlib.blake2b(digest_size=16)
    state.update("\n".join([on_decode_error, *classes]).encode() + b"\0")
    for name, class_name in zip(names, class_of, strict=True):
        try:
            file = os.stat(path_of(root, name))  # noqa: PTH116
        except OSError:  # a link to nowhere: not readable, which comes later
            state.update(f"{name}\t{class_name}\n".encode())
            continue
        found = (file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino, file.st_dev)
        state.update(f"{name}\t{class_name}\t{found}\n".encode())
    return state.hexdigest()


def _kept_index(entry: Path) -> DatasetIndex | None:
    try:
        return DatasetIndex.load(entry) if (entry / "index.json").is_file() else None
    except (OSError, ValueError) as error:
        _log.warning("a kept index cannot be read and is rebuilt: %s", error)
        return None


def _stored_size(root: Path, name: str) -> tuple[int, int] | str:
    """Height and width, or the reason why there is none."""
    try:
        with open_file(path_of(root, name)) as file:
            return image_size(file)
    except (ValueError, OSError) as error:
        return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def user_cache() -> Path | None:
    """Where indexes of image folders are kept: $XDG_CACHE_HOME/fastdcd, by default ~/.cache/fastdcd.

    None, with a warning, for a user without a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcd" / "indexes"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in containers
        _log.warning("no home folder: indexes are not kept, but rebuilt every time; $XDG_CACHE_HOME may name one")
        return None
