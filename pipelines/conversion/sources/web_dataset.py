"""WebDataset shards, ours and others': tars whose files belong together by their names.

A sample's key is its path up to the first dot; what follows is what it holds: an image (.jpg, .png, ...), and its
class in .cls (a number or a name), in .json ("label", "cls", ...) or in .txt.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.conversion.sources.files import Member, SpanReader
from pipelines.conversion.sources.samples import Sources
from pipelines.image_folder import IMAGE_SUFFIXES, SETS, ClassList, Skipped, check_name, is_hidden

_LABELS = ("cls", "json", "txt")  # the first that says something
_KEYS = ("label", "cls", "class", "class_id", "class_index", "class_name", "target")  # of a .json
_LONGEST = 1 << 20  # bytes of a label or .json
MOST_CLASSES = 1_000_000


class _Sample(NamedTuple):
    tar: Path
    key: str
    image: Member
    parts: dict[str, Member]


def looks_like_web_dataset(members: Sequence[Member]) -> bool:
    """Whether some class file has the same key as an image."""
    labelled = {
        member.name.rpartition(".")[0] for member in members if member.name.endswith((".cls", ".json", ".txt"))
    }
    return any(_is_image(member.name) and member.name.rpartition(".")[0] in labelled for member in members)


def check_one_set(path: Path, tars: Sequence[Path]) -> None:
    """Raises ValueError if tars of a training and a validation set lie in one folder: they are not one set."""
    sets: dict[str, list[Path]] = {}
    for tar in tars:
        for word in re.findall(r"[a-z]+", tar.name.lower()):
            if word in SETS:
                sets.setdefault({"training": "train", "test": "test"}.get(word, word), []).append(tar)
                break
    if len(sets) > 1:
        found = " and ".join(f"{name} ({of[0].name}{', ...' if len(of) > 1 else ''})" for name, of in sets.items())
        globs = " or ".join(f"'{path}/{re.sub(r'[0-9]+', '*', of[0].name)}'" for of in sets.values())
        raise ValueError(f"{path}: tars of {found} in one folder; choose: {globs}")


def open_web_dataset(
    path: Path, members: Sequence[Member], classes: Sequence[str] | None, first_label: int = 0
) -> Sources:
    """Samples of tars in the order they stand there.

    Args:
        path: for messages.
        members: files of the tars.
        classes: class names in label order; None: numbers, or the names found, sorted.
        first_label: what numbers count from.

    Raises ValueError for a key that is there twice, several images or no class in a sample, and labels out of range.
    """
    skipped = Skipped()
    samples = _samples(members, skipped)
    if not samples:
        raise ValueError(f"{path}: no samples in it; expected an image and .cls under one key")
    kind, labels = _labels(path, samples)
    if all(isinstance(label, int) for label in labels):
        names, numbers = _numbered(path, np.array(labels, np.int64) - first_label, classes, first_label)
    else:
        names, numbers = _named(path, [str(label) for label in labels], classes)
    counted = [f"skipped {skipped}"] if str(skipped) else []
    return Sources(
        classes=names,
        names=_names(path, samples),
        labels=numbers,
        read=SpanReader([sample.image for sample in samples]),
        rows=np.arange(len(samples)),
        notes=(f"WebDataset, classes from .{kind}", *counted),
    )


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _samples(members: Sequence[Member], skipped: Skipped) -> list[_Sample]:
    groups: dict[tuple[Path, str], dict[str, Member]] = {}
    for member in members:
        if member.name.endswith("/"):
            continue
        if is_hidden(member.name):
            skipped.add(member.name)
            continue
        folder, _, file = member.name.rpartition("/")
        key, _, extension = file.partition(".")
        parts = groups.setdefault((member.archive, f"{folder}/{key}".lstrip("/")), {})
        if extension in parts:
            raise ValueError(f"{member.archive}: the key {key} has .{extension} twice; a key names one sample")
        parts[extension] = member
    samples = []
    for (tar, key), parts in groups.items():
        for sample_key, of in _split_dotted(key, parts):
            images = [extension for extension in of if _is_image(extension)]
            if not images:
                for member in of.values():
                    skipped.add(member.name)
                continue
            if len(images) > 1:
                found = " and ".join(f".{extension}" for extension in images)
                raise ValueError(f"{tar}: sample {sample_key} has several images ({found}); expected one")
            check_name(tar, of[images[0]].name)
            lowered = {extension.rpartition(".")[2].lower(): member for extension, member in of.items()}
            if not any(label in lowered for label in _LABELS):
                raise ValueError(
                    f"{tar}: sample {sample_key} has {' '.join(of)}; expected an image and .cls, .json or .txt"
                )
            samples.append(_Sample(tar, sample_key, of[images[0]], lowered))
    return samples


def _split_dotted(key: str, parts: dict[str, Member]) -> list[tuple[str, dict[str, Member]]]:
    """Samples whose keys have dots (photo.1.jpg, photo.2.jpg) seem to be one: they are several if each has a class."""
    if sum(_is_image(extension) for extension in parts) < 2:
        return [(key, parts)]
    inner: dict[str, dict[str, Member]] = {}
    for extension, member in parts.items():
        rest, _, last = extension.rpartition(".")
        inner.setdefault(f"{key}.{rest}" if rest else key, {})[last] = member
    whole = [
        (name, of)
        for name, of in inner.items()
        if any(map(_is_image, of)) and any(label in of for label in _LABELS)
    ]
    extra = [of for name, of in inner.items() if (name, of) not in whole]
    # masks and the like (photo.seg.png) beside a whole sample are not its image
    if not whole or (len(whole) > 1 and any(any(map(_is_image, of)) for of in extra)):
        return [(key, parts)]
    return whole


def _labels(path: Path, samples: Sequence[_Sample]) -> tuple[str, list[int | str]]:
    """Which files hold the classes, and the class of every sample: a number if all are."""
    for kind in _LABELS:
        if not all(kind in sample.parts for sample in samples):
            if kind == "cls" and (some := [sample for sample in samples if kind in sample.parts]):
                lacking = next(sample for sample in samples if kind not in sample.parts)
                raise ValueError(
                    f"{lacking.tar}: sample {lacking.key} has no .cls ({len(samples) - len(some):,} such of "
                    f"{len(samples):,}); expected an image and .cls in each"
                )
            continue
        reader = SpanReader([sample.parts[kind] for sample in samples])
        texts = [_text(sample, kind, reader, row) for row, sample in enumerate(samples)]
        found = [_label_in(text) if kind == "json" else _number(text.strip()) for text in texts]
        if kind == "txt" and len({*found}) * 2 > len(found) + 2:
            raise ValueError(
                f"{path}: no class in its samples: .txt holds captions, it seems ({texts[0][:40]!r}), and there is no .cls"
            )
        if kind != "json" or all(label is not None for label in found):
            labels = [label for label in found if label is not None]
            numbers = all(isinstance(label, int) for label in labels)
            return kind, labels if numbers else [str(label) for label in labels]
    first = samples[0]
    raise ValueError(
        f"{first.tar}: no class in sample {first.key} ({' '.join(first.parts)}); looked for .cls, in .json for "
        f"{', '.join(_KEYS)}, and .txt"
    )


def _text(sample: _Sample, kind: str, reader: SpanReader, row: int) -> str:
    if sample.parts[kind].length > _LONGEST:
        raise ValueError(f"{sample.tar}: .{kind} of sample {sample.key} has {sample.parts[kind].length:,} bytes")
    try:
        text = reader(row).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{sample.tar}: .{kind} of sample {sample.key} is not text") from None
    if kind != "json" and not text.strip():
        raise ValueError(f"{sample.tar}: .{kind} of sample {sample.key} is empty")
    return text


def _number(text: str) -> int | str:
    """A number that int64 holds, or the text itself."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _label_in(text: str) -> int | str | None:
    try:
        about: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in _KEYS if isinstance(about, dict) else ():
        value = about.get(key)
        if isinstance(value, str) or (
            isinstance(value, int) and abs(value) < 1 << 62 and not isinstance(value, bool)
        ):
            return _number(value) if isinstance(value, str) else value
    return None


def _numbered(
    path: Path, numbers: np.ndarray, classes: Sequence[str] | None, first_label: int
) -> tuple[tuple[str, ...], np.ndarray]:
    low, top = int(numbers.min()), int(numbers.max()) + 1
    most = len(classes) if classes is not None else MOST_CLASSES
    if low < 0 or top > most:
        raise ValueError(
            f"{path}: labels go from {low + first_label} to {top - 1 + first_label}, expected {first_label} to "
            f"{most - 1 + first_label}" + (" (--first-label 1, if they count from 1)" if low > 0 else "")
        )
    if classes is None and low > 0:
        raise ValueError(
            f"{path}: labels go from {low + first_label} to {top - 1 + first_label}, so that class {first_label} would "
            "have no image; if they count from 1: --first-label 1; if it is a part of a set: --classes FILE"
        )
    return tuple(classes or map(str, range(top))), numbers


def _named(path: Path, labels: Sequence[str], classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    found = sorted(set(labels))
    names = classes.named(found) if isinstance(classes, ClassList) else tuple(classes or found)
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{path}: class {unknown[0]!r} ({len(unknown)} in all) is not in the list of classes")
    label_of = {name: label for label, name in enumerate(names)}
    return names, np.array([label_of[label] for label in labels], np.int64)


def _names(path: Path, samples: Sequence[_Sample]) -> list[str]:
    """The names of samples: what our own shards keep in their .json, or those of the images."""
    described = [
        sample for sample in samples if "json" in sample.parts and sample.parts["json"].length <= _LONGEST
    ]
    reader, row = SpanReader([sample.parts["json"] for sample in described]), 0
    names = []
    for sample in samples:
        name = sample.image.name
        if "json" in sample.parts and sample.parts["json"].length <= _LONGEST:
            name = _name_in(reader(row)) or name
            row += 1
        check_name(path, name)
        names.append(name)
    return names


def _name_in(about: bytes) -> str | None:
    try:
        value = json.loads(about)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name else None


def most_common_suffixes(names: Sequence[str]) -> str:
    """As in "12 .txt, 3 .parquet", for messages."""
    counts = Counter(f".{name.rpartition('.')[2]}" if "." in name else "without a suffix" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))
