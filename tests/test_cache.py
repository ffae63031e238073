"""The teacher cache as files: formats, damage, repair, and two who want to write."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOTH, ROOT, Digits, metric_lines, run_program
from torch import nn

from fastdcd import models, weights
from fastdcd.cache.manifest import BLOCK_ROWS, CODECS, CacheMismatch, Manifest
from fastdcd.cache.store import TeacherCache

CACHE = "tools/cache_teacher.py"


@pytest.fixture
def filled(digits: Digits, tmp_path: Path) -> tuple[Path, Path]:
    """A config and its filled cache of two views."""
    sections = {"loss": BOTH, "teacher": {"mode": "cached"}, "views": {"count": 2}}
    file = digits.file(tmp_path / "x.yaml", cache={"path": str(tmp_path / "cache")}, **sections)
    ran = run_program(CACHE, "fill", "--config", file)
    assert ran.code == 0, ran.err
    return file, tmp_path / "cache"


def rows(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


@pytest.mark.parametrize("dtype", CODECS)
def test_codecs(dtype: str) -> None:
    """What comes back is as near as the format allows, whatever the signs and scales of the rows."""
    torch.manual_seed(0)
    features = torch.randn(300, 65) * torch.logspace(-3, 3, 300)[:, None]
    features[7] = 0.0
    features[8] = 3.25  # constant
    codec = CODECS[dtype]
    stored = codec.encode(features)
    assert stored.dtype == torch.uint8 and stored.shape == (300, codec.row_bytes(65))
    back = codec.decode(stored)
    spread = features.amax(1) - features.amin(1)
    largest = features.abs().amax(1)
    budget = {
        "fp32": torch.zeros(300),
        "fp16": largest * 2**-11 + 2**-25,
        "bf16": largest * 2**-8,
        "uint8": spread / 255 * 0.5 + largest * 1e-6,
    }[dtype]
    assert ((back - features).abs().amax(1) <= budget * 1.001).all()


def test_a_cache_is_small_beyond_its_features() -> None:
    manifest = Manifest(rows=1_281_167, dim=512, views=1, dtype="fp16", fingerprint={})
    assert manifest.view_bytes < 1.01 * 1_281_167 * 512 * 2


def test_logits_come_from_the_teachers_own_layer(digits: Digits, filled: tuple[Path, Path]) -> None:
    network = models.build("cifar:resnet8", classes=10)
    weights.load_into(network, digits.teacher)
    features = torch.randn(5, 64)
    layer = TeacherCache.open(filled[1]).classifier()
    assert torch.equal(layer(features), network.classifier(features))


def test_verify_and_repair(filled: tuple[Path, Path]) -> None:
    file, cache = filled
    assert run_program(CACHE, "verify", "--config", file).code == 0
    whole = (cache / "view-001.npy").read_bytes()
    spoilt = bytearray(whole)
    spoilt[-50_000] ^= 4  # one bit
    (cache / "view-001.npy").write_bytes(spoilt)
    ran = run_program(CACHE, "verify", "--config", file)
    assert ran.code == 1 and "view 1: 1 blocks" in ran.out and "--repair" in ran.out
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and "view 1: 1 blocks" in ran.err and "--repair" in ran.err
    ran = run_program(CACHE, "fill", "--repair", "--config", file)
    assert ran.code == 0 and "written again" in ran.out
    assert (cache / "view-001.npy").read_bytes() == whole
    assert run_program(CACHE, "verify", "--config", file).code == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_header(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[1:])


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("view-000.npy", cut),
    ("view-000.npy", spoil),
    ("view-000.npy", spoil_header),
    ("view-000.npy", empty),
    ("view-000.npy", Path.unlink),
    ("view-000.crc32.npy", spoil),
    ("view-000.crc32.npy", empty),
    ("classifier.safetensors", cut),
    ("classifier.safetensors", spoil),
    ("classifier.safetensors", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_is_never_read_and_is_repaired(
    filled: tuple[Path, Path], name: str, damage: Callable[[Path], None]
) -> None:
    file, cache = filled
    whole = {path.name: path.read_bytes() for path in cache.iterdir()}
    damage(cache / name)
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and "fill --repair" in ran.err and "Traceback" not in ran.err, ran.err
    ran = run_program(CACHE, "verify", "--config", file)
    assert ran.code == 1 and ("rows 0-499" in ran.out or name in ran.out), ran.out
    assert run_program(CACHE, "fill", "--repair", "--config", file).code == 0
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == whole


def test_only_damaged_rows_are_filled_again(tmp_path: Path) -> None:
    """A view that is cut short keeps the rows before the cut."""
    manifest = Manifest(rows=3 * BLOCK_ROWS, dim=8, views=1, dtype="fp32", fingerprint={})
    cache = TeacherCache.create(tmp_path / "c", manifest, nn.Linear(8, 3))
    features = torch.randn(manifest.rows, 8)
    cache.view(0).start()
    cache.view(0).write(torch.arange(manifest.rows), features)
    cache.flush()
    cache.view(0).finish()
    path = tmp_path / "c" / "view-000.npy"
    path.write_bytes(path.read_bytes()[: -BLOCK_ROWS * 32 - 100])
    damaged = cache.view(0).verify()
    assert damaged == [range(BLOCK_ROWS, 2 * BLOCK_ROWS), range(2 * BLOCK_ROWS, 3 * BLOCK_ROWS)]
    cache.view(0).reopen(damaged)
    cache.view(0).start()
    assert (cache.view(0).done() == (np.arange(manifest.rows) < BLOCK_ROWS)).all()
    again = torch.arange(BLOCK_ROWS, manifest.rows)
    cache.view(0).write(again, features[again])
    cache.flush()
    cache.view(0).finish()
    assert torch.equal(manifest.codec.decode(cache.view(0).load(torch.device("cpu"))), features)


def test_rows_that_are_gone_are_not_done(tmp_path: Path) -> None:
    """Features of a half-filled view were deleted, its marks were not."""
    manifest = Manifest(rows=BLOCK_ROWS, dim=8, views=1, dtype="fp32", fingerprint={})
    cache = TeacherCache.create(tmp_path / "c", manifest, nn.Linear(8, 3))
    cache.view(0).start()
    cache.view(0).write(torch.arange(100), torch.randn(100, 8))
    cache.flush()
    (tmp_path / "c" / "view-000.npy").unlink()
    cache = TeacherCache.open(tmp_path / "c")
    cache.view(0).start()
    assert not cache.view(0).done().any()


def test_a_full_disk(digits: Digits, tmp_path: Path) -> None:
    """Room is taken before rows are written, one line says what is missing, and the fill goes on once there is some."""
    sections = {
        "loss": BOTH,
        "teacher": {"mode": "cached"},
        "views": {"count": 2},
        "cache": {"path": f"{tmp_path}/c"},
    }
    file = digits.file(tmp_path / "x.yaml", **sections)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # to the file system a full disk: it takes no more
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        ran = run_program(CACHE, "fill", "--config", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 1 and "no space left" in ran.err and "Traceback" not in ran.err, ran.err
    assert not list((tmp_path / "c").glob("view-*"))
    assert run_program(CACHE, "fill", "--config", file).code == 0
    assert run_program(CACHE, "verify", "--config", file).code == 0


def test_the_live_teacher_is_asked(filled: tuple[Path, Path]) -> None:
    """Rows that no checksum guards any more (someone wrote them anew) do not get past the live check."""
    file, cache = filled
    array = np.load(cache / "view-001.npy", mmap_mode="r+")
    array[:] = np.roll(np.array(array), 1, axis=0)
    array.flush()
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and "least cosine" in ran.err


def test_two_fills_at_once_are_refused(filled: tuple[Path, Path]) -> None:
    file, cache = filled
    lock = TeacherCache.lock_for_filling(cache)
    for program in ((CACHE, "fill"), ("fastdcd/train.py", "--set", "teacher.mode=fill")):
        ran = run_program(*program, "--config", file)
        assert ran.code == 2 and "another process is filling" in ran.err
    lock.close()
    assert run_program(CACHE, "fill", "--config", file).code == 0


def test_an_incomplete_view_is_not_read(filled: tuple[Path, Path]) -> None:
    file, cache = filled
    (cache / "view-001.crc32.npy").unlink()
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and "1 of 2 views are not complete" in ran.err


def test_rows_count_as_done_only_after_a_flush(tmp_path: Path) -> None:
    manifest = Manifest(rows=2 * BLOCK_ROWS + 5, dim=8, views=1, dtype="fp32", fingerprint={})
    cache = TeacherCache.create(tmp_path / "c", manifest, nn.Linear(8, 3))
    cache.view(0).start()
    ids = torch.arange(0, manifest.rows, 2)
    features = torch.randn(len(ids), 8)
    cache.view(0).write(ids, features)
    assert not cache.view(0).done().any()
    cache.flush()
    assert (cache.view(0).done() == (np.arange(manifest.rows) % 2 == 0)).all()
    cache.view(0).write(ids + 1 - 2 * (ids + 1 == manifest.rows), torch.randn(len(ids), 8))
    cache.flush()
    cache.view(0).finish()
    assert cache.view(0).complete() and cache.view(0).verify() == []
    wanted = torch.tensor([4, 0, 2 * BLOCK_ROWS])
    read = manifest.codec.decode(TeacherCache.open(tmp_path / "c").view(0).read(wanted))
    assert torch.equal(read[:2], features[[2, 0]]), "rows in the order asked for"


def test_a_cache_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    manifest = Manifest(rows=10**12, dim=2048, views=50, dtype="fp32", fingerprint={})
    with pytest.raises(ValueError, match=r"takes .*B and .*B are free"):
        TeacherCache.create(tmp_path / "c", manifest, nn.Linear(2048, 3))
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_cache_of_something_else_names_both_values(filled: tuple[Path, Path]) -> None:
    cache = TeacherCache.open(filled[1])
    fingerprint = {**cache.manifest.fingerprint, "views.seed": "5"}
    other = Manifest(rows=500, dim=64, views=2, dtype="fp16", fingerprint=fingerprint)
    with pytest.raises(CacheMismatch, match=r"views\.seed = 0, this run has 5"):
        cache.check(other)


def test_a_later_format_is_not_guessed_at(filled: tuple[Path, Path]) -> None:
    manifest = filled[1] / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:100])
    ran = run_program("fastdcd/train.py", "--config", filled[0])
    assert ran.code == 2 and "manifest.json: damaged" in ran.err
    manifest.write_text(whole)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "fastdcd-cache-9"}))
    ran = run_program("fastdcd/train.py", "--config", filled[0])
    assert ran.code == 2 and "format" in ran.err


def test_estimate_writes_nothing(digits: Digits, tmp_path: Path) -> None:
    sections = {"loss": BOTH, "teacher": {"mode": "cached"}, "cache": {"path": str(tmp_path / "cache")}}
    file = digits.file(tmp_path / "x.yaml", **sections)
    ran = run_program(CACHE, "estimate", "--seconds", 0.2, "--config", file)
    assert ran.code == 0, ran.err
    for line in ("rows x views", "500 x 3", "time to fill", "teacher's share", "breaks even", "advice"):
        assert line in ran.out
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(tmp_path)


def test_views_filled_together_are_views_filled_alone(digits: Digits, tmp_path: Path) -> None:
    """Decoding an image once for several views changes no byte, whatever was there before."""
    for passes in (1, 2, 5):
        sections = {
            "loss": BOTH,
            "teacher": {"mode": "cached"},
            "views": {"count": 5},
            "cache": {"path": str(tmp_path / f"cache-{passes}"), "views_a_pass": passes},
        }
        file = digits.file(tmp_path / "x.yaml", **sections)
        if passes == 2:  # a view that was begun, with some rows done, beside one that was not
            assert run_program(CACHE, "fill", "--config", file).code == 0
            cache = TeacherCache.open(tmp_path / "cache-2")
            cache.view(3).reopen([range(100, 300)])
            (tmp_path / "cache-2" / "view-004.npy").unlink()
            (tmp_path / "cache-2" / "view-004.crc32.npy").unlink()
        ran = run_program(CACHE, "fill", "--config", file)
        assert ran.code == 0, ran.err
        for view in range(5):
            name = f"view-{view:03d}.npy"
            assert (tmp_path / f"cache-{passes}" / name).read_bytes() == (tmp_path / "cache-1" / name).read_bytes()


def test_a_whole_view_is_its_rows(filled: tuple[Path, Path]) -> None:
    cache = TeacherCache.open(filled[1])
    assert torch.equal(cache.view(1).load(torch.device("cpu")), cache.view(1).read(torch.arange(500)))


def test_several_teachers_in_one_cache(digits: Digits, tmp_path: Path) -> None:
    """Features side by side, the mean of the logits; cached and online agree; another second teacher is refused."""
    from fastdcd import experiment
    from fastdcd.train import train

    torch.manual_seed(1)
    for name in ("second", "third"):
        network = models.build("cifar:resnet14", classes=10)
        weights.save(tmp_path / f"{name}.safetensors", network.original_state_dict())
    files = [str(digits.teacher), str(tmp_path / "second.safetensors")]
    teacher: dict[str, Any] = {"model": ["cifar:resnet8", "cifar:resnet14"], "checkpoint": files, "evaluate": True}
    curves = []
    for mode in ("online", "cached"):
        sections: dict[str, Any] = {
            "loss": BOTH,
            "teacher": {**teacher, "mode": mode},
            "cache": {"path": str(tmp_path / "cache"), "dtype": "fp32"},
            "train": {"epochs": 2},
        }
        (tmp_path / mode).mkdir()
        file = digits.file(tmp_path / mode / "x.yaml", **sections)
        if mode == "cached":
            assert run_program(CACHE, "fill", "--config", file).code == 0
        ran = run_program("fastdcd/train.py", "--config", file)
        assert ran.code == 0, ran.err
        assert re.search(r"teacher +cifar:resnet8 \+ cifar:resnet14, .*; top-1", ran.out)
        curves.append([line["loss"] for line in metric_lines(tmp_path / mode / "run", "train")])
    assert curves[0] == curves[1]
    assert TeacherCache.open(tmp_path / "cache").manifest.dim == 128

    cfg = digits.config(tmp_path / "other", **sections)
    both = experiment.build_teacher(cfg, 10, experiment.make_accelerator(cfg))
    assert both is not None
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    alone = []
    for model, checkpoint in zip(teacher["model"], files, strict=True):
        network = models.build(model, classes=10).eval()
        weights.load_into(network, Path(checkpoint))
        alone.append(network(models.normalize_for(model)(images)))
    assert torch.allclose(both.features(images), torch.cat([each.features for each in alone], 1), atol=1e-5)
    assert torch.allclose(both(images), (alone[0].logits + alone[1].logits) / 2, atol=1e-5)

    sections["teacher"]["checkpoint"] = [files[0], str(tmp_path / "third.safetensors")]
    with pytest.raises(ValueError, match=r"teacher\.weights"):
        train(digits.config(tmp_path / "third", **sections))


@pytest.mark.parametrize("settings", [["teacher.compile=true"], ["teacher.precision=bf16", "cache.dtype=bf16"]])
def test_a_faster_teacher_fills_the_same_features(digits: Digits, tmp_path: Path, settings: list[str]) -> None:
    """Within the tolerance of the live check. A compiled teacher's cache is read without compiling one."""
    model = f"{ROOT}/configs/digits/tiny.py:tiny"  # compiles in a few seconds
    weights.save(tmp_path / "t.safetensors", models.build(model, classes=10).original_state_dict())
    teacher = {"mode": "cached", "model": model, "checkpoint": str(tmp_path / "t.safetensors")}
    sections = {"loss": BOTH, "teacher": teacher, "views": {"count": 1}, "train": {"max_steps": 1}}
    for name in ("plain", "fast"):
        (tmp_path / name).mkdir()
        file = digits.file(tmp_path / name / "x.yaml", **sections, cache={"path": str(tmp_path / name / "cache")})
        ran = run_program(CACHE, "fill", "--config", file, *(["--set", *settings] if name == "fast" else []))
        assert ran.code == 0, ran.err
    plain, fast = (TeacherCache.open(tmp_path / name / "cache") for name in ("plain", "fast"))
    features = [cache.manifest.codec.decode(cache.view(0).load(torch.device("cpu"))) for cache in (plain, fast)]
    assert torch.nn.functional.cosine_similarity(features[0], features[1]).min() > fast.manifest.codec.cosine
    kept = [each for each in settings if each != "teacher.compile=true"]
    ran = run_program("fastdcd/train.py", "--config", file, *(["--set", *kept] if kept else []))
    assert ran.code == 0, ran.err
