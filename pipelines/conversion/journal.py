"""What a conversion keeps beside its data: a journal while it runs; rejects.csv and manifest.json at the end.

The journal makes a conversion survive kill -9. It is a text file whose first line holds the settings and
every other line one part that is safely on disk; each has a checksum. What a crash left after the last whole line
does not count.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import replace_file, write_json
from pipelines.formats.checked import Record, read_record
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
        """Start a journal, or continue the existing one.

        Args:
            path: the journal.
            settings: of the conversion, JSON values; must equal those of a journal that is continued.
            fresh: start over even if there is one: its data is gone.

        Raises ValueError if the journal there is of other settings.
        """
        self._path = path
        lines = [] if fresh or not path.exists() else list(self._whole_lines())
        if lines and lines[0] != settings:
            raise ValueError(other_settings(path, lines[0], settings))
        self.parts: list[dict[str, Any]] = lines[1:]
        with replace_file(path) as file:
            file.write("".join(map(_sealed, [dict(settings), *self.parts])).encode())

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        """The lines up to the first that was cut off by a crash, or is damaged: what it spoke of is done again."""
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (found := _opened(line)) is None:
                    return
                yield found

    def append(self, part: dict[str, Any]) -> None:
        """Put a part on disk. `parts` is not kept up to date: memory does not grow with the dataset."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_sealed(part))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterator[dict[str, Any]]:
        """All parts, one by one. Raises ValueError if the file was damaged meanwhile."""
        with self._path.open(encoding="utf-8", errors="replace") as file:
            next(file)
            for line in file:
                if (part := _opened(line)) is None:
                    raise ValueError(f"{self._path}: damaged; run the same command again")
                yield part

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _sealed(line: Mapping[str, Any]) -> str:
    """A line of a journal, with a checksum."""
    text = json.dumps(line)
    return json.dumps({**line, "crc32": zlib.crc32(text.encode())}) + "\n"


def _opened(text: str) -> dict[str, Any] | None:
    """What a line holds; None if it is not as it was written. Version 0.1.0 wrote no checksums."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    checksum = line.pop("crc32", None)
    return line if checksum in (None, zlib.crc32(json.dumps(line).encode())) else None


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
    there = read_record(path, _Manifest, f"remove {folder} and convert again").settings
    if there != dict(settings):
        raise ValueError(other_settings(folder, there, settings))
    return True


class _Manifest(Record):
    settings: dict[str, Any]
