"""The pages about sources, destinations and other tools: their commands run as printed, the keys they name exist."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from conftest import ROOT, Digits, ObjectStore, forget_accelerate, run_program
from PIL import Image
from servers import point_hub_at, serve
from test_convert import cifar_batch, make_cifar
from test_sources import (
    Images,
    by_number,
    flat_folder,
    hugging_face_root,
    kaggle_root,
    small_images,
    tiny_imagenet,
    torchvision_root,
    write,
)

from fastdcd import config_file, models, weights

DOCS = ROOT / "docs"
BUCKET = "my-bucket"  # of the pages


def sections(page: str) -> dict[str, list[str]]:
    """The shell commands of a page's indented blocks, by heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("    "):
            found.setdefault(heading, []).append(line.strip())
    return found


def run(line: str) -> None:
    """A command as it is printed, in this process."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-c"]:
        exec(compile(words[2], line, "exec"), {})
        return
    program = words[words.index("launch") + 1 :] if words[0] == "accelerate" else words[1:]
    done = run_program(*program)
    forget_accelerate()
    assert done.code == 0, (line, done.err)


@pytest.fixture(scope="module")
def images(photographs: list[Path]) -> Images:
    return small_images(photographs)


# ---- what the commands of a section read


def mine(root: Path, images: Images) -> None:
    for part in ("train", "val"):
        write(root / "data/mine" / part, images)
    shutil.make_archive(str(root / "data/mine"), "zip", root / "data", "mine")


def kaggle(root: Path, images: Images) -> None:
    kaggle_root(root / "k", images)
    shutil.make_archive(str(root / "imagenet-object-localization-challenge"), "zip", root / "k")


def web_dataset(root: Path, images: Images) -> None:
    for part in range(2):
        (root / "data").mkdir(exist_ok=True)
        shutil.move(by_number(root / f"made{part}", images), root / f"data/imagenet1k-train-{part:04d}.tar")


def tiny(root: Path, images: Images) -> None:
    tiny_imagenet(root / "data/tiny-imagenet-200", images)
    folders = {f"{name.split('/')[0]}/images/{name.split('/')[1]}": data for name, data in images.items()}
    write(root / "data/tiny-imagenet-200/train", folders)


def cifar(root: Path, images: Images) -> None:
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    batch = cifar_batch(pixels, [0, 1, 0, 1], [f"{at}.png" for at in range(4)])
    (root / "data").mkdir()
    meta = {b"fine_label_names": [b"apple", b"bear"]}
    make_cifar(root / "data/cifar-100-python.tar.gz", {"meta": meta, "train": batch, "test": batch})


SOURCES: dict[str, Callable[[Path, Images], Any]] = {
    "Class folders": mine,
    "Kaggle's ImageNet": kaggle,
    "torchvision's ImageNet root, and the bare tars": lambda root, images: torchvision_root(
        root / "data/imagenet", images
    ),
    "Hugging Face parquet": lambda root, images: hugging_face_root(root / "data/imagenet-1k", images),
    "WebDataset": web_dataset,
    "Flat folders": lambda root, images: shutil.move(
        flat_folder(root / "f", images), _folder(root / "data") / "flat"
    ),
    "Tiny ImageNet": tiny,
    "CIFAR": cifar,
}


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


ADDRESSES = "Addresses: S3, GS, HTTPS, HF"


@pytest.mark.parametrize("heading", SOURCES)
def test_the_commands_of_every_source(
    heading: str, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SOURCES[heading](tmp_path, images)
    monkeypatch.chdir(tmp_path)
    for line in sections("sources.md")[heading]:
        run(line)


def test_no_section_of_the_sources_is_left_out() -> None:
    assert list(sections("sources.md")) == [*SOURCES, ADDRESSES]
    text = (DOCS / "sources.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-")
        for line in text.splitlines()
        if line[:3] == "## "
    }
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?:sources\.md)#([\w-]+)\)", page.read_text()):
            assert target in anchors, (page.name, target)
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


@pytest.fixture
def bucket(object_store: ObjectStore) -> Iterator[ObjectStore]:
    """The bucket that the pages name."""
    with contextlib.suppress(Exception):
        object_store.client.create_bucket(Bucket=BUCKET)
    store = ObjectStore(object_store.url, BUCKET, object_store.client)
    yield store
    for each in store.keys():  # noqa: SIM118
        store.client.delete_object(Bucket=BUCKET, Key=each)


def test_the_commands_of_addresses(
    images: Images, bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hugging_face_root(tmp_path / "hub", images)
    bucket.upload(tmp_path / "hub", "imagenet-1k")
    mine(tmp_path, images)
    shutil.move(tmp_path / "data/mine.zip", _folder(tmp_path / "web/sets") / "mine.zip")
    with serve(tmp_path / "web") as web, serve(tmp_path / "hub", hub=True) as endpoint:
        point_hub_at(endpoint, monkeypatch)
        for line in sections("sources.md")[ADDRESSES]:
            run(line.replace("https://example.org", web))


def test_the_commands_of_every_destination(
    digits: Digits, bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for number in range(16):
            path = _folder(tmp_path / "data/mine" / part / "ab"[number % 2]) / f"{number}.png"
            Image.new("RGB", (40, 36), (15 * number, 9, 99)).save(path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("data/digits-resident").symlink_to(digits.resident)
    _folder(tmp_path / "runs/digits/teacher")
    ((name, checkpoint),) = config_file.load(Path("configs/digits/kd.yaml")).teacher.members
    assert checkpoint is not None
    weights.save(checkpoint, models.build(name, classes=10).original_state_dict())
    for lines in sections("destinations.md").values():
        for line in lines:
            run(line)
    assert Path("runs/student/export/model.onnx").is_file() and Path("report.html").is_file()
    assert len([*Path("shared/mine-shards").rglob("shard-*.tar")]) == 2


# ---- keys


def known(key: str) -> bool:
    node: Any = config_file.config_type()
    for part in key.split("."):
        found = [hint for hint in (node, *get_args(node)) if is_dataclass(hint)]  # of X | None, X
        if not found or part not in {each.name for each in fields(found[0])}:
            return False
        node = get_type_hints(found[0])[part]
    return True


def test_keys_that_are_mapped_from_other_tools_exist() -> None:
    text = (DOCS / "from-other-tools.md").read_text()
    assert (
        known("views.augment.randaugment.magnitude") and not known("views.augment.none") and not known("run.name")
    )
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    keys = {key for row in rows for key in re.findall(r"`(\w+(?:\.\w+)+)(?:`|: )", " ".join(row[1:]))}
    assert len(rows) > 50 and len(keys) > 45
    assert not [key for key in keys if not known(key)]
    sections_of = {each.name for each in fields(config_file.config_type())}
    assert {key.split(".")[0] for key in keys} <= sections_of
