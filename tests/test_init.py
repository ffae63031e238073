"""`fastdcd init`: from a folder of images to a distilled student by the commands that it prints, run as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import Digits, Ran, forget_accelerate, run_program
from PIL import Image

from fastdcd import config_file, pretrained, weights
from fastdcd.__main__ import PROGRAMS
from fastdcd.models import build

PATHS = {
    name: program.module.replace("fastdcd.tools", "tools").replace(".", "/") + ".py"
    for name, program in PROGRAMS.items()
}


def run(line: str) -> Ran:
    """A command as it is printed, by the script behind it."""
    fastdcd, name, *arguments = shlex.split(line)
    assert fastdcd == "fastdcd"
    ran = run_program(PATHS[name], *arguments)
    forget_accelerate()
    return ran


def printed_commands(text: str) -> list[str]:
    return re.findall(r"^    (fastdcd .*)$", text, re.M)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders of 24 + 8 images of 40 to 48 x 36 pixels."""
    for part, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "my pictures" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                color = (100 * label + 8 * number, 20 * label, 9 * number)
                Image.new("RGB", (40 + number % 8, 36), color).save(folder / f"{number}.png")
    return tmp_path / "my pictures"


def test_the_printed_commands_train_a_teacher_and_distil(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits.resident)
    ran = run(
        "fastdcd init data/digits --epochs 2 --out configs/mine --student cifar:resnet8 --teacher cifar:resnet8"
    )
    assert ran.code == 0, ran.err
    assert "resident arrays, 500 + 200 images of 10 classes, 8 px" in ran.out
    lines = printed_commands(ran.out)
    assert len(lines) == 2
    for line in lines:
        done = run(line)
        assert done.code == 0, (line, done.err)
    (summary,) = (json.loads(path.read_text()) for path in Path("runs").glob("*/student/summary.json"))
    assert summary["finished"] and summary["teacher_images"] == 500, "one view of each, then the cache"
    again = run("fastdcd init data/digits --out configs/mine")
    assert again.code == 2 and "student.yaml: is there already" in again.err


def test_a_published_teacher_of_other_classes_teaches_by_its_features(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(
        f"fastdcd init '{pictures}' --teacher timm:test_resnet --student timm:test_resnet --size 32 --epochs 3"
    )
    assert ran.code == 0, ran.err
    assert "class folders, 24 + 8 images of 2 classes, 36 px" in ran.out
    lines = printed_commands(ran.out)
    assert lines[0].startswith("fastdcd cache fill --config ") and lines[1].startswith("fastdcd train --config ")
    file = Path("configs/my-pictures/student.yaml")
    cfg = config_file.load(file)
    assert (cfg.teacher.image_size, cfg.teacher.classifier, cfg.loss.kd, cfg.loss.dcd) == (160, False, 0, 1)
    published = tmp_path / "published.safetensors"
    weights.save(published, build("timm:test_resnet", classes=1000).original_state_dict())
    monkeypatch.setattr(pretrained, "fetch", lambda *arguments: published)  # as if it had been fetched
    for line in lines:
        done = run(line)
        assert done.code == 0, (line, done.err)
    summary = json.loads(Path("runs/my-pictures/student/summary.json").read_text())
    assert summary["finished"] and summary["teacher_images"] == 0


def test_every_kind_of_data_gets_its_loader(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, says, backend in (
        ("shards", "shards", "torch"),
        ("ffcv", ".beton", "ffcv"),
        ("resident", "resident", "resident"),
    ):
        more = "--size 32" if kind == "resident" else ""
        ran = run(f"fastdcd convert {kind} '{pictures}' {kind} --workers 0 {more}")
        assert ran.code == 0 and f"next: fastdcd init {kind}" in ran.err.splitlines(), ran.err
        ran = run(f"fastdcd init {kind}")
        assert ran.code == 0 and says in ran.out, ran.err
        for name in ("student", "teacher"):
            text = Path(f"configs/{kind}/{name}.yaml").read_text()
            cfg = config_file.load(Path(f"configs/{kind}/{name}.yaml"))
            assert cfg.data.backend == backend and cfg.data.batch_size == 24
            keys = [line for line in text.splitlines() if ":" in line and not line.lstrip().startswith("#")]
            assert sum("#" in line for line in keys) > len(keys) / 3, "comments"
            assert yaml.safe_load(text)["run"]["dir"] == f"runs/{kind}/{name}"


def test_what_cannot_be_begun_says_what_to_do(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/data/train-00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    wrong = {
        f"{tmp_path}/none": "no such folder; expected one that holds train/ and val/",
        f"{tmp_path}/hub": "convert first: fastdcd convert shards",
        f"{tmp_path}/one": "no val/ in it (looked for val, valid, validation, test",
        f"{tmp_path}/other": "it has nothing",
        f"'{pictures}' --teacher timm:no_such_net": "--teacher: got pretrained, but timm has no weights for no_such_net",
        f"'{pictures}' --backend resident": "images.npy",
    }
    for arguments, says in wrong.items():
        ran = run(f"fastdcd init {arguments} --out '{tmp_path}/configs'")
        assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1, (arguments, ran.err)
    assert not (tmp_path / "configs").exists()
    (pictures / "val" / "bright").rename(pictures / "val" / "light")
    ran = run(f"fastdcd init '{pictures}' --out '{tmp_path}/configs'")
    assert ran.code == 2 and "not in both: ['bright', 'light']" in ran.err
