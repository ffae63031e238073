"""Training on augmented and mixed views, with every loss: a cached teacher is the online one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import ranks
from conftest import Digits, metric_lines, run_program
from test_processes import run

from fastdcd import config_file
from fastdcd.cache.store import CacheMismatch
from fastdcd.losses.terms import TERMS
from fastdcd.train import train

MIXED = {
    "randaugment": {"space": "timm", "magnitude": 9, "magnitude_std": 0.5},
    "color_jitter": [0.4, 0.4, 0.4, 0.1],
    "grayscale": 0.2,
    "erasing": 0.3,
    "mixup": 0.8,
    "cutmix": 1.0,
}
VIEWS: dict[str, dict[str, Any]] = {
    "mixed": {"augment": MIXED},
    "torchvision": {"augment": {"randaugment": {"magnitude": 15}, "erasing": 0.5, "erasing_fill": "random"}},
    "alternating": {"flip": "alternating", "augment": {"cutmix": 0.5, "mix_probability": 0.5}},
}
LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"kd": 1.0, "kd_standardize": True, "kd_temperature": 2.0, "label_smoothing": 0.1},
    "dkd": {"dkd": 1.0, "dkd_warmup": 2},
    "dist": {"dist": 1.0},
    "feature": {"feature": 1.0, "feature_distance": "mse"},
    "all": {"ce": 0.1, "kd": 1.0, "dcd": 1.0, "dkd": 1.0, "dist": 1.0, "feature": 1.0, "mask_same_class": True},
}


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(run_dir, "train")]


def student(run_dir: Path) -> bytes:
    return (run_dir / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def caches(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of two views in fp32 for each kind of views."""
    found = {}
    for name, views in VIEWS.items():
        folder = tmp_path_factory.mktemp(name)
        sections = settings(folder / "cache", "cached", views, LOSSES["all"])
        ran = run_program("tools/cache_teacher.py", "fill", "--config", digits.file(folder / "x.yaml", **sections))
        assert ran.code == 0, ran.err
        found[name] = folder / "cache"
    return found


def settings(cache: Path, mode: str, views: dict[str, Any], loss: dict[str, Any]) -> dict[str, Any]:
    return {
        "loss": loss,
        "teacher": {"mode": mode},
        "views": {"count": 2, **views},
        "cache": {"path": str(cache), "dtype": "fp32"},
    }


@pytest.mark.parametrize(
    ("views", "loss"), [*(("mixed", name) for name in LOSSES), ("torchvision", "all"), ("alternating", "all")]
)
def test_cached_is_online_also_when_resumed_within_an_epoch(
    digits: Digits, tmp_path: Path, caches: dict[str, Path], views: str, loss: str
) -> None:
    online, cached = (settings(caches[views], mode, VIEWS[views], LOSSES[loss]) for mode in ("online", "cached"))
    train(digits.config(tmp_path / "online", **online))
    assert not train(digits.config(tmp_path / "cached", train={"max_steps": 11}, **cached))["finished"]
    train(digits.config(tmp_path / "cached", train={"resume": "auto"}, **cached))
    assert losses(tmp_path / "cached") == losses(tmp_path / "online")
    assert student(tmp_path / "cached") == student(tmp_path / "online")


def test_all_terms_are_tried() -> None:
    assert {name for loss in LOSSES.values() for name in loss} >= set(TERMS)


def test_cached_is_online_on_two_processes(digits: Digits, tmp_path: Path) -> None:
    """Batches of 50 are 25 pairs, shared unevenly. The online teacher fills the cache that the other run reads, which
    stops and resumes in the middle of an epoch."""
    files = {}
    for mode in ("fill", "cached"):
        (tmp_path / mode).mkdir()
        sections = settings(tmp_path / "cache", mode, VIEWS["mixed"], LOSSES["all"])
        files[mode] = digits.file(
            tmp_path / mode / "x.yaml", **{**sections, "data": {"batch_size": 50}, "train": {"epochs": 2}}
        )
    run(2, ranks.run_training, files["fill"], [])
    run(2, ranks.run_training, files["cached"], ["train.max_steps=14"])
    run(2, ranks.run_training, files["cached"], ["train.resume=auto"])
    assert losses(tmp_path / "cached" / "run") == losses(tmp_path / "fill" / "run")
    assert student(tmp_path / "cached" / "run") == student(tmp_path / "fill" / "run")


def test_the_same_batches_on_one_process_and_on_two(digits: Digits, tmp_path: Path) -> None:
    """Mixed views by a network that treats rows one by one: losses agree, whoever holds the rows."""
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, num_classes))\n"
    )
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        sections = settings(tmp_path / "none", "online", VIEWS["mixed"], LOSSES["all"])
        file = digits.file(
            tmp_path / str(count) / "x.yaml",
            **{**sections, "data": {"batch_size": 50}, "student": {"model": f"{net}:net"}, "train": {"epochs": 1}},
        )
        run(count, ranks.run_training, file, [])
    assert losses(tmp_path / "1/run") == pytest.approx(losses(tmp_path / "2/run"), rel=1e-4)


def test_a_cache_of_other_augmentation_is_refused(digits: Digits, tmp_path: Path, caches: dict[str, Path]) -> None:
    for views, message in (
        ({"augment": {**MIXED, "mixup": 0.2}}, r"views.augment.mix = mixup 0.8, .*this run has mixup 0.2"),
        ({}, r"views.augment.randaugment = timm, .*this run has None"),
    ):
        with pytest.raises(CacheMismatch, match=message):
            train(digits.config(tmp_path / "run", **settings(caches["mixed"], "cached", views, LOSSES["kd"])))


def test_mistakes_in_the_section_are_named(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml")
    for override, message in (
        ("views.augment.mixop=0.2", "views.augment.mixop: no such key; did you mean views.augment.mixup"),
        ("views.augment.randaugment.magnitude=40", "magnitude: got 40.*expected 0 to 30"),
        ("views.augment.cutmix=-1", "cutmix: got -1.*expected an alpha from 0"),
        ("views.flip=sometimes", "views.flip"),
    ):
        with pytest.raises(ValueError, match=message):
            config_file.load(file, [override])
    with pytest.raises(
        ValueError, match=r"data\.batch_size: got 63, expected an even number: views\.augment mixes"
    ):
        config_file.load(file, ["views.augment.mixup=0.2", "data.batch_size=63"])
