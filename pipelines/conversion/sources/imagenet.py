"""ImageNet as its mirrors have it: images in one folder, their classes in their names or in a table beside.

    n01440764_10026.JPEG, n01440764_10026_n01440764.JPEG     a training file anywhere, and Hugging Face's name for it
    val/ILSVRC2012_val_00000001.JPEG + LOC_val_solution.csv  Kaggle
    the same + ILSVRC2012_devkit_t12(.tar.gz)                image-net.org, torchvision's root
    val/images/*.JPEG + val/val_annotations.txt              Tiny ImageNet

Samples are named class/file, so that they come in the order, and under the names, of the same files in class folders.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from pipelines.conversion.sources.files import SMALL, Files
from pipelines.conversion.sources.samples import Sources, of_classes
from pipelines.image_folder import ANNOTATIONS, name_classes, read_annotations

_WNID = re.compile(r"(?:^|_)(n\d{8})(?:_|\.|$)")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})$")
_TEST = re.compile(r"ILSVRC2012_test_\d{8}$")

_SOLUTION = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"


def open_flat(files: Files, classes: Sequence[str] | None) -> Sources | None:
    """Images of one folder whose classes are in their names or in a table; None if these are no such images.

    Raises ValueError for ImageNet's validation images without a table, and for its test images: they have no labels.
    """
    images = files.images()
    folders = {name.rpartition("/")[0] for name in images}
    if len(folders) != 1:
        return None
    stems = [PurePosixPath(name).stem for name in images]
    if all(_TEST.match(stem) for stem in stems):
        raise ValueError(f"{files.path}: ImageNet's test images, which have no labels")
    found = [_WNID.findall(stem) for stem in stems]
    if all(found) and folders == {""}:  # else the folder's name is their class
        # Hugging Face adds the class behind the name, where it counts
        return _labelled(files, images, [wnids[-1] for wnids in found], classes, "classes from file names")
    if not all(_VALIDATION.match(stem) for stem in stems):
        return None
    table, note = _validation_classes(files)
    missing = [stem for stem in stems if stem not in table]
    if missing:
        raise ValueError(
            f"{files.path}: {missing[0]} ({len(missing):,} such) is not in {note}; download both again"
        )
    return _labelled(files, images, [table[stem] for stem in stems], classes, f"classes from {note}")


def _validation_classes(files: Files) -> tuple[Mapping[str, str], str]:
    """The class of each of ImageNet's validation images, and where it stands."""
    for note, read in ((_SOLUTION, _solution), (_DEVKIT, _devkit)):
        if (table := read(files)) is not None:
            return table, note
    raise ValueError(
        f"{files.path}: ImageNet's validation images without their classes; looked for {_SOLUTION} (Kaggle) and "
        f"{_DEVKIT}.tar.gz (image-net.org), in it and in the folders above: put one there, or sort the images into "
        "class folders"
    )


def _labelled(
    files: Files, images: Sequence[str], wnids: Sequence[str], classes: Sequence[str] | None, note: str
) -> Sources:
    names = [f"{wnid}/{PurePosixPath(name).name}" for name, wnid in zip(images, wnids, strict=True)]
    named = name_classes(files.path, sorted(set(wnids)), classes)
    return of_classes(named, names, wnids, files.reader(images), note)


def _solution(files: Files) -> Mapping[str, str] | None:
    """Kaggle's table: ImageId,PredictionString with the class first, then boxes."""
    for place, name in files.above(_SOLUTION):
        rows = csv.reader(io.StringIO(place.text(name)))
        try:
            return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].strip()}
        except csv.Error as error:
            raise ValueError(f"{place.path}/{name}: not a table ({error}); download it again") from None
    return None


def _devkit(files: Files) -> Mapping[str, str] | None:
    """The development kit: a number for each validation image in order, and a table of numbers and classes."""
    for place, name in files.above(f"{_DEVKIT}/{_TRUTH}", f"{_DEVKIT}.tar.gz"):
        if name.endswith(".tar.gz"):
            packed = place.read(name)
            truth, meta = (_from_devkit(place, name, packed, each) for each in (_TRUTH, _META))
        else:
            truth, meta = place.read(name), place.read(name.replace(_TRUTH, _META))
        wnid_of = _read_meta(f"{place.path}/{name}", meta)
        try:
            numbers = [int(word) for word in truth.split()]
            return {f"ILSVRC2012_val_{at:08d}": wnid_of[number] for at, number in enumerate(numbers, 1)}
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{place.path}/{name}: its ground truth is not ImageNet's ({error}); download it again"
            ) from None
    return None


def _from_devkit(place: Files, name: str, packed: bytes, wanted: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            info = archive.getmember(f"{_DEVKIT}/{wanted}")
            file = archive.extractfile(info) if info.size <= SMALL else None
            if file is None:
                raise KeyError(wanted)
            return file.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{place.path}/{name}: no {wanted} in it ({error}); download it again") from None


def _read_meta(where: str, data: bytes) -> dict[int, str]:
    """Numbers and classes of the development kit's meta.mat, a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{where}: reading its meta.mat needs scipy: pip install 'fastdcd[imagenet]'") from None
    try:
        rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    except Exception as error:  # of a damaged file, anything
        raise ValueError(f"{where}: its meta.mat cannot be read ({error}); download it again") from None


def open_tiny_imagenet(files: Files, classes: Sequence[str] | None) -> Sources | None:
    """Tiny ImageNet's validation set; None if the table is missing, or a leftover of images that have been sorted."""
    if ANNOTATIONS not in files.names:
        return None
    images = [name for name in files.images() if name.startswith("images/")]
    if not images or {name for name in files.folders if "/" not in name[:-1]} != {"images/"}:
        return None
    class_of = read_annotations(files.path, files.text(ANNOTATIONS), images)
    return _labelled(files, images, class_of, classes, f"classes from {ANNOTATIONS}")
