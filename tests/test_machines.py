"""Machines as they are: locales that are not UTF-8, users without a home, caches that cannot be written."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

from pipelines import prefetch as prefetching
from pipelines.base import Batch
from pipelines.image_folder import index_image_folder, user_cache

ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def run(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("größe/a.png", "größe/日本.png", "n02/b.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (255, 0, 0)).save(path)
    return tmp_path / "images"


_PROGRAM = """
import locale, sys
from pathlib import Path
import numpy as np
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), locale.getpreferredencoding(False)
from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.job import Job, to_resident
from pipelines.conversion.sources import open_sources
from pipelines.image_folder import read_classes
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan
from pipelines.views import Center
folder, out, listed = map(Path, sys.argv[1:])
classes = read_classes(listed)
with open_loader("torch", folder, LoaderOptions(workers=0, classes=classes)) as loader:
    index = loader.index
    plan = EpochPlan(index=index, family=Center(), view_seed=0, view=0, order=np.arange(3), batch_size=3)
    (batch,) = loader.epoch(plan.for_rank((8,)))
    assert batch.images[0][:, 0].min() > 200
to_resident(Job(sources=open_sources(folder, classes), out=out, workers=0), None)
assert DatasetIndex.load(out).digest == index.digest
print(index.digest)
"""


def test_names_outside_ascii_are_the_same_in_any_locale(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("größe\nn02\n", encoding="utf-8")
    found = run(_PROGRAM, folder, tmp_path / "out", listed, **ASCII)
    assert found.strip() == index_image_folder(folder).digest


@pytest.mark.parametrize("program", ["tools/convert.py", "fastdcd/train.py"])
def test_a_message_with_a_name_outside_ascii_is_printed_in_any_locale(program: str, tmp_path: Path) -> None:
    missing = tmp_path / "größe.yaml"
    arguments = ["resident", missing, tmp_path] if "convert" in program else ["--config", missing]
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)], env={**os.environ, **ASCII}, capture_output=True, cwd=ROOT
    )
    assert done.returncode == 2 and b"error: " in done.stderr and b"no such" in done.stderr, done.stderr


def test_without_a_home_an_index_is_made_but_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    log = logging.getLogger("pipelines.image_folder")
    monkeypatch.setattr(log, "handle", lambda record: lines.append(record.getMessage()))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987_654)  # without an entry in the list of users
    assert user_cache() is None and "no home folder" in lines.pop()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "cache", Path("/proc/cache")):  # neither can be made, even by root
        assert len(index_image_folder(folder, cache=place)) == 3
        assert "is not kept, but rebuilt every time" in lines.pop()


def test_a_damaged_kept_index_is_made_anew(folder: Path, tmp_path: Path) -> None:
    first = index_image_folder(folder, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "names.txt").write_text("x")
    for _ in range(2):
        assert index_image_folder(folder, cache=tmp_path / "cache").digest == first.digest
    assert len((entry / "names.txt").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("how", ["written", "renamed over", "touched back"])
def test_an_image_that_was_replaced_makes_the_index_anew(folder: Path, tmp_path: Path, how: str) -> None:
    """By another of equally many bytes, with the old times too."""
    path = folder / "n02" / "b.png"
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 9), (0, 0, 255)).save(other)
    size = max(path.stat().st_size, other.stat().st_size)
    for each in (path, other):
        each.write_bytes(each.read_bytes().ljust(size, b"\0"))
    first = index_image_folder(folder, cache=tmp_path / "cache")
    before = path.stat()
    if how == "renamed over":
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(other.read_bytes())
        if how == "touched back":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = index_image_folder(folder, cache=tmp_path / "cache")
    row = list(first.names).index("n02/b.png")
    assert first.sizes[row].tolist() == [8, 9] and second.sizes[row].tolist() == [9, 8]


def test_a_batch_that_never_comes_ends_the_process_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A thread that reads from a dead file server cannot be stopped. Slow steps between batches are not counted."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(prefetching, "TICK", 0.02)
    monkeypatch.setattr(prefetching, "PATIENCE", 0.2)
    monkeypatch.setattr(prefetching, "_watcher", None)
    ids = torch.arange(2)

    def batches(seconds: float) -> Iterator[Batch]:
        for _ in range(2):
            yield Batch(images=(torch.zeros(2, 3, 4, 4, dtype=torch.uint8),), labels=ids, ids=ids)
            time.sleep(seconds)

    def show(storage: float, step: float) -> None:
        for _ in prefetching.prefetch(batches(storage), lambda ids: None, torch.device("cpu")):
            time.sleep(step)

    show(storage=0, step=0.4)
    assert codes == [] and capfd.readouterr().err == ""
    show(storage=1.0, step=0)
    assert codes and set(codes) == {1}
    assert "no batch came for 0 minutes: the storage hangs, perhaps" in capfd.readouterr().err.splitlines()[0]
