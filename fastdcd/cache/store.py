"""The teacher cache: pooled features of (sample, view), stored once, read beside the images.

On disk a cache is a folder:

    manifest.json              rows, feature dimensions, dtype, views, and the fingerprint of what they are of
    classifier.safetensors     the teacher's final linear layer: logits are recomputed from features
    view-000.npy               uint8 [rows, bytes a row], memory-mapped; `.view(dtype)` of a row is its features
    view-000.done.npy          uint8 [rows], 1 where a row is written; while the view is being filled
    view-000.crc32.npy         uint32 [blocks], one for 1024 rows; its presence says that the view is complete

Rows reach the disk before their done marks, so a fill killed at any moment continues where it stopped. A view
is readable once complete. Nothing is pickled.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdcd import models, weights
from fastdcd.cache.manifest import (
    CODECS,
    ENVIRONMENT,
    FORMAT,
    PIXELS,
    CacheMismatch,
    Manifest,
    StoredManifest,
    different_environment,
)
from fastdcd.cache.row_writer import RowWriter
from fastdcd.cache.view_file import CacheView
from pipelines.files import Lock, human_bytes, write_json
from pipelines.formats.checked import read_record


class TeacherCache:
    """One cache folder, opened for reading and writing.

    Reading needs no lock. Writing takes one: `lock_for_filling` refuses a second writer.
    """

    def __init__(self, path: Path, manifest: Manifest, classifier_digest: str) -> None:
        self.path, self.manifest, self._classifier_digest = path, manifest, classifier_digest
        self._views: dict[int, CacheView] = {}
        self._writer = RowWriter()

    def view(self, number: int) -> CacheView:
        """One view, to be read or written: always the same object."""
        if number not in self._views:
            self._views[number] = CacheView(self.path, number, self.manifest, self._writer)
        return self._views[number]

    # ---- opening

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Open an existing cache. Raises ValueError if there is none, or one of another format."""
        manifest_path = path / "manifest.json"
        if not manifest_path.is_file():
            raise ValueError(
                f"{path}: no teacher cache here; fill one: python tools/cache_teacher.py fill --config ... "
                f"--set cache.path={path}"
            )
        fix = "fill the cache again in a new folder"
        found = read_record(manifest_path, StoredManifest, fix)
        if found.format != FORMAT or found.dtype not in CODECS:
            raise ValueError(f"{manifest_path}: {found.dtype} of format {found.format}, expected {FORMAT}; {fix}")
        return cls(path, Manifest(**found.model_dump(exclude={"format", "classifier"})), found.classifier)

    @classmethod
    def create(cls, path: Path, manifest: Manifest, classifier: nn.Linear) -> TeacherCache:
        """Start a cache, or open the one that is there. Raises CacheMismatch if that is of something else.

        Raises ValueError if the disk has less free space than the cache will take.
        """
        if (path / "manifest.json").is_file():
            cache = cls.open(path)
            cache.check(manifest)
            return cache
        path.mkdir(parents=True, exist_ok=True)
        need, free = manifest.views * manifest.view_bytes, free_bytes(path)
        if free < need:
            raise ValueError(
                f"{path}: the cache takes {human_bytes(need)} and {human_bytes(free)} are free; choose another "
                "cache.path, fewer views.count, or cache.dtype uint8"
            )
        cache = cls(path, manifest, weights.digest(_tensors(classifier)))
        cache.write_classifier(classifier)
        settled = {"format": FORMAT, "classifier": cache._classifier_digest}
        write_json(
            path / "manifest.json", {**settled, **vars(manifest), "fingerprint": dict(manifest.fingerprint)}
        )
        return cache

    def check(self, expected: Manifest, *, allow: tuple[str, ...] = (), allow_environment: bool = False) -> None:
        """Compare with what this run would fill. Raises CacheMismatch that names both values.

        A cache may have more views than are asked for. `allow` lists backend pairs "FROM->TO" that may
        differ in their backend and its settings. The environment is compared as far as both know it: caches
        filled before it was noted open as ever.
        """
        mine, theirs = self.manifest, expected
        for name in ("rows", "dim", "dtype"):
            self._compare(name, getattr(mine, name), getattr(theirs, name))
        if mine.views < theirs.views:
            self._compare("views", mine.views, theirs.views)
        if not allow_environment:
            for name, stored, wanted in different_environment(mine.fingerprint, theirs.fingerprint):
                raise CacheMismatch(
                    f"{self.path}: the cache was filled with {name} = {stored}, this run has {wanted}: pixels or features "
                    "may differ. Go back to that, fill another cache.path, or read it all the same with "
                    "cache.allow_environment=true: the live check then says how far the features agree"
                )
        pair = f"{mine.fingerprint.get('loader.backend')}->{theirs.fingerprint.get('loader.backend')}"
        for name in dict.fromkeys([*theirs.fingerprint, *mine.fingerprint]):
            if name.startswith(ENVIRONMENT) or (name.startswith("loader.") and pair in allow):
                continue
            if name == PIXELS and not (mine.fingerprint.get(name) and theirs.fingerprint.get(name)):
                continue  # filled, or converted, before stored pixels were summed
            self._compare(name, mine.fingerprint.get(name), theirs.fingerprint.get(name))

    def _compare(self, name: str, stored: object, wanted: object) -> None:
        if stored != wanted:
            hint = " (or allow the pair with cache.allow_backend)" if name.startswith("loader.") else ""
            raise CacheMismatch(
                f"{self.path}: the cache was filled with {name} = {stored}, this run has {wanted}; change the "
                f"config back or fill another cache.path{hint}"
            )

    def classifier(self) -> nn.Linear:
        """The teacher's final layer, frozen. Raises ValueError if its file is missing or not as it was written."""
        path = self.path / "classifier.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            tensors = {}
        if not tensors or self._classifier_digest != weights.digest(tensors):
            raise ValueError(f"{path}: missing or damaged; write it again: tools/cache_teacher.py fill --repair")
        classes, dim = tensors["weight"].shape
        layer = nn.Linear(dim, classes) if classes else models.no_outputs(dim)  # features alone
        layer.requires_grad_(False)
        layer.load_state_dict(tensors)
        return layer

    def write_classifier(self, classifier: nn.Linear) -> None:
        """Write the teacher's final layer, as `create` does."""
        weights.save(self.path / "classifier.safetensors", _tensors(classifier))

    # ---- writing

    @classmethod
    def begin_filling(cls, path: Path, manifest: Manifest, classifier: nn.Linear) -> Lock:
        """Take the right to write to a cache and begin it, unless it was begun. Raises ValueError as `lock_for_filling`
        and `create` do; the lock is free again then."""
        lock = cls.lock_for_filling(path)
        try:
            cls.create(path, manifest, classifier)
        except BaseException:
            lock.close()
            raise
        return lock

    @staticmethod
    def lock_for_filling(path: Path) -> Lock:
        """Take the right to write to a cache, started or not, until the lock is closed.

        Raises ValueError if another process has it.
        """
        path.mkdir(parents=True, exist_ok=True)
        return Lock(path / "fill.lock", f"{path}: another process is filling this cache; wait for it")

    def flush(self) -> None:
        """Bring written rows to the disk, and only then mark them as done."""
        self._writer.wait()
        for view in self._views.values():
            view.mark_written()


def _tensors(classifier: nn.Linear) -> dict[str, Tensor]:
    bias = classifier.bias
    return {
        "weight": classifier.weight,
        "bias": classifier.weight.new_zeros(classifier.out_features) if bias is None else bias,
    }


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
