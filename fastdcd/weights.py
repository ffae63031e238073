"""Weights of a network: matching a file's names with the network's, writing safetensors, naming weights by a digest."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from fastdcd.weight_file import load as load
from pipelines.files import replace_file

if TYPE_CHECKING:
    from fastdcd.models import FeatureModel

log = logging.getLogger("fastdcd")

# Counted, not learned; files of PyTorch before 0.4.1 do not have it, and torch's strict loading does not ask for it.
_BATCHES = "num_batches_tracked"
# What tools add to a state dict: averaging (torch, timm), FLOP counting (thop), tables that Swin computes itself.
_EXTRA = re.compile(
    r"(^|\.)(n_averaged|num_updates|total_ops|total_params|relative_position_index|relative_coords_table|attn_mask)$"
)


def match(
    loaded: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    path: Path,
    *,
    what: str,
    by_order: bool,
    left_out: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a file under the names of a network.

    One prefix that all of the network's names share in the file is taken off (Lightning's `model.`, DINO's
    `backbone.`); counters that tools add are dropped.

    Args:
        loaded: names and tensors of the file.
        wanted: names and tensors of the network; only names and shapes are used.
        path: the file, for messages.
        what: teacher or student, for messages.
        by_order: match by order and shape, whatever the names.
        left_out: modules of the network's library that this network was built without (its classifier).

    Raises ValueError, one line, if they do not fit.
    """
    loaded = {name: value for name, value in loaded.items() if name in wanted or not _EXTRA.search(name)}
    if by_order:
        return _checked(_by_order(loaded, wanted, path, what), wanted, path)
    prefix = _prefix(loaded, wanted, path)
    named = _below(prefix, loaded)
    inside = tuple(f"{module}." for module in left_out)
    unexpected = [name for name in named if name not in wanted and not name.startswith(inside)]
    missing = [name for name in wanted if name not in named and not name.endswith(_BATCHES)]
    reshaped = [name for name in wanted if name in named and named[name].shape != wanted[name].shape]
    if missing or unexpected or reshaped:
        raise ValueError(f"{path}: {_difference(named, wanted, what, missing, unexpected, reshaped)}")
    if elsewhere := [name for name in loaded if not name.startswith(prefix)]:
        log.warning(
            "%s: %s lie beside the network's tensors (%s*) and are not used", path, _few(elsewhere), prefix
        )
    return _checked({name: named.get(name, value) for name, value in wanted.items()}, wanted, path)


def without_prefix(loaded: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file that lie where the network's do, by their own names."""
    return _below(_prefix(loaded, wanted, path), loaded)


def _below(prefix: str, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}


def _prefix(loaded: Iterable[str], wanted: Iterable[str], path: Path) -> str:
    """What comes before the network's names in a file: the prefix that leads to most of them, or nothing.

    Raises ValueError if there are several with all of them.
    """
    needed = {name for name in wanted if not name.endswith(_BATCHES)}
    found = Counter(name[:start] for name in loaded for start in (0, *_after_dots(name)) if name[start:] in needed)
    whole = [prefix for prefix, count in found.items() if count == len(needed)]
    if "" in whole or not found:
        return ""
    if len(whole) > 1:
        raise ValueError(
            f"{path}: {len(whole)} networks in it fit: {', '.join(f'{each}*' for each in whole)}; save the one to use in "
            "a file of its own"
        )
    best, count = found.most_common(1)[0]
    return best if count > len(needed) / 2 else ""


def _after_dots(name: str) -> list[int]:
    return [place + 1 for place, letter in enumerate(name) if letter == "."]


def _by_order(
    loaded: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, what: str
) -> dict[str, Tensor]:
    names, tensors = list(wanted), list(loaded.values())
    if len(tensors) < len(names):
        names = [name for name in names if not name.endswith(_BATCHES)]
        tensors = [value for name, value in loaded.items() if not name.endswith(_BATCHES)]
    if [value.shape for value in tensors] != [wanted[name].shape for name in names]:
        raise ValueError(
            f"{path}: {len(loaded)} tensors do not match the {what}'s {len(wanted)} by order and shape; it is of "
            "another architecture"
        )
    found = dict(zip(names, tensors, strict=True))
    return {name: found.get(name, value) for name, value in wanted.items()}


def _difference(
    named: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    what: str,
    missing: list[str],
    unexpected: list[str],
    reshaped: list[str],
) -> str:
    """In what a file differs from a network, and the likely reason."""
    if reshaped and not missing and not unexpected and len({named[name].shape[:1] for name in reshaped}) == 1:
        name = reshaped[-1]
        got, expected = named[name], wanted[name]
        if got.ndim and expected.ndim and got.shape[1:] == expected.shape[1:]:
            without = {
                "teacher": ", or take its features alone (teacher.classifier=false: dcd, no kd)",
                "student": ", or begin with a new classifier (student.fresh_classifier=true)",
            }
            return (
                f"the checkpoint has {got.shape[0]} classes, the dataset has {expected.shape[0]}; use a {what} trained "
                f"on these classes, list the checkpoint's in data.classes if the folders are some of them"
                f"{without.get(what, '')} ({name})"
            )
    try:
        _by_order(named, wanted, Path(), what)
        hint = "; its tensors fit in order: set teacher.checkpoint_by_order=true"
    except ValueError:
        hint = ""
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        found = f"; nearest in it: {near[0]}" if near else ""
        hint = f", first {_few(missing)}{found}{hint}"
    elif unexpected:
        hint = f", first {_few(unexpected)}{hint}"
    elif reshaped:
        name = reshaped[0]
        hint = f", first {name}: got {[*named[name].shape]}, expected {[*wanted[name].shape]}{hint}"
    return (
        f"not a checkpoint of this {what}: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(reshaped)} of another shape{hint}"
    )


def _few(names: Sequence[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _checked(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Raises ValueError for weights that cannot be any: of another kind of numbers, or not finite."""
    for name, value in tensors.items():
        floats = wanted[name].is_floating_point()
        plain = value.layout == torch.strided and not (value.is_quantized or value.is_complex() or value.is_meta)
        if not plain or value.is_floating_point() != floats:
            raise ValueError(
                f"{path}: {name} holds {value.dtype} ({value.layout}), expected {wanted[name].dtype}; weights that were "
                "quantised or packed must be unpacked first"
            )
        # a mask may well hold infinities
        if floats and not name.endswith("mask") and not value.float().isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite; the network would give NaN")
    return tensors


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


def load_into(
    model: FeatureModel, path: Path, *, what: str = "model", by_order: bool = False, classifier: bool = True
) -> None:
    """Load a weight file into a network, strictly.

    Args:
        what: teacher or student, for messages.
        by_order: match tensors by order and shape instead of by name.
        classifier: False keeps the network's own classifier, whatever the file has.

    Raises ValueError, one line: what does not fit, and the likely reason.
    """
    own = model.original_state_dict()
    kept = {} if classifier else {name: value for name, value in own.items() if model.is_classifier(name)}
    wanted = {name: value for name, value in own.items() if name not in kept}
    left_out = [*model.left_out, *([] if classifier else [model.classifier_name])]
    found = match(load(path), wanted, path, what=what, by_order=by_order, left_out=left_out)
    model.load_original_state_dict({**kept, **found})
