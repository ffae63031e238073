"""The state dict in a file that somebody else wrote: told from what is not one, and read without running any of it."""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Where training code keeps the state dict inside a checkpoint, tried in this order.
WRAPPERS = (
    *("state_dict", "model", "model_state", "model_state_dict", "net", "state_dict_ema", "model_ema"),
    *("ema", "ema_model", "params_ema", "params", "network", "weights", "teacher", "student", "backbone"),
)


class _Placeholder:
    """Stands for an object beside the weights. Its class is not imported and its contents are dropped."""

    def __new__(cls, *arguments: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _names(module: str, *names: str) -> Iterator[str]:
    return (f"{module}.{name}" for name in names)


# What training programs pickle beside the weights: arguments, figures, dates. `torch.load(weights_only=True)` gets
# an empty object for each; nothing of theirs is imported or called.
_BESIDE_WEIGHTS = (
    *_names("argparse", "Namespace"),
    *_names("types", "SimpleNamespace"),
    *_names("numpy", "dtype", "ndarray", "bool_", "float16", "float32", "float64", "int32", "int64"),
    *_names("numpy.core.multiarray", "scalar", "_reconstruct"),
    *_names("numpy._core.multiarray", "scalar", "_reconstruct"),
    *_names(
        "numpy.dtypes", *(f"{kind}DType" for kind in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64"))
    ),
    *_names("datetime", "datetime", "date", "time", "timedelta", "timezone"),
    *_names("pathlib", "Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    *_names("pathlib._local", "Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    *_names("omegaconf.dictconfig", "DictConfig"),
    *_names("omegaconf.listconfig", "ListConfig"),
    *_names("omegaconf.base", "ContainerMetadata", "Metadata"),
    *_names(
        "omegaconf.nodes", *(f"{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "Path", "String"))
    ),
    *_names("typing", "Any"),
    *_names("builtins", "dict", "list", "tuple", "int", "float", "str", "bool"),
    *_names("functools", "partial"),
)
# Dictionaries of other packages, filled item by item.
_DICTIONARIES = (
    *_names("yacs.config", "CfgNode"),
    *_names("fvcore.common.config", "CfgNode"),
    *_names("easydict", "EasyDict"),
    *_names("addict.addict", "Dict"),
    *_names("lightning.fabric.utilities.data", "AttributeDict"),
    *_names("lightning_fabric.utilities.data", "AttributeDict"),
    *_names("pytorch_lightning.utilities.parsing", "AttributeDict"),
)


def _dictionary(*arguments: Any) -> OrderedDict[Any, Any]:
    """Stands for a dictionary that is made by a call, and then filled."""
    return OrderedDict()


def load(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt, .th, .bin or .tar file, out of whatever wraps it.

    The names are as they are in the file, without the `module.` and `_orig_mod.` of DDP and torch.compile.

    Raises ValueError, one line, if the file is missing, damaged, no weight file at all, pickled in a way that could
    run code, or holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {_not_a_file(path)}")
    with path.open("rb") as file:
        head = file.read(1024)
    if other := _something_else(path, head):
        raise ValueError(f"{path}: {other}")
    try:
        tree = load_file(path) if _is_safetensors(path, head) else _unpickle(path)
    except MemoryError:
        raise ValueError(f"{path}: claims to hold more than fits into memory; it is damaged") from None
    except Exception as error:  # what a damaged or crafted file makes a reader raise is without end
        raise ValueError(f"{path}: {_reason(error)}") from None
    return _without_wrappers(_state_dict(tree, path), path)


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        inside = sorted(
            each.name for each in path.iterdir() if each.suffix in (".safetensors", ".pth", ".bin", ".pt")
        )
        return f"is a folder, expected a weight file{f'; in it: {inside[0]}' if inside else ''}"
    return "not a regular file" if path.exists() else "no such file"


def _something_else(path: Path, head: bytes) -> str:
    """What a file is that is clearly no weight file, and what to do about it; or an empty string."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty (0 bytes): its download or copy was not finished; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer instead of the weights; run `git lfs pull` where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page instead of the weights (a link to view, or an error page); download the file itself"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it and name the weight file in it"
    for magic, kind in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        if head.startswith(magic):
            return f"is compressed ({kind}); uncompress it first"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras); expected PyTorch weights or safetensors"
    if text.startswith((b"{", b"[")):
        return "is JSON; expected PyTorch weights or safetensors"
    return _strange_zip(path) if head.startswith(b"PK") else ""


def _strange_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return ""  # damaged: torch says how
    if not any(each.filename.endswith("data.pkl") for each in members):
        return "is a zip archive without a PyTorch checkpoint in it; unpack it and name the weight file in it"
    size = sum(each.file_size for each in members)
    if size > 100 * path.stat().st_size:  # torch stores, it does not compress
        return f"would grow to {size / 1e9:.3g} GB when it is read; no checkpoint of PyTorch's is compressed so"
    return ""


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By its content (a length, then a JSON header): people rename these files."""
    pickled = head.startswith((b"PK", b"\x80"))  # torch's zip, and the form before it
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not pickled)


def _unpickle(path: Path) -> Any:
    placeholders = [(_Placeholder, name) for name in _BESIDE_WEIGHTS]
    dictionaries = [(OrderedDict, name) for name in _DICTIONARIES]
    made = [(_dictionary, "collections.defaultdict")]
    with torch.serialization.safe_globals([*placeholders, *dictionaries, *made]), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)  # given a path, it goes by the suffix


def _reason(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if "TorchScript" in str(error):
        why, whose = "is a TorchScript program", "load it with torch.jit.load"
    elif found:
        why, whose = f"holds an object of {found[1]}, which would run code when it is read", "load it"
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0])
        return f"cannot be read safely; damaged, or not a weight file ({first})"
    return (
        f"cannot be read safely: it {why}; if you trust it, {whose} where it was made and save the state dict "
        "alone: torch.save(model.state_dict(), ...)"
    )


def _state_dict(tree: Any, path: Path) -> dict[str, Tensor]:
    """The names and tensors in what a file holds."""
    if isinstance(tree, Mapping) and isinstance(tree.get("progress"), Mapping) and "module" in tree:
        raise ValueError(f"{path}: is a checkpoint of a run; name the run's student.safetensors instead")
    for _ in range(3):
        if not isinstance(tree, Mapping):
            break
        inside = {key: value for key, value in tree.items() if _tensors(value) or _wraps(value)}
        named = [key for key in WRAPPERS if key in inside]
        # figures may lie beside weights under a name of their own; weights beside weights are not looked into
        alone = list(inside) if not any(value.ndim for value in _tensors(tree).values()) else []
        if not named and len(alone) > 1:
            raise ValueError(
                f"{path}: several state dicts in it ({', '.join(map(str, alone[:4]))}), none under a usual name; "
                "save the one to use in a file of its own"
            )
        if not (named or alone):
            break
        tree = inside[(named or alone)[0]]
    tensors = _tensors(tree)
    if not tensors:
        raise ValueError(
            f"{path}: no state dict in it; expected names and tensors, or a dict with one under 'model'"
        )
    return tensors


def _tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; a number or a string beside them can be no weight."""
    if not isinstance(tree, Mapping):
        return {}
    return {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _wraps(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(_tensors(tree.get(key)) for key in WRAPPERS)


def _without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    bare: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name.replace("_orig_mod.", "")
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in bare:
            raise ValueError(f"{path}: holds {short} twice, with and without a wrapper's prefix ({name})")
        bare[short] = value
    return bare
