"""Linear probes: frozen features, known figures, and the layouts of published data sets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Digits, forget_accelerate, run_program
from PIL import Image

from fastdcd import linear_probe, models, weights
from fastdcd.linear_probe import Probe
from fastdcd.train import train
from pipelines.base import LoaderOptions
from pipelines.published_datasets import open_pair

PROBE = "tools/linear_probe.py"
# The table's columns after checkpoint and data.
IMAGES, CLASSES, FEATURES, TOP1 = 2, 3, 4, 5


def table(*arguments: object) -> list[list[str]]:
    """Rows of the table that the program prints."""
    ran = run_program(PROBE, *arguments, "--set", "data.device=cpu", "data.workers=0")
    assert ran.code == 0, ran.err
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in ran.out.splitlines()]
    assert lines[0][:2] == ["checkpoint", "data"]
    return lines[2:]


@pytest.fixture(scope="module")
def student(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a well trained student."""
    run = tmp_path_factory.mktemp("student") / "run"
    train(
        digits.config(
            run,
            student={"model": "cifar:wrn-10-2"},
            teacher={"mode": "none"},
            views={"flip": 0},
            train={"epochs": 20},
            eval={"every": 20},
        )
    )
    forget_accelerate()
    return run


@pytest.fixture(scope="module")
def probed(digits: Digits, student: Path) -> float:
    """Top-1 of a probe of the student on its own data."""
    ((*_, top1, _, _),) = table("--checkpoint", student / "student.safetensors", "--data", digits.resident)
    return float(top1)


def test_a_probe_of_a_trained_student_does_as_well_as_its_own_classifier(student: Path, probed: float) -> None:
    own = json.loads((student / "summary.json").read_text())["top1"]
    assert own > 70, "a student worth probing"
    assert probed > own - 5, "200 test images: 5 points are 3 standard deviations of the difference"


def test_an_untrained_network_does_worse(digits: Digits, student: Path, tmp_path: Path, probed: float) -> None:
    torch.manual_seed(0)
    weights.save(tmp_path / "x.safetensors", models.build("cifar:wrn-10-2", classes=10).original_state_dict())
    shutil.copy(student / "config.yaml", tmp_path)
    trained = student / "student.safetensors"
    rows = table("--checkpoint", tmp_path / "x.safetensors", trained, "--data", digits.resident)
    assert float(rows[0][TOP1]) < probed - 5
    assert float(rows[1][TOP1]) == probed, "a row depends on no other, and each run gives the same"


@pytest.fixture
def cfg(digits: Digits) -> Probe:
    return linear_probe.settings(digits.teacher, ["data.device=cpu", "data.workers=0"])


def test_the_network_stays_as_it_is(digits: Digits, cfg: Probe) -> None:
    """BatchNorm statistics above all: features of shifted data must not move them."""
    cpu = torch.device("cpu")
    frozen = linear_probe.load_frozen(cfg.student, digits.teacher, cpu)
    before = weights.digest(frozen.state_dict())
    train_set, test_set = open_pair(digits.resident, LoaderOptions())
    with train_set, test_set:
        found = linear_probe.extract(frozen, train_set, crop_ratio=0.5, device=cpu)
        again = linear_probe.extract(frozen, train_set, crop_ratio=0.5, device=cpu)
    assert weights.digest(frozen.state_dict()) == before
    assert found.features.shape == (500, 64) and torch.equal(found.features, again.features)
    assert torch.equal(found.labels, torch.from_numpy(train_set.index.labels))
    linear_probe.fit(found, classes=10, cfg=cfg)
    assert weights.digest(frozen.state_dict()) == before


def test_the_protocol_is_the_papers(cfg: Probe, tmp_path: Path) -> None:
    assert (cfg.train.epochs, cfg.data.batch_size, cfg.optim.lr) == (120, 64, 0.05)
    assert (cfg.optim.weight_decay, cfg.schedule.milestones, cfg.schedule.gamma) == (5e-4, (30, 60, 90), 0.1)
    assert cfg.student.image_size == 8, "its run's own"
    (tmp_path / "x.pth").touch()
    elsewhere = linear_probe.settings(tmp_path / "x.pth", ["student.model=cifar:vgg8"])
    assert elsewhere.student.image_size == 32, "the paper's"


def test_the_classifier_solves_its_problem(tmp_path: Path) -> None:
    """The gradient of its regularised loss at the end is small: the optimum of a convex problem."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=generator) + 1.5 * torch.eye(3, 5)[labels]
    wanted = ["student.model=none", "train.epochs=300", "schedule.milestones=[100,200]"]
    (tmp_path / "x.pth").touch()
    cfg = linear_probe.settings(tmp_path / "x.pth", wanted)
    classifier = linear_probe.fit(linear_probe.Features(features, labels), classes=3, cfg=cfg)
    classifier.zero_grad()
    loss = torch.nn.functional.cross_entropy(classifier(features), labels)
    loss = loss + 5e-4 / 2 * sum(parameter.square().sum() for parameter in classifier.parameters())
    loss.backward()
    gradients = torch.cat(
        [parameter.grad.flatten() for parameter in classifier.parameters() if parameter.grad is not None]
    )
    assert gradients.abs().max() < 5e-3
    found = linear_probe.accuracy(classifier, linear_probe.Features(features, labels))
    assert found.top1 > 75 and found.top5 == 100


# ---- layouts


def enlarged(path: Path, size: int) -> Image.Image:
    """A digit of 8x8 pixels as size x size, every pixel a block."""
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.NEAREST)


def class_folders(digits: Digits, folder: Path, size: int, suffix: str) -> None:
    for part in ("train", "val"):
        for path in sorted((digits.folder / part).rglob("*.png")):
            out = folder / part / path.parent.name / f"{path.stem}{suffix}"
            out.parent.mkdir(parents=True, exist_ok=True)
            enlarged(path, size).save(out, quality=95)


def stl10(digits: Digits, folder: Path) -> None:
    """As its archive unpacks: labels from 1, pixels channel by channel and column by column."""
    root = folder / "stl10_binary"
    root.mkdir()
    (root / "class_names.txt").write_text("".join(f"digit{number}\n" for number in range(10)))
    for part, ours in (("train", "train"), ("test", "val")):
        paths = sorted((digits.folder / ours).rglob("*.png"))
        labels = np.array([int(path.parent.name) + 1 for path in paths], np.uint8)
        images = np.stack([np.asarray(enlarged(path, 96)) for path in paths])  # [N, row, column, channel]
        labels.tofile(root / f"{part}_y.bin")
        np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tofile(root / f"{part}_X.bin")


def tiny_imagenet(digits: Digits, folder: Path) -> None:
    """As its archive unpacks; the validation set is one folder and a table."""
    for path in sorted((digits.folder / "train").rglob("*.png")):
        name = f"n0{path.parent.name}"
        out = folder / "train" / name / "images" / f"{name}_{path.stem}.JPEG"
        out.parent.mkdir(parents=True, exist_ok=True)
        enlarged(path, 64).save(out, quality=95)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number, path in enumerate(sorted((digits.folder / "val").rglob("*.png"), key=lambda path: path.name)):
        enlarged(path, 64).save(folder / "val" / "images" / f"val_{number}.JPEG", quality=95)
        lines.append(f"val_{number}.JPEG\tn0{path.parent.name}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


@pytest.mark.parametrize(("make", "size", "suffix"), [(stl10, 96, ".png"), (tiny_imagenet, 64, ".JPEG")])
def test_layouts(
    digits: Digits,
    student: Path,
    tmp_path: Path,
    make: Callable[[Digits, Path], None],
    size: int,
    suffix: str,
) -> None:
    """The same images as class folders and as a published set: the same labels, pixels and so accuracy."""
    (tmp_path / "published").mkdir()
    make(digits, tmp_path / "published")
    class_folders(digits, tmp_path / "folders", size, suffix)
    data = [tmp_path / "published", tmp_path / "folders"]
    published, folders = table("--checkpoint", student / "student.safetensors", "--data", *data)
    assert published[IMAGES:TOP1] == folders[IMAGES:TOP1] == ["500 / 200", "10", "128"]
    assert float(folders[TOP1]) > 70
    # STL-10 is resized by the resident loader, which rounds a few pixels otherwise
    assert float(published[TOP1]) == pytest.approx(float(folders[TOP1]), abs=3 if make is stl10 else 0)


def test_a_test_set_may_lack_classes_and_be_called_test(digits: Digits, student: Path, tmp_path: Path) -> None:
    shutil.copytree(digits.folder / "train", tmp_path / "train")
    shutil.copytree(digits.folder / "val", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / "0")
    lacking = sum(1 for _ in (digits.folder / "val" / "0").iterdir())
    (row,) = table("--checkpoint", student / "student.safetensors", "--data", tmp_path)
    assert row[IMAGES] == f"500 / {200 - lacking}" and float(row[TOP1]) > 70


# ---- mistakes


def fails(*arguments: object, says: list[str]) -> None:
    """One line on stderr that says everything in `says`, and exit code 2."""
    ran = run_program(PROBE, *arguments)
    assert ran.code == 2 and ran.err.startswith("linear_probe.py: error: "), ran
    assert ran.err.count("\n") == 1 and all(each in ran.err for each in says), ran.err


def test_checkpoints_that_cannot_be_probed(digits: Digits, tmp_path: Path) -> None:
    data = ["--data", digits.resident]
    shutil.copy(digits.teacher, tmp_path / "x.safetensors")
    loose = ["--checkpoint", tmp_path / "x.safetensors"]
    fails(*loose, *data, says=["x.safetensors", "no config.yaml beside it", "--set student.model="])
    fails(*loose, *data, "--set", "student.model=cifar:vgg8", says=["not a checkpoint of cifar:vgg8"])
    fails(*loose, *data, "--set", "student.model=cifar:resnet14", says=["tensors missing", "layer1.1."])
    fails("--checkpoint", tmp_path / "y.pth", *data, "--set", "student.model=cifar:vgg8", says=["no such file"])


def test_settings_that_do_not_fit(digits: Digits) -> None:
    usual = ["--checkpoint", digits.teacher, "--data", digits.resident, "--set"]
    fails(*usual, "train.epoch=3", says=["train.epoch", "train.epochs"])
    fails(*usual, "teacher.mode=online", says=["teacher", "no such key"])
    fails(*usual, "optim.lr=fast", says=["optim.lr", "'fast'"])
    fails(*usual, "optim.name=adamm", says=["optim.name", "sgd"])
    if not torch.cuda.is_available():
        fails(*usual, "data.device=cuda", says=["no GPU"])


def test_data_that_cannot_be_read(digits: Digits, tmp_path: Path) -> None:
    usual = ["--checkpoint", digits.teacher, "--set", "data.device=cpu", "data.workers=0", "--data"]
    fails(*usual, tmp_path / "nothing", says=["nothing", "no such folder", "STL-10"])
    fails(*usual, digits.folder / "train", says=["not a known layout", "train/ and val/"])
    (tmp_path / "stl").mkdir()
    stl10(digits, tmp_path / "stl")
    images = tmp_path / "stl" / "stl10_binary" / "test_X.bin"
    images.write_bytes(images.read_bytes()[:-1])
    fails(*usual, tmp_path / "stl", says=["test_X.bin", "expected 200 images"])
    (tmp_path / "tiny").mkdir()
    tiny_imagenet(digits, tmp_path / "tiny")
    table_of_labels = tmp_path / "tiny" / "val" / "val_annotations.txt"
    table_of_labels.write_text(table_of_labels.read_text().replace("val_7.JPEG", "val_x.JPEG"))
    fails(*usual, tmp_path / "tiny", says=["val_annotations.txt", "val_7.JPEG"])
    shutil.copytree(digits.folder / "train", tmp_path / "odd" / "train")
    shutil.copytree(digits.folder / "val", tmp_path / "odd" / "val")
    (tmp_path / "odd" / "val" / "9").rename(tmp_path / "odd" / "val" / "nine")
    fails(*usual, tmp_path / "odd", says=["nine", "not in the list of classes"])


def test_help_and_usage() -> None:
    ran = run_program(PROBE, "--help")
    assert ran.code == 0 and "example:" in ran.out
    assert run_program(PROBE).code == 2
