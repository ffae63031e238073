"""A hundred random bit flips in every kind of stored file: one line that names the fault, or nothing changed."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program
from numpy.typing import NDArray
from torch import nn

from fastdcd.cache.manifest import CacheMismatch, Manifest
from fastdcd.cache.store import TeacherCache
from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_resident, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.formats.checked import read_array
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan
from pipelines.views import Center

FLIPS = 100
IMAGES = ROOT / "tests" / "data" / "v0" / "images"
Seen = list[NDArray[np.generic]]


@dataclass(frozen=True)
class Case:
    """Files to damage, and what a user of them sees: it must be the same, or a ValueError of one line."""

    files: Sequence[Path]
    look: Callable[[], Seen]


def shown(backend: str, path: Path) -> Seen:
    """All images and labels of a dataset."""
    with open_loader(backend, path, LoaderOptions(workers=1)) as loader:
        index = loader.index
        plan = EpochPlan(
            index=index, family=Center(), view_seed=0, view=0, order=np.arange(len(index)), batch_size=8
        )
        batches = list(loader.epoch(plan.for_rank((16,))))
        labels = np.concatenate([batch.labels.numpy() for batch in batches])
        pixels = np.concatenate([batch.images[0].numpy() for batch in batches])
        return [labels, pixels, np.array(index.classes), np.array(index.names)]


def described(index: DatasetIndex) -> Seen:
    assert index.offsets is not None and index.lengths is not None and index.checksums is not None
    arrays: Seen = [index.labels, index.sizes, index.offsets, index.lengths, index.checksums]
    return [*arrays, np.array(index.names), np.array(index.classes)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images as a resident set, as shards (also before their index is made), as a .beton, and a cache of two views."""
    out = tmp_path_factory.mktemp("sets")
    for kind, name, *options in (
        ("resident", "resident", "--size", 12),
        ("shards", "shards", "--shard-size", 12),
        ("ffcv", "set.beton"),
    ):
        ran = run_program("tools/convert.py", kind, IMAGES, out / name, *options, "--workers", 0)
        assert ran.code == 0, ran.err
    torch.manual_seed(0)
    cache = TeacherCache.create(out / "cache", manifest(), nn.Linear(8, 2))
    for view in range(2):
        cache.view(view).start()
        cache.view(view).write(torch.arange(20), torch.randn(20, 8))
        cache.flush()
        cache.view(view).finish()
    return out


def manifest() -> Manifest:
    return Manifest(
        rows=20, dim=8, views=2, dtype="fp16", fingerprint={"teacher.weights": "ab12", "loader.backend": "torch"}
    )


def cached(path: Path) -> Seen:
    """What a run takes from a cache, after the checks that it makes."""
    cache = TeacherCache.open(path)
    cache.check(manifest())
    layer = cache.classifier()
    for view in range(2):
        if not cache.view(view).complete() or cache.view(view).verify():
            raise ValueError("damaged")
    rows = [cache.view(view).read(torch.arange(20)).numpy() for view in range(2)]
    return [*rows, layer.weight.detach().numpy(), layer.bias.detach().numpy()]


def finished_again(folder: Path) -> Seen:
    """A conversion to shards that only lacks its index, as one that was killed at its end does."""
    shutil.rmtree(folder / "index", ignore_errors=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    index = to_shards(Job(sources=open_sources(IMAGES), out=folder, workers=0), Storage(jpeg=1.0), 12)
    assert index is not None
    return described(index)


def converted_again(folder: Path) -> Seen:
    to_resident(Job(sources=open_sources(IMAGES), out=folder, workers=0), 12)
    return shown("resident", folder)


CASES: dict[str, Callable[[Path], Case]] = {
    "index": lambda sets: Case(
        [sets / "resident" / name for name in ("index.json", "labels.npy", "sizes.npy", "names.txt", "crc32.npy")],
        lambda: shown("resident", sets / "resident"),
    ),
    "index of shards": lambda sets: Case(
        [sets / "shards" / "index" / name for name in ("index.json", "offsets.npy", "lengths.npy", "crc32.npy")],
        lambda: shown("torch", sets / "shards"),
    ),
    "index of a .beton": lambda sets: Case(
        sorted((sets / "set.beton.index").glob("*.npy")), lambda: shown("ffcv", sets / "set.beton")
    ),
    "manifest of a conversion": lambda sets: Case(
        [sets / "resident" / "manifest.json"], lambda: converted_again(sets / "resident")
    ),
    "manifest of a cache": lambda sets: Case([sets / "cache" / "manifest.json"], lambda: cached(sets / "cache")),
    "cache": lambda sets: Case(
        sorted([*(sets / "cache").glob("*.npy"), sets / "cache" / "classifier.safetensors"]),
        lambda: cached(sets / "cache"),
    ),
    "resident pixels": lambda sets: Case(
        [sets / "resident" / "images.npy"], lambda: shown("resident", sets / "resident")
    ),
    ".beton": lambda sets: Case([sets / "set.beton"], lambda: shown("ffcv", sets / "set.beton")),
    "shard": lambda sets: Case(sorted((sets / "shards").glob("*.tar")), lambda: shown("torch", sets / "shards")),
    ".idx and notes of shards": lambda sets: Case(
        [path for end in ("idx", "json") for path in sorted((sets / "shards").glob(f"shard-*.{end}"))],
        lambda: finished_again(sets / "shards"),
    ),
}


def same(first: Seen, second: Seen) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_random_flips(sets: Path, name: str) -> None:
    case = CASES[name](sets)
    rng = np.random.default_rng(0)
    whole = case.look()
    refused = 0
    stored = [path.read_bytes() for path in case.files]
    # not the padding, of which a .beton is full
    bytes_of = [np.flatnonzero(np.frombuffer(data, np.uint8)) for data in stored]
    for _ in range(FLIPS):
        number = int(rng.integers(len(stored)))
        path, data, places = case.files[number], stored[number], bytes_of[number]
        place = int(places[rng.integers(len(places))])
        flipped = data[place] ^ (1 << int(rng.integers(8)))
        overwrite(path, place, flipped)
        try:
            assert same(case.look(), whole), (
                f"{path.name}: byte {place} as {flipped} changed what is read, in silence"
            )
        except ValueError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        finally:
            overwrite(path, place, data[place])
    assert refused >= FLIPS / 10
    assert same(case.look(), whole)


def overwrite(path: Path, place: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([byte]))


# ---- verify

VERIFY = "tools/verify.py"
VERIFIED = {
    "resident": ["resident/images.npy", "resident/crc32.npy", "resident/labels.npy", "resident/names.txt"],
    "shards": [
        "shards/shard-000000.tar",
        "shards/shard-000001.tar",
        "shards/shard-000000.idx",
        "shards/index/crc32.npy",
    ],
    "set.beton": ["set.beton", "set.beton.index/lengths.npy", "set.beton.index/crc32.npy"],
    "cache": [
        "cache/view-000.npy",
        "cache/view-001.npy",
        "cache/view-001.crc32.npy",
        "cache/classifier.safetensors",
    ],
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_finds_every_flip(sets: Path, name: str) -> None:
    ran = run_program(VERIFY, sets / name)
    assert ran.code == 0 and "all checksums match" in ran.out and str(sets / name) in ran.out, ran.err
    rng = np.random.default_rng(1)
    for file in VERIFIED[name]:
        path, data = sets / file, (sets / file).read_bytes()
        for place in rng.choice(places_that_count(path, data), 5).tolist():
            overwrite(path, place, data[place] ^ (1 << int(rng.integers(8))))
            ran = run_program(VERIFY, sets / name)
            overwrite(path, place, data[place])
            assert ran.code == 2 and ran.err.count("\n") == 1, (file, place, ran.out, ran.err)
            assert f"failed verification: {sets / name}" in ran.err
            assert str(sets / name) in ran.out and len(ran.out.splitlines()) <= 2
    assert run_program(VERIFY, sets / name).code == 0


def flip(path: Path, place: int) -> None:
    overwrite(path, place, path.read_bytes()[place] ^ 1)


def places_that_count(path: Path, data: bytes) -> NDArray[np.intp]:
    """Bytes of a file that are not padding; of a .beton those of its images (its header is FFCV's, and has no sum)."""
    places = np.flatnonzero(np.frombuffer(data, np.uint8))
    if path.suffix == ".beton":
        index = DatasetIndex.load(path.with_name(f"{path.name}.index"))
        assert index.offsets is not None and index.lengths is not None
        inside = [(places >= a) & (places < a + n) for a, n in zip(index.offsets, index.lengths, strict=True)]
        return places[np.any(inside, axis=0)]
    if path.suffix == ".tar":
        return places[places % 512 < 148]  # not the sum in a header, whose zero may be a blank as well
    return places


def test_verify_names_the_sample_and_goes_on(sets: Path, tmp_path: Path) -> None:
    """All sets in a folder, all that is wrong with each."""
    for name in ("resident", "shards", "cache"):
        shutil.copytree(sets / name, tmp_path / "all" / name)
    index = DatasetIndex.load(sets / "shards" / "index")
    assert index.offsets is not None
    for sample in (3, 5):
        flip(tmp_path / "all/shards/shard-000000.tar", int(index.offsets[sample]) + 100)
    (tmp_path / "all/shards/shard-000001.idx").unlink()
    (tmp_path / "all/resident/images.npy").write_bytes(b"")
    ran = run_program(VERIFY, tmp_path / "all", tmp_path / "all" / "cache")
    lines = ran.out.splitlines()
    assert ran.code == 2 and len(lines) == 5, ran.out
    assert "images.npy: damaged or cut off" in lines[0]
    assert all(f"shard-000000.tar: {index.names[k]} (sample {k})" in lines[n] for n, k in ((1, 3), (2, 5)))
    assert "shard-000001.idx: no such file" in lines[3] and "2 of 2 views are complete" in lines[4]
    assert ran.err.count(str(tmp_path)) == 2


def test_verify_of_what_has_no_checksums(tmp_path: Path) -> None:
    """Image folders; sets that version 0.1.0 converted. Its shards have a sum each."""
    v0 = ROOT / "tests" / "data" / "v0"
    for path, says in ((v0 / "images", "nothing here has checksums"), (tmp_path / "x", "no such file or folder")):
        ran = run_program(VERIFY, path)
        assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    ran = run_program(VERIFY, v0 / "resident")
    assert ran.code == 2 and "before images were summed" in ran.out
    assert run_program(VERIFY, v0 / "shards").code == 0
    shutil.copytree(v0 / "shards", tmp_path / "shards")
    flip(tmp_path / "shards" / "shard-000001.tar", 700)
    ran = run_program(VERIFY, tmp_path / "shards")
    assert ran.code == 2 and "shard-000001.tar: fails its checksum" in ran.out


# ---- malformed on purpose


def test_an_index_cannot_lead_outside(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "resident", tmp_path / "set")
    file = tmp_path / "set" / "index.json"
    tree = json.loads(file.read_text())
    for damage in (
        {"arrays": ["labels", "../../../etc/passwd"]},
        {"arrays": ["labels"]},
        {"count": "20"},
        {"count": -1},
        {"classes": {"a": 1}},
        {"digest": None},
    ):
        file.write_text(json.dumps({**tree, **damage}))
        with pytest.raises(ValueError, match="convert the dataset again"):
            DatasetIndex.load(tmp_path / "set")
    for text in ("", "[]", "null", "{", "[" * 100_000, '{"format": "fastdcd-index-1"}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            DatasetIndex.load(tmp_path / "set")


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    """Also where whoever wrote them has summed them."""
    for labels in ([0, 2], [-1, 0]):
        index = DatasetIndex(
            classes=("a", "b"), labels=np.array(labels), sizes=np.ones((2, 2), np.int32), names=["a/1", "b/2"]
        )
        index.save(tmp_path / "index")
        with pytest.raises(ValueError, match="expected 0 to 1"):
            DatasetIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999,)}",
        "{'descr': '<i8', 'fortran_order': True, 'shape': (2,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-2,)}",
        "{'descr': '<i8', 'shape': (2,)}",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (2,)}",
        "__import__('os').system('true')",
        "(" * 5000,
    ],
)
def test_malformed_array_headers_are_one_line(tmp_path: Path, header: str) -> None:
    path = tmp_path / "labels.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=r"labels\.npy: damaged or cut off .*; again") as error:
        read_array(path, np.int64, (2,), "again")
    assert "\n" not in str(error.value)


def test_a_cache_without_its_classifiers_digest_is_refused(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "cache", tmp_path / "cache")
    file = tmp_path / "cache" / "manifest.json"
    tree = json.loads(file.read_text())
    del tree["classifier"]
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="classifier"):
        TeacherCache.open(tmp_path / "cache")


def test_a_mark_that_nobody_made_is_not_believed(tmp_path: Path) -> None:
    """A flipped done mark would make a row of zeros a row of features."""
    cache = TeacherCache.create(tmp_path / "cache", manifest(), nn.Linear(8, 2))
    cache.view(0).start()
    cache.view(0).write(torch.arange(10), torch.randn(10, 8))
    cache.flush()
    path = tmp_path / "cache" / "view-000.done.npy"
    overwrite(path, path.stat().st_size - 1, 1)
    again = TeacherCache.open(tmp_path / "cache")
    again.view(0).start()
    assert again.view(0).done().tolist() == [True] * 10 + [False] * 10


def test_a_cache_of_other_pixels_is_refused(sets: Path, tmp_path: Path) -> None:
    """The same names, labels and sizes with other pixels: known by their checksums, where both have them."""
    index = DatasetIndex.load(sets / "resident")
    pixels = {"loader.pixels": str(index.pixels_digest)}

    def of(more: dict[str, str]) -> Manifest:
        return Manifest(**{**vars(manifest()), "fingerprint": {**manifest().fingerprint, **more}})

    cache = TeacherCache.create(tmp_path / "cache", of(pixels), nn.Linear(8, 2))
    cache.check(of(pixels))
    cache.check(of({}))  # a set that version 0.1.0 converted
    with pytest.raises(CacheMismatch, match=r"loader\.pixels"):
        cache.check(of({"loader.pixels": "0" * 32}))
    TeacherCache.create(tmp_path / "old", of({}), nn.Linear(8, 2)).check(of(pixels))
