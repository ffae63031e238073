"""Where a conversion takes its images from: a list of samples, each read by its position.

    class_folders   SRC/class/**/image, in a folder, tar or zip; ImageNet's tar of one tar a class
    imagenet        Kaggle's validation folder, image-net.org's validation tar, Hugging Face's flat tars, Tiny ImageNet
    web_dataset     a folder of tars, or one tar, whose samples have an image and its class
    parquet         Hugging Face's parquet files
    cifar           cifar-100-python.tar.gz/train, as torchvision downloads it

Layouts are recognised by looking. A path may continue inside an archive (data.zip/imagenet/train), and a pattern chooses
among files (data/train-*.tar, data/train-{0000..0099}.tar). Whatever the kind, the same images in the same classes
give the same samples in the same order. Reading is stateless (pread), so worker processes share it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipelines.conversion.sources.cifar import open_cifar
from pipelines.conversion.sources.class_folders import open_class_folders
from pipelines.conversion.sources.files import (
    ArchiveFiles,
    Files,
    FolderFiles,
    Member,
    compression,
    is_tar,
    is_zip,
    list_archive,
    prefixed,
)
from pipelines.conversion.sources.imagenet import open_flat, open_tiny_imagenet
from pipelines.conversion.sources.parquet import open_parquet
from pipelines.conversion.sources.samples import Sources
from pipelines.conversion.sources.web_dataset import (
    check_one_set,
    looks_like_web_dataset,
    most_common_suffixes,
    open_web_dataset,
)
from pipelines.files import expand_braces, open_file
from pipelines.formats.shards import INDEX
from pipelines.image_folder import IMAGE_SUFFIXES, SETS, is_hidden
from pipelines.index import DatasetIndex

__all__ = ["Sources", "find_sets", "open_sources"]

_LAYOUTS = (open_tiny_imagenet, open_flat, open_class_folders)  # of files, the first that knows them
_LOOKED_FOR = (
    "class folders (class/image.jpg), WebDataset tars (an image and its .cls), Hugging Face parquet, ImageNet's flat "
    "folders (n01440764_1.JPEG; ILSVRC2012_val_*.JPEG with LOC_val_solution.csv or the devkit), Tiny ImageNet's val, "
    "CIFAR's Python archive"
)

_ROOTS = ("", "ILSVRC/Data/CLS-LOC", "data")  # where sets lie below a root: anybody's, Kaggle's, Hugging Face's
_RAW_TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}  # image-net.org


def open_sources(path: Path, classes: Sequence[str] | None = None, *, first_label: int = 0) -> Sources:
    """List the samples of `path`, whatever its kind.

    Args:
        path: see above.
        classes: class names in label order. None: the source's own, or sorted folder names.
        first_label: what the numbers of a WebDataset's .cls count from.

    Raises ValueError if there is nothing of the kind, a name leads outside the source, a link stands where an
    image should, or a class is not in `classes`.
    """
    chosen = _matches(path)
    if chosen:
        container, inside = path, ""
    else:
        container, inside = _split(path)
    if chosen or container.is_dir():
        sources = _open_folder(path, chosen, classes, first_label)
    else:
        sources = _open_archive(path, container, inside, classes, first_label)
    if not len(sources):
        raise ValueError(f"{path}: no samples in it")
    return sources


def find_sets(path: Path) -> dict[str, Path]:
    """The sets of a root that holds several, by name: train, and val, test or both. Empty: it is one set.

    A test set may have no labels.
    """
    if _matches(path):
        return {}
    container, inside = _split(path)
    if container.is_dir():
        for base in (container / root for root in _ROOTS):
            if base.is_dir():
                folders = [entry.name for entry in base.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
                tables = [entry.name for entry in base.iterdir() if entry.suffix == ".parquet"]
                raw = {name: base / tar for name, tar in _RAW_TARS.items() if (base / tar).is_file()}
                if sets := _sets(folders, base) or _parquet_sets(tables, base) or raw:
                    return sets
        return {}
    if inside or not (is_zip(container) or is_tar(container)):
        return {}
    return _sets_in(container, [member.name for member in list_archive(container)])


def _sets(folders: Sequence[str], base: Path) -> dict[str, Path]:
    sets = {_set_of(name): base / name for name in sorted(folders) if name in SETS}
    return sets if "train" in sets and len(sets) > 1 else {}


def _set_of(name: str) -> str:
    return {"training": "train", "valid": "val", "validation": "val"}.get(name, name)


def _parquet_sets(names: Sequence[str], base: Path) -> dict[str, Path]:
    """Files are named train-00000-of-00294.parquet, validation-..."""
    words = {re.split(r"[-_.]", name)[0] for name in names}
    sets = {_set_of(word): base / f"{word}[-_.]*parquet" for word in sorted(words) if word in SETS}
    return sets if words <= SETS and len(sets) > 1 else {}


def _sets_in(container: Path, names: Sequence[str]) -> dict[str, Path]:
    """The sets of an archive: folders train and val beside each other, as near to its root as possible."""
    bases: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")[:-1]
        for depth, part in enumerate(parts):
            if part in SETS and not is_hidden(name):
                bases.setdefault("/".join(parts[:depth]), set()).add(part)
                break
    for base in sorted(bases, key=len):
        if sets := _sets(sorted(bases[base]), container / base):
            return sets
    return {}


def _matches(path: Path) -> list[Path]:
    """The files that a pattern names, sorted; [] if it is none. Raises ValueError if it names nothing."""
    if path.exists() or not re.search(r"[*?\[{]", str(path)):
        return []
    found = sorted({Path(name) for each in expand_braces(str(path)) for name in glob.glob(each)})  # noqa: PTH207
    if not found:
        raise ValueError(f"{path}: no such file or folder, and no file matches")
    return found


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


def _open_folder(root: Path, chosen: list[Path], classes: Sequence[str] | None, first_label: int) -> Sources:
    entries = chosen or [entry for entry in sorted(root.iterdir()) if not is_hidden(entry.name)]
    tables = [entry for entry in entries if entry.suffix == ".parquet"]
    tars = [entry for entry in entries if entry.suffix == ".tar"]
    if chosen and (others := [entry for entry in chosen if entry not in (tables or tars)]):
        raise ValueError(f"{root}: a pattern may name .tar or .parquet files, and it names {others[0]} too")
    if tables:
        return open_parquet(root, tables, classes)
    folders = [entry for entry in entries if entry.is_dir() and entry.name != INDEX]
    if len(folders) == 1 and any(folders[0].glob("*.parquet")):  # data/, as a repository of Hugging Face has it
        return _open_folder(folders[0], [], classes, first_label)
    if tars and not any(_has_images(folder) for folder in folders):
        if not chosen:
            check_one_set(root, tars)
            index = root / INDEX
            if classes is None and (index / "index.json").is_file():
                classes = DatasetIndex.load(index).classes
        members = [member for tar in tars for member in list_archive(tar)]
        return _open_members(root, members, tars, classes, first_label)
    if not tars and not folders and not any(entry.suffix for entry in entries):
        raise ValueError(f"{root}: no class folders in it; expected class/image.jpg")
    return _open_files(FolderFiles(root), classes)


def _has_images(folder: Path) -> bool:
    return any(entry.suffix.lower() in IMAGE_SUFFIXES or entry.is_dir() for entry in folder.iterdir())


def _open_archive(
    path: Path, container: Path, inside: str, classes: Sequence[str] | None, first_label: int
) -> Sources:
    try:
        with open_file(container) as file:
            start = file.read(4)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if start == b"PAR1":
        return open_parquet(path, [container], classes)
    if compression(container) == ("gzip", "gunzip"):
        return open_cifar(path, container, inside, classes)
    if is_zip(container):
        return _open_files(ArchiveFiles(path, list_archive(container), inside), classes)
    if not compression(container) and not is_tar(container):
        raise ValueError(f"{path}: neither a folder nor a tar, zip or parquet file")
    return _open_members(path, list_archive(container), [container], classes, first_label, inside)


def _open_members(
    path: Path,
    members: list[Member],
    tars: Sequence[Path],
    classes: Sequence[str] | None,
    first_label: int,
    inside: str = "",
) -> Sources:
    if looks_like_web_dataset(members):
        if inside:
            members = [member for member in members if member.name.startswith(f"{inside}/")]
        return open_web_dataset(path, members, classes, first_label)
    flat = [member.name for member in members if "/" not in member.name and not is_hidden(member.name)]
    if len(tars) > 1 and any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in flat):
        # parts of one flat set, whose names say the class; else a tar per class
        if len({*flat}) == len(flat) and (sources := open_flat(ArchiveFiles(path, members), classes)) is not None:
            return sources
        members = prefixed(members)
    return _open_files(ArchiveFiles(path, members, inside), classes)


def _open_files(files: Files, classes: Sequence[str] | None) -> Sources:
    """The first layout that knows these files. Raises ValueError with what was looked for."""
    skipped = files.skipped
    for layout in _LAYOUTS:
        files.skipped = skipped.copy()
        if (sources := layout(files, classes)) is not None:
            counted = (f"skipped {files.skipped}",) if str(files.skipped) else ()
            return replace(sources, notes=(*sources.notes, *counted))
    found = most_common_suffixes(files.names) or "no files"
    raise ValueError(f"{files.path}: no known layout; looked for {_LOOKED_FOR}; it has {found}")
