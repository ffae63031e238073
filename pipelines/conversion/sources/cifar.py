"""CIFAR-10 and CIFAR-100 as they are published: cifar-100-python.tar.gz/train, as torchvision downloads it."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.sources.samples import Sources, of_classes
from pipelines.image_folder import name_classes
from pipelines.images.decode import Pixels


class _CifarUnpickler(pickle.Unpickler):
    """CIFAR's files are pickles of dictionaries, lists, byte strings and one uint8 array: that and no more."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
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


_LARGEST = 1 << 28  # bytes of a file of CIFAR; all of CIFAR-100 is 155 MB


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage
        raise ValueError(f"{archive}: damaged or cut off ({error}); copy it again") from None


def open_cifar(path: Path, archive: Path, inside: str, classes: Sequence[str] | None) -> Sources:
    """A part of the archive. Raises ValueError if it is not CIFAR's."""
    if inside not in ("train", "test"):
        raise ValueError(
            f"{path}: a compressed tar can only be CIFAR-10 or CIFAR-100 ({archive}/train or {archive}/test); "
            f"others first: gunzip -k {archive}"
        )
    parts: dict[str, Mapping[bytes, Any]] = {}
    with _reading(archive), tarfile.open(archive, "r:gz") as tar:
        for info in tar:
            name = PurePosixPath(info.name).name
            wanted = "meta" in name or name.startswith((inside, f"{inside}_batch", "data_batch"))
            if info.isreg() and wanted and not name.endswith((".html", ".txt")):
                if info.size > _LARGEST:
                    raise ValueError(f"{archive}: {info.name} is not one of CIFAR's files: {info.size:,} bytes")
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
    class_of = [own[label] for label in labels]
    names = [f"{name}/{file}" for name, file in zip(class_of, files, strict=True)]
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return of_classes(name_classes(path, sorted(own), classes), names, class_of, _PixelReader(images))
