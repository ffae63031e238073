"""The dataset index: ids, labels and stored sizes of a folder of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.image_folder import index_image_folder, list_image_folder, read_classes
from pipelines.index import DatasetIndex


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, nested, of several formats."""
    for number, name in enumerate(("cat/2.png", "cat/1.jpg", "ant/deep/x.JPEG", "bee/b.bmp", "bee/a.webp")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + number, 20 + number)).save(path)
    (tmp_path / "images" / "ant" / "notes.txt").write_text("not an image, not listed")
    return tmp_path / "images"


def test_an_index_follows_torchvisions_image_folder(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(folder))
    (folder / ".hidden").mkdir()  # what a file manager leaves: torchvision would raise
    index = index_image_folder(folder)
    assert list(index.classes) == theirs.classes
    assert [
        (str(folder / name), label) for name, label in zip(index.names, index.labels.tolist(), strict=True)
    ] == [(path, label) for path, label in theirs.samples]
    assert index.sizes[index.names.index("cat/1.jpg")].tolist() == [21, 11], "height, width"


def test_the_user_cache_is_used_until_the_folder_changes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = index_image_folder(folder, cache=cache)
    entries = {path.name for path in cache.iterdir()}
    assert index_image_folder(folder, cache=cache).digest == first.digest
    assert {path.name for path in cache.iterdir()} == entries
    Image.new("RGB", (64, 48)).save(folder / "cat" / "3.png")
    second = index_image_folder(folder, cache=cache)
    assert len(second) == 6 and second.digest != first.digest


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    index = index_image_folder(folder)
    index.save(tmp_path / "index")
    back = DatasetIndex.load(tmp_path / "index")
    assert back.classes == index.classes and list(back.names) == list(index.names)
    assert (back.labels == index.labels).all() and (back.sizes == index.sizes).all()
    assert back.digest == index.digest


def test_a_damaged_index_is_not_read(folder: Path, tmp_path: Path) -> None:
    index_image_folder(folder).save(tmp_path / "index")
    labels = np.load(tmp_path / "index" / "labels.npy")
    np.save(tmp_path / "index" / "labels.npy", labels[::-1])
    with pytest.raises(ValueError, match="damaged"):
        DatasetIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match=r"no index\.json"):
        DatasetIndex.load(tmp_path)


def test_labels_follow_a_list_of_classes(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("dog a dog\ncat\nbee\n\nant\n")
    index = index_image_folder(folder, classes=read_classes(names))
    assert index.classes == ("dog", "cat", "bee", "ant")
    assert [index.classes[label] for label in index.labels] == [name.split("/")[0] for name in index.names]
    names.write_text("cat\nbee\n")
    with pytest.raises(ValueError, match=r"class folder 'ant' \(1 in all\) is not in the list"):
        list_image_folder(folder, read_classes(names))
    names.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="twice"):
        read_classes(names)
    names.write_text("\n")
    with pytest.raises(ValueError, match="no class names"):
        read_classes(names)
