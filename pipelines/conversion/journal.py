"""What a conversion keeps beside its data: a journal while it runs; rejects.csv and manifest.json at the end.

The journal makes a conversion survive kill -9. It is a text file whose first line holds the settings and
every other line one part that is safely on disk. What a crash left after the last whole line does not count.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import replace_file, write_json
from pipelines.index import DatasetIndex

REJECTS, MANIFEST = "rejects.csv", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A sample that cannot be stored: its position in the source, its name, and why."""

    position: int
    name: str
    reason: str

    @classmethod
    def of(cls, row: Sequence[Any]) -> Reject:
        """From a row of a journal: position, name, reason."""
        return cls(position=row[0], name=row[1], reason=row[2])


class Journal:
    """The parts of a conversion that are done. Append a part only after its data is on disk."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool) -> None:
        """Start a journal, or go on with the one that is there.

        Args:
            path: the journal.
            settings: of the conversion, JSON values; must equal those of a journal that is gone on with.
            fresh: start anew even if there is one: its data is gone.

        Raises ValueError if the journal there is of other settings.
        """
        self._path = path
        lines = [] if fresh or not path.exists() else self._lines()
        if lines and lines[0] != settings:
            raise ValueError(other_settings(path, lines[0], settings))
        self.parts: list[dict[str, Any]] = lines[1:]
        with replace_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in [settings, *self.parts]).encode())

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # cut off by a crash
        return lines

    def append(self, part: dict[str, Any]) -> None:
        """Put a part on disk. `parts` is not kept up to date: memory does not grow with the dataset."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterable[dict[str, Any]]:
        """All parts, one by one."""
        with self._path.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def other_settings(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A message: a conversion of other settings lies at `path`."""
    keys = [key for key in now if there.get(key) != now[key]] or sorted(set(there) - set(now))
    known = {"source": "other source: images or classes differ"}  # a digest tells the user nothing
    values = ", ".join(known.get(key, f"{key} {there.get(key)!r} there, {now.get(key)!r} now") for key in keys)
    return f"{path}: a conversion with other settings is there ({values}); use the same, or delete it"


def chain(digest: str, data: Iterable[bytes | memoryview]) -> str:
    """A digest of everything so far, from the last one and what has been added: 32 hex digits."""
    state = hashlib.blake2b(digest.encode(), digest_size=16)
    for piece in data:
        state.update(piece)
    return state.hexdigest()


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> int:
    """Write rejects.csv (position, name, reason), also if there are none; return their number."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["position", "name", "reason"])
    count = 0
    for reject in rejects:
        table.writerow([reject.position, reject.name, reject.reason])
        count += 1
    with replace_file(folder / REJECTS) as file:
        file.write(text.getvalue().encode())
    return count


def write_manifest(
    folder: Path, index: DatasetIndex, settings: Mapping[str, Any], *, rejected: int, **more: Any
) -> None:
    """Write manifest.json: settings, counts, digests."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    manifest = {
        "settings": dict(settings),
        "images": len(index),
        "rejected": rejected,
        **more,
        "index": index.digest,
        "images_a_class": dict(zip(index.classes, counts.tolist(), strict=True)),
    }
    write_json(folder / MANIFEST, manifest)


def finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a conversion with these settings has left its manifest in `folder`.

    Raises ValueError if one of other settings has.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    there = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
    if there != dict(settings):
        raise ValueError(other_settings(folder, there, settings))
    return True
