"""Files of version 0.1.0 (tests/data/v0, see make.py there) open today and give the same plans, pixels and features;
what is written anew from the same input has the same bytes."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, metric_lines, run_program

from fastdcd.cache.manifest import CODECS
from fastdcd.cache.store import TeacherCache
from pipelines.base import LoaderOptions, open_loader
from pipelines.image_folder import index_image_folder
from pipelines.index import DatasetIndex
from pipelines.plan import EpochPlan, order
from pipelines.views import FAMILIES, describe, table_digest

V0 = Path("tests/data/v0")
TABLES = json.loads((ROOT / V0 / "tables.json").read_text())
SETS = {"torch": "images", "resident": "resident", "ffcv": "set.beton", "dali": "shards"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs of that version name their files from the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def v0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, with the .beton unpacked: nothing may change the original."""
    folder = tmp_path_factory.mktemp("v0") / "v0"
    shutil.copytree(ROOT / V0, folder)
    (folder / "set.beton").write_bytes(gzip.decompress((folder / "set.beton.gz").read_bytes()))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- plans


@pytest.mark.parametrize("kind", TABLES["orders"])
def test_orders(kind: str) -> None:
    assert order(50, seed=7, epoch=3, kind=kind).tolist() == TABLES["orders"][kind]


@pytest.mark.parametrize("name", TABLES["families"])
def test_views_and_their_descriptions(name: str) -> None:
    family, sizes, golden = FAMILIES[name](), np.array(TABLES["sizes"], np.int32), TABLES["families"][name]
    boxes, flips = family.boxes(11, np.arange(50), 2, sizes)
    assert boxes.tolist() == golden["boxes"] and flips.tolist() == golden["flips"]
    assert table_digest(family, 11, sizes) == golden["digest"]
    assert {key: str(value) for key, value in describe(family).items()} == golden["describe"]


def test_the_parts_of_ranks(v0: Path) -> None:
    ids = order(20, seed=5, epoch=1)
    index = DatasetIndex.load(v0 / "resident")
    plan = EpochPlan(index=index, family=FAMILIES["pad_crop"](), view_seed=3, view=1, order=ids, batch_size=8)
    for rank, golden in enumerate(TABLES["ranks"]):
        part = plan.for_rank((8, 12), rank=rank, world_size=3, start_step=1)
        assert part.ids.tolist() == golden["ids"] and part.batches == golden["batches"]
        assert part.crops[0].boxes.tolist() == part.crops[1].boxes.tolist() == golden["boxes"]


# ---- datasets


@pytest.mark.parametrize("backend", SETS)
def test_datasets_show_the_same_pixels_under_the_same_fingerprint(v0: Path, backend: str) -> None:
    """A changed fingerprint value refuses every cache ever filled through this loader."""
    with open_loader(backend, v0 / SETS[backend], LoaderOptions(workers=0)) as loader:
        golden = json.loads((v0 / "fingerprints.json").read_text())[backend]
        assert {"data.index": loader.index.digest, **loader.fingerprint} == golden
        ids, resident = order(20, seed=5, epoch=1), backend == "resident"
        family = FAMILIES["pad_crop" if resident else "random_resized_crop"]()
        plan = EpochPlan(index=loader.index, family=family, view_seed=3, view=1, order=ids, batch_size=8)
        images = torch.cat([batch.images[0] for batch in loader.epoch(plan.for_rank((12 if resident else 8,)))])
    expected = torch.from_numpy(np.load(v0 / "pixels.npz")[backend])
    difference = (images.int() - expected.int()).abs().max()
    assert difference <= (1 if backend == "dali" else 0)  # DALI resizes in float32


def test_an_index_is_read_and_written_as_before(v0: Path, tmp_path: Path) -> None:
    (old,) = (v0 / "folder-index").iterdir()
    index = DatasetIndex.load(old)
    assert index_image_folder(v0 / "images").digest == index.digest
    index_image_folder(v0 / "images").save(tmp_path / "new")
    assert files(old).items() <= files(tmp_path / "new").items()


CONVERSIONS: dict[str, list[object]] = {
    "resident": ["resident", "--size", 12],
    "shards": ["shards", "--shard-size", 12],
    "set.beton": ["ffcv", "--jpeg-share", 0.5],
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_write_the_same_bytes(v0: Path, tmp_path: Path, name: str) -> None:
    kind, *options = CONVERSIONS[name]
    ran = run_program("tools/convert.py", kind, V0 / "images", tmp_path / name, *options, "--workers", 0)
    assert ran.code == 0, ran.err
    if name == "set.beton":
        assert (tmp_path / name).read_bytes() == (v0 / name).read_bytes()
        name = "set.beton.index"
    assert files(v0 / name).items() <= files(tmp_path / name).items()


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_finished_conversion_is_known_again(v0: Path, name: str) -> None:
    kind, *options = CONVERSIONS[name]
    before = files(v0 / name)
    ran = run_program("tools/convert.py", kind, v0 / "images", v0 / name, *options, "--workers", 0)
    assert ran.code == 0 and "20 images" in ran.out, ran.err
    assert files(v0 / name) == before


@pytest.mark.parametrize("name", ["resident", "shards"])
def test_a_conversion_that_was_begun_goes_on(v0: Path, tmp_path: Path, name: str) -> None:
    kind, *options = CONVERSIONS[name]
    if name == "resident":
        shutil.copytree(v0 / "resident-begun", tmp_path / name)
    else:
        shutil.copytree(v0 / name, tmp_path / name)
        for lost in ("shard-000001.tar", "shard-000001.idx", "shard-000001.json", "manifest.json", "rejects.csv"):
            (tmp_path / name / lost).unlink()
        shutil.rmtree(tmp_path / name / "index")
    ran = run_program("tools/convert.py", kind, V0 / "images", tmp_path / name, *options, "--workers", 0)
    assert ran.code == 0, ran.err
    old, new = files(v0 / name), files(tmp_path / name)
    if name == "resident":  # a manifest's digest of the data depends on where the parts end
        assert json.loads(old.pop("manifest.json")).keys() == json.loads(new.pop("manifest.json")).keys()
    assert old.items() <= new.items()


# ---- the teacher cache


def settings(**changes: object) -> list[str]:
    """Everything that decides what the old cache holds, as --set."""
    values: dict[str, object] = {
        "data.train": V0 / "resident",
        "data.val": V0 / "resident",
        "data.backend": "resident",
        "data.batch_size": 4,
        "data.device": "cpu",
        "views.family": "pad_crop",
        "views.padding": 2,
        "views.count": 2,
        "student.model": "configs/digits/tiny.py:tiny",
        "student.image_size": 8,
        "teacher.model": "configs/digits/tiny.py:tiny",
        "teacher.checkpoint": V0 / "teacher.safetensors",
        "teacher.image_size": 8,
        "teacher.mode": "cached",
        "loss.kd": 1,
        "loss.dcd": 1,
        "loss.feat_dim": 16,
        "train.epochs": 3,
        "train.log_every": 1,
        "eval.crop_ratio": 1.0,
        "run.trackers": "[]",
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def train(tmp_path: Path, **changes: object) -> Any:
    (tmp_path / "config.yaml").write_text("{}\n")
    return run_program("fastdcd/train.py", "--config", tmp_path / "config.yaml", "--set", *settings(**changes))


@pytest.mark.parametrize("dtype", ["fp16", "uint8"])
def test_a_cache_opens_holds_and_teaches(v0: Path, tmp_path: Path, dtype: str) -> None:
    cache = v0 / f"cache-{dtype}"
    before = files(cache)
    arguments = ["--config", tmp_path / "config.yaml", "--set", *settings(**cache_keys(cache, dtype))]
    (tmp_path / "config.yaml").write_text("{}\n")
    for command, said in (("verify", "2 of 2 views are complete"), ("fill", "2 views of 20 rows")):
        ran = run_program("tools/cache_teacher.py", command, *arguments)
        assert ran.code == 0 and said in ran.out, ran.err
    ran = train(tmp_path, **cache_keys(cache, dtype), **{"run.dir": tmp_path / "run"})
    assert ran.code == 0, ran.err
    assert {name: data for name, data in files(cache).items() if not name.endswith(".lock")} == before


def cache_keys(cache: Path, dtype: str) -> dict[str, object]:
    return {"cache.path": cache, "cache.dtype": dtype}


@pytest.mark.parametrize("dtype", CODECS)
def test_features_become_the_same_bytes_and_features(dtype: str) -> None:
    features, stored = torch.tensor(TABLES["features"]), torch.tensor(TABLES["codecs"][dtype], dtype=torch.uint8)
    assert torch.equal(CODECS[dtype].encode(features), stored)
    error = (CODECS[dtype].decode(stored) - features).abs().max()
    assert error <= {"fp32": 0, "fp16": 0.004, "bf16": 0.032, "uint8": 0.04}[dtype]


def test_a_view_written_anew_is_the_old_one(v0: Path, tmp_path: Path) -> None:
    old = TeacherCache.open(v0 / "cache-fp16")
    new = TeacherCache.create(tmp_path / "cache", old.manifest, old.classifier())
    ids = torch.arange(20)
    for view in range(2):
        new.view(view).start()
        new.view(view).write(ids, old.manifest.codec.decode(old.view(view).read(ids)))
        new.flush()
        new.view(view).finish()
    assert files(tmp_path / "cache") == files(v0 / "cache-fp16")


def test_a_view_that_was_begun_is_finished(v0: Path, tmp_path: Path) -> None:
    shutil.copytree(v0 / "cache-begun", tmp_path / "cache")
    done = np.load(tmp_path / "cache" / "view-000.done.npy").astype(bool)
    assert 0 < done.sum() < 20
    rows = np.load(tmp_path / "cache" / "view-000.npy")[done]
    (tmp_path / "config.yaml").write_text("{}\n")
    arguments = ["--config", tmp_path / "config.yaml", "--set", *settings(**{"cache.path": tmp_path / "cache"})]
    ran = run_program("tools/cache_teacher.py", "fill", *arguments)
    assert ran.code == 0, ran.err
    decode = CODECS["fp16"].decode
    again = np.load(tmp_path / "cache" / "view-000.npy")[done]  # its chunks are done whole, on this processor
    assert torch.allclose(decode(torch.from_numpy(again)), decode(torch.from_numpy(rows)), atol=1e-2)
    assert not (tmp_path / "cache" / "view-000.done.npy").exists()


# ---- a run


def test_a_run_goes_on_from_its_checkpoint(v0: Path, tmp_path: Path) -> None:
    """Step 8 shows the loss that the whole run had there: weights, plan and cached features are those."""
    shutil.copytree(v0 / "run", tmp_path / "run")
    keys = {**cache_keys(V0 / "cache-fp16", "fp16"), "run.dir": tmp_path / "run", "train.resume": "auto"}
    ran = train(tmp_path, **keys)
    assert ran.code == 0 and "done: top-1" in ran.out, ran.err
    lines = metric_lines(tmp_path / "run", "train")
    whole = [json.loads(line) for line in (v0 / "whole-run-metrics.jsonl").read_text().splitlines()]
    whole = [line for line in whole if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == list(range(1, 16))
    assert lines[7]["loss"] == pytest.approx(whole[7]["loss"], rel=1e-3)
    assert lines[7]["lr"] == whole[7]["lr"]
    assert whole[0].keys() <= lines[7].keys()


def test_fingerprints_without_a_dataset_of_their_own(v0: Path) -> None:
    from pipelines.loaders.dali_loader import DECODE_GPU

    with open_loader("synthetic", Path("20x2"), LoaderOptions()) as loader:
        assert loader.fingerprint == {"backend": "synthetic"}
    with open_loader("replay:resident", v0 / "resident", LoaderOptions()) as loader:
        golden = json.loads((v0 / "fingerprints.json").read_text())["resident"]
        assert {"data.index": loader.index.digest, **loader.fingerprint} == {**golden, "replayed": "4"}
    assert [DECODE_GPU.format(share) for share in (0.65, 0.0, 1.0)] == [
        f"gpu, {share} by the engine" for share in ("0.65", "0", "1")
    ]
