"""The samples of a source: a list, each read by its position."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.encode import Source
from pipelines.images.decode import Pixels

Read = Callable[[int], bytes | Pixels]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All samples of a source; `sources[position]` reads one.

    Attributes:
        classes: class names; a label is a position here.
        names: one relative path a sample, with / between its parts.
        labels: int64 [N].
        read: encoded bytes, or pixels uint8 [H, W, 3], of a row; raises OSError or ValueError. It keeps no state
            that matters, so worker processes share it.
        rows: int64 [N], the row that `read` is asked for, of each position.
        notes: what the user should know: what was recognised, and what was skipped; a line each.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: NDArray[np.int64]
    read: Read
    rows: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Source:
        """Read a sample. Raises OSError or ValueError if that fails."""
        data = self.read(int(self.rows[position]))
        return Source(name=self.names[position], label=int(self.labels[position]), data=data)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over classes, labels and names."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\n".join(self.classes).encode() + b"\0" + self.labels.astype("<i8").tobytes())
        state.update("\n".join(self.names).encode())
        return state.hexdigest()

    def select(self, positions: NDArray[np.int64]) -> Sources:
        """Some of the samples, in this order."""
        names = [self.names[position] for position in positions.tolist()]
        return replace(self, names=names, labels=self.labels[positions], rows=self.rows[positions])

    def limit(self, count: int) -> Sources:
        """At most `count` samples, spread evenly, so that classes stay balanced."""
        if count >= len(self):
            return self
        return self.select(np.arange(count, dtype=np.int64) * len(self) // count)

    def keep(self, patterns: Sequence[str]) -> Sources:
        """Only the classes whose names match a shell pattern. Raises ValueError if none does."""
        kept = [name for name in self.classes if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
        if not kept:
            raise ValueError(f"--keep: no class matches {' '.join(patterns)}; the first is {self.classes[0]!r}")
        label_of = np.array([kept.index(name) if name in kept else -1 for name in self.classes], np.int64)
        part = self.select(np.flatnonzero(label_of[self.labels] >= 0))
        return replace(part, classes=tuple(kept), labels=label_of[part.labels])


def of_classes(
    classes: Sequence[str], names: Sequence[str], class_of: Sequence[str], read: Read, *notes: str
) -> Sources:
    """Samples by the name of their class, sorted by class and name: row r of `read` is names[r], of class_of[r]."""
    label_of = {name: label for label, name in enumerate(classes)}
    order = sorted(range(len(names)), key=lambda row: (class_of[row], names[row]))
    return Sources(
        classes=tuple(classes),
        names=[names[row] for row in order],
        labels=np.array([label_of[class_of[row]] for row in order], np.int64),
        read=read,
        rows=np.array(order, np.int64),
        notes=notes,
    )
