"""Weight files: reading the wrappers people use, writing safetensors, and naming weights by a digest."""

from __future__ import annotations

import difflib
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from pipelines.files import replace_file

# Where training code keeps the state dict inside a checkpoint, tried in this order.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "state_dict_ema", "model_ema")
# What wrappers of modules put before every name (DDP, torch.compile).
PREFIXES = ("module.", "_orig_mod.")


def load(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt or .tar file, without wrappers and their prefixes.

    Raises ValueError if the file is missing, damaged, pickled in a way that could run code, or holds no
    state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            tree: Any = load_file(path)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read safely ({reason}); if it is a checkpoint you trust, load it where it was made "
            "and save its state dict as .safetensors"
        ) from None
    for _ in range(3):
        inner = next((tree[key] for key in WRAPPERS if isinstance(tree, Mapping) and _is_mapping(tree, key)), None)
        if inner is None:
            break
        tree = inner
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ValueError(
            f"{path}: no state dict in it; expected names and tensors, or a dict with one under 'model'"
        )
    return {_strip(name): value for name, value in tree.items()}


def _is_mapping(tree: Mapping[str, Any], key: str) -> bool:
    return isinstance(tree.get(key), Mapping)


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def match(
    loaded: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, *, what: str, by_order: bool
) -> dict[str, Tensor]:
    """`loaded` under the names of `wanted`. Raises ValueError, one line, if they do not fit."""
    same_order = [value.shape for value in loaded.values()] == [value.shape for value in wanted.values()]
    if by_order:
        if not same_order:
            raise ValueError(
                f"{path}: {len(loaded)} tensors do not match the {what}'s {len(wanted)} by order and shape; it is of "
                "another architecture"
            )
        return dict(zip(wanted, loaded.values(), strict=True))
    missing = [name for name in wanted if name not in loaded]
    unexpected = [name for name in loaded if name not in wanted]
    reshaped = [name for name in wanted if name in loaded and loaded[name].shape != wanted[name].shape]
    if not (missing or unexpected or reshaped):
        return dict(loaded)
    if reshaped and not missing and not unexpected and len({loaded[name].shape[0] for name in reshaped}) == 1:
        name = reshaped[-1]
        raise ValueError(
            f"{path}: the checkpoint has {loaded[name].shape[0]} classes, the dataset has {wanted[name].shape[0]}; "
            f"use a {what} trained on these classes ({name})"
        )
    hint = "; its tensors fit in order: set teacher.checkpoint_by_order=true" if same_order else ""
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        found = f"; nearest in it: {near[0]}" if near else ""
        hint = f", first {missing[0]}{found}{hint}"
    elif reshaped:
        name = reshaped[0]
        hint = f", first {name}: got {[*loaded[name].shape]}, expected {[*wanted[name].shape]}{hint}"
    raise ValueError(
        f"{path}: not a checkpoint of this {what}: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(reshaped)} of another shape{hint}"
    )


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replace_file(path) as file:
        file.write(serialize(plain, {"format": "pt"}))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits over names, dtypes, shapes and values; strides do not matter."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load_into(model: nn.Module, path: Path, *, what: str = "model", by_order: bool = False) -> None:
    """Load a weight file into a `fastdcd.models.FeatureModel`, strictly.

    Args:
        what: teacher or student, for messages.
        by_order: match tensors by order and shape instead of by name.

    Raises ValueError, one line: what does not fit, and the likely reason.
    """
    wanted = model.original_state_dict()  # type: ignore[operator]
    model.load_original_state_dict(match(load(path), wanted, path, what=what, by_order=by_order))  # type: ignore[operator]
