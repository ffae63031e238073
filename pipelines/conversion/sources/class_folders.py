"""Class folders: SRC/class/**/image, as torchvision's ImageFolder reads them; in archives at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from pipelines.conversion.sources.files import ArchiveFiles, Files
from pipelines.conversion.sources.samples import Sources, of_classes
from pipelines.image_folder import IMAGE_SUFFIXES, SETS, name_classes


def open_class_folders(files: Files, classes: Sequence[str] | None) -> Sources | None:
    """Class folders of images; None if there is no image, or one outside of a folder.

    Raises ValueError for an empty class folder, folders of sets, and a folder that `classes` does not list.
    """
    images = files.images()
    root = _common_folder({name.rpartition("/")[0] for name in images}) if isinstance(files, ArchiveFiles) else ""
    start = len(root) + 1 if root else 0
    names = [name[start:] for name in images]
    top = [name[start:].partition("/")[0] for name in files.folders if name.startswith(f"{root}/" if root else "")]
    folders = sorted(set(top) - {""})
    if isinstance(files, ArchiveFiles):  # which may hold folders of other things beside
        folders = sorted({name.partition("/")[0] for name in names})
        if any("/" not in name for name in names):
            return None
    else:
        names = [name for name in names if "/" in name]  # as torchvision: what is in no folder has no class
        for name in set(images) - set(names):
            files.skipped.add(name)
        images = names
    if not folders:
        return None
    where = files.path / root if root else files.path
    if SETS.issuperset(folders):
        choices = " or ".join(str(where / name) for name in folders)
        raise ValueError(f"{where}: holds {' and '.join(folders)}, not classes; choose: {choices}")
    class_of = [name.partition("/")[0] for name in names]
    named = name_classes(files.path, folders, classes)
    if empty := sorted(set(folders) - set(class_of)):
        raise ValueError(
            f"{where / empty[0]}: no images in this class folder; add some or remove the folder "
            f"(accepted: {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return of_classes(named, names, class_of, files.reader(images))


def _common_folder(folders: Iterable[str]) -> str:
    """The deepest folder that holds every class folder; with one folder only, its parent."""
    paths = list(folders)
    if not paths or "" in paths:
        return ""
    common = os.path.commonpath(paths)
    return common.rpartition("/")[0] if paths == [common] else common
