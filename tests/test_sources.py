"""What convert.py takes: the same photographs in every layout that people have give the same samples."""

import contextlib
import csv
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needed, run_program
from PIL import Image

from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion.sources import Sources, find_sets, open_sources
from pipelines.conversion.sources.files import list_archive
from pipelines.image_folder import index_image_folder, read_classes
from pipelines.index import DatasetIndex

CONVERT = "tools/convert.py"
CLASSES = ("n01440764", "n01443537", "n01484850")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark")


@pytest.fixture(scope="module")
def images(photographs: list[Path]) -> dict[str, bytes]:
    return small_images(photographs)


def small_images(photographs: list[Path]) -> dict[str, bytes]:
    """Twelve small JPEGs of three classes, named as ImageNet's: n01440764/n01440764_7.JPEG."""
    files = {}
    for number, path in enumerate(photographs[:12]):
        name = CLASSES[number % 3]
        with Image.open(path) as image:
            small = io.BytesIO()
            image.convert("RGB").resize((40 + number, 32)).save(small, "JPEG", quality=95)
        files[f"{name}/{name}_{number}.JPEG"] = small.getvalue()
    return dict(sorted(files.items()))


Images = dict[str, bytes]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar(path: Path, files: Iterable[tuple[str, bytes]], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def validation_names(images: Images) -> dict[str, tuple[str, bytes]]:
    """ILSVRC2012_val_00000001 -> class, bytes; in an order that mixes the classes."""
    shuffled = sorted(images.items(), key=lambda item: item[0][::-1])
    return {f"ILSVRC2012_val_{at:08d}": (name.split("/")[0], data) for at, (name, data) in enumerate(shuffled, 1)}


# ---- one function a layout: it writes the images and returns what to give to convert.py


def class_folders(root: Path, images: Images) -> Path:
    return write(root / "train", images)


def zip_of_a_mac(root: Path, images: Images) -> Path:
    (root).mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images.items():
            archive.writestr(f"d/{name}", data)
            archive.writestr(f"__MACOSX/d/{name.replace('/', '/._')}", b"\0\5\26\7")
        archive.writestr("d/.DS_Store", b"x")
        archive.writestr("d/README.md", b"x")
    return root / "d.zip"


def tar_a_class_unpacked(root: Path, images: Images) -> Path:
    for wnid in CLASSES:
        tar(root / f"{wnid}.tar", ((n.split("/")[1], d) for n, d in images.items() if n.startswith(wnid)))
    return root


def flat_folder(root: Path, images: Images) -> Path:
    return write(root / "flat", {name.split("/")[1]: data for name, data in images.items()})


def hugging_face_tar(root: Path, images: Images) -> Path:
    """train_images_0.tar.gz, unzipped: n01440764_7_n01440764.JPEG."""
    return tar(
        root / "train_images_0.tar",
        ((f"./{Path(n).stem}_{n.split('/')[0]}.JPEG", data) for n, data in images.items()),
    )


def parts_of_a_flat_set(root: Path, images: Images) -> Path:
    items = [(f"{Path(n).stem}_{n.split('/')[0]}.JPEG", data) for n, data in images.items()]
    for part in range(2):
        tar(root / f"train_images_{part}.tar", items[part::2])
    return root


def parts_of_class_folders(root: Path, images: Images) -> Path:
    for part in range(2):
        tar(root / f"part{part}.tar", ((f"train/{n}", data) for n, data in [*images.items()][part::2]))
    return root


def kaggle(root: Path, images: Images) -> Path:
    val = validation_names(images)
    folder = root / "ILSVRC/Data/CLS-LOC/val"
    write(folder, {f"{name}.JPEG": data for name, (_, data) in val.items()})
    with (root / "LOC_val_solution.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "PredictionString"])
        table.writerows([name, f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 "] for name, (wnid, _) in val.items())
    return folder


def kaggle_zip(root: Path, images: Images) -> Path:
    kaggle(root / "k", images)
    shutil.make_archive(str(root / "kaggle"), "zip", root / "k")
    return root / "kaggle.zip/ILSVRC/Data/CLS-LOC/val"


def devkit(root: Path, val: dict[str, tuple[str, bytes]]) -> None:
    """ILSVRC2012_devkit_t12.tar.gz with the fields of the real one: a synset with children is no class."""
    savemat = needed("scipy.io").savemat
    numbers = {wnid: 3 - at for at, wnid in enumerate(CLASSES)}  # not in the order of the names
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    rows = [(float(number), wnid, "words", "gloss", 0.0, np.zeros(0)) for wnid, number in numbers.items()]
    synsets = np.array([*rows, (4.0, "n00001740", "entity", "gloss", 3.0, np.array([1.0, 2.0, 3.0]))], dtype=kind)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in val.values()).encode()
    inside = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    files = ((f"ILSVRC2012_devkit_t12/data/{name}", data) for name, data in inside.items())
    tar(root / "ILSVRC2012_devkit_t12.tar.gz", files, "w:gz")


def bare_validation_tar(root: Path, images: Images) -> Path:
    val = validation_names(images)
    devkit(root, val)
    return tar(root / "ILSVRC2012_img_val.tar", ((f"{name}.JPEG", data) for name, (_, data) in val.items()))


def tiny_imagenet(root: Path, images: Images) -> Path:
    val = validation_names(images)
    write(root / "val/images", {f"{name}.JPEG": data for name, (_, data) in val.items()})
    lines = (f"{name}.JPEG\t{wnid}\t0\t0\t9\t9\n" for name, (wnid, _) in val.items())
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root / "val"


def web_dataset(label: Callable[[str], dict[str, bytes]]) -> Callable[[Path, Images], Path]:
    def make(root: Path, images: Images) -> Path:
        def members() -> Iterable[tuple[str, bytes]]:
            yield "README.md", b"read me"
            for number, (name, data) in enumerate(images.items()):
                key = f"deep/{Path(name).stem}"
                yield f"deep/._{Path(name).stem}.jpg", b"Mac OS X"
                yield f"{key}.{'jpg' if number % 2 else 'JPEG'}", data
                for extension, text in label(name.split("/")[0]).items():
                    yield f"{key}.{extension}", text

        return tar(root / "set-000000.tar", members())

    return make


def number(wnid: str) -> bytes:
    return str(CLASSES.index(wnid)).encode()


by_number = web_dataset(lambda wnid: {"cls": number(wnid) + b"\n", "json": b'{"width": 3}', "txt": b"a photo"})
by_name = web_dataset(lambda wnid: {"cls": wnid.encode()})
by_json = web_dataset(lambda wnid: {"json": json.dumps({"label": CLASSES.index(wnid)}).encode()})
by_json_name = web_dataset(lambda wnid: {"json": json.dumps({"class_name": wnid}).encode()})
by_text = web_dataset(lambda wnid: {"txt": wnid.encode()})


def parquet_files(
    root: Path, images: Images, split: str = "train", *, names: bool = True, flat: bool = False
) -> Path:
    """As `datasets` writes them: a struct of bytes and path, ClassLabel in the schema's metadata, small row groups."""
    pa, pq = needed("pyarrow"), needed("pyarrow.parquet")

    root.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    items = sorted(images.items(), key=lambda item: item[0][::-1])
    for part in range(2):
        rows = items[part::2]
        structs = [{"bytes": data, "path": name.split("/")[1]} for name, data in rows]
        columns = {
            "image": pa.array([each["bytes"] for each in structs] if flat else structs),
            "label": pa.array([CLASSES.index(name.split("/")[0]) for name, _ in rows], pa.int64()),
        }
        table = pa.table(columns)
        if names:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}-{part:05d}-of-00002.parquet", row_group_size=2)
    return root


def parquet_of_bytes(root: Path, images: Images) -> Path:
    return parquet_files(root, images, names=False, flat=True)


LAYOUTS = {
    "class folders": class_folders,
    "a Mac's zip": zip_of_a_mac,
    "a folder of one tar a class": tar_a_class_unpacked,
    "a flat folder of training files": flat_folder,
    "a folder of tars that are parts of a flat set": parts_of_a_flat_set,
    "a folder of tars that are parts of class folders": parts_of_class_folders,
    "Hugging Face's tar of flat files": hugging_face_tar,
    "Kaggle's val": kaggle,
    "Kaggle's val in its zip": kaggle_zip,
    "the bare validation tar with the devkit": bare_validation_tar,
    "Tiny ImageNet's val": tiny_imagenet,
    "WebDataset, numbers": by_number,
    "WebDataset, names": by_name,
    "WebDataset, numbers in .json": by_json,
    "WebDataset, names in .json": by_json_name,
    "WebDataset, names in .txt": by_text,
    "parquet": parquet_files,
    "parquet without metadata": parquet_of_bytes,
}


def by_bytes(sources: Sources) -> dict[bytes, str]:
    """The class of each image, by its bytes."""
    found = {}
    for position in range(len(sources)):
        sample = sources[position]
        assert isinstance(sample.data, bytes)
        found[sample.data] = sources.classes[sample.label]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_photographs_and_classes(layout: str, images: Images, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "source", images)
    sources = open_sources(source)
    numbers = sources.classes == ("0", "1", "2")  # where nothing names them
    assert numbers or sources.classes == CLASSES
    names = {str(label): name for label, name in enumerate(CLASSES)}
    found = {data: names.get(name, name) for data, name in by_bytes(sources).items()}
    assert found == {data: name.split("/")[0] for name, data in images.items()}
    assert not numbers or layout in (
        "WebDataset, numbers",
        "WebDataset, numbers in .json",
        "parquet without metadata",
    )
    again = pickle.loads(pickle.dumps(sources))  # as a worker process that is not forked gets them
    assert by_bytes(again) == by_bytes(sources)
    listed = tmp_path / "classes.txt"
    listed.write_text("".join(f"{name} {words}\n" for name, words in zip(CLASSES, WORDS, strict=True)))
    assert open_sources(source, read_classes(listed)).classes == CLASSES


@pytest.mark.parametrize(
    "layout", ["Kaggle's val", "Tiny ImageNet's val", "the bare validation tar with the devkit"]
)
def test_tables_give_what_sorted_folders_give(layout: str, images: Images, tmp_path: Path) -> None:
    """Names and order too, so that a teacher's cache fits both."""
    table = open_sources(LAYOUTS[layout](tmp_path / "table", images))
    val = validation_names(images)
    sorted_ = write(tmp_path / "sorted", {f"{wnid}/{name}.JPEG": data for name, (wnid, data) in val.items()})
    folders = open_sources(sorted_)
    assert table.digest == folders.digest and by_bytes(table) == by_bytes(folders)


def test_what_is_skipped_is_counted_and_said(images: Images, tmp_path: Path) -> None:
    archive = zip_of_a_mac(tmp_path / "zip", images)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "folder")
    from_zip, from_folder = open_sources(archive), open_sources(tmp_path / "folder/d")
    assert from_zip.digest == from_folder.digest
    assert "13 hidden" in from_zip.notes[-1] and "1 .md" in from_zip.notes[-1], from_zip.notes
    assert "skipped 2 files (1 hidden, 1 .md)" in from_folder.notes
    ran = run_program(CONVERT, "resident", tmp_path / "folder/d", tmp_path / "out", "--size", 16, "--workers", 0)
    assert ran.code == 0 and "skipped 2 files (1 hidden, 1 .md)" in ran.err


def test_training_takes_tiny_imagenet_too(images: Images, tmp_path: Path) -> None:
    source = tiny_imagenet(tmp_path / "tiny", images)
    with open_loader("torch", source, LoaderOptions(workers=0)) as loader:
        index = loader.index
    assert index.classes == CLASSES and all(name.startswith("images/") for name in index.names)
    val = validation_names(images)
    expected = [CLASSES.index(val[Path(name).stem][0]) for name in index.names]
    assert index.labels.tolist() == expected
    for name, (wnid, _) in val.items():  # sorted by a script of the internet; the table is left over
        (source / wnid).mkdir(exist_ok=True)
        shutil.move(source / "images" / f"{name}.JPEG", source / wnid / f"{name}.JPEG")
    (source / "images").rmdir()
    assert index_image_folder(source).classes == CLASSES == open_sources(source).classes


# ---- roots that hold a training and a validation set


def kaggle_root(root: Path, images: Images) -> Path:
    kaggle(root, images)
    write(root / "ILSVRC/Data/CLS-LOC/train", images)
    write(root / "ILSVRC/Data/CLS-LOC/test", {"ILSVRC2012_test_00000001.JPEG": next(iter(images.values()))})
    return root


def kaggle_root_zip(root: Path, images: Images) -> Path:
    kaggle_root(root / "k", images)
    shutil.make_archive(str(root / "kaggle"), "zip", root / "k")
    return root / "kaggle.zip"


def torchvision_root(root: Path, images: Images) -> Path:
    bare_validation_tar(root, images)
    inner = {wnid: tar_a_class_unpacked(root / "inner", images) / f"{wnid}.tar" for wnid in CLASSES}
    tar(root / "ILSVRC2012_img_train.tar", ((f"{wnid}.tar", path.read_bytes()) for wnid, path in inner.items()))
    shutil.rmtree(root / "inner")
    return root


def hugging_face_root(root: Path, images: Images) -> Path:
    parquet_files(root / "data", images)
    parquet_files(root / "data", images, "validation")
    return root


@pytest.mark.parametrize("make", [kaggle_root, kaggle_root_zip, torchvision_root, hugging_face_root])
def test_a_root_of_two_sets_converts_both(
    make: Callable[[Path, Images], Path], images: Images, tmp_path: Path
) -> None:
    source = make(tmp_path / "root", images)
    assert list(find_sets(source))[:1] != [] and {"train", "val"} <= set(find_sets(source))
    ran = run_program(CONVERT, "resident", source, tmp_path / "out", "--size", 16, "--workers", 0)
    assert ran.code == 0, ran.err
    train, val = (DatasetIndex.load(tmp_path / "out" / name) for name in ("train", "val"))
    assert len(train) == len(val) == 12 and train.classes == val.classes == CLASSES
    assert make not in (kaggle_root, kaggle_root_zip) or "test: left out" in ran.err


def test_tars_of_two_sets_in_one_folder_are_refused_and_a_pattern_chooses(images: Images, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for name in ("set-train-0000.tar", "set-train-0001.tar", "set-validation-00.tar"):
        shutil.move(by_number(tmp_path / "made", images), tmp_path / name)
        hub.mkdir(exist_ok=True)
        shutil.move(tmp_path / name, hub / name)
    with pytest.raises(ValueError, match=r"train .*set-train-0000.*validation .*set-validation-00.*choose"):
        open_sources(hub)
    assert len(open_sources(hub / "set-train-*.tar")) == 24
    assert len(open_sources(hub / "set-train-{0000..0001}.tar")) == 24
    assert len(open_sources(hub / "set-validation-00.tar")) == 12
    with pytest.raises(ValueError, match="no file matches"):
        open_sources(hub / "set-test-*.tar")


# ---- WebDatasets with a fault


def members(**parts: bytes | str | int) -> list[tuple[str, bytes]]:
    """k1_jpg=... -> (k1.jpg, ...)."""
    return [
        (name.replace("__", "/").replace("_", "."), value if isinstance(value, bytes) else str(value).encode())
        for name, value in parts.items()
    ]


JPEG = b"\xff\xd8\xff"
FAULTS = {
    "a repeated key": ([*members(a_jpg=JPEG, a_cls=0), *members(a_jpg=JPEG, a_cls=1)], "a.* has .jpg twice"),
    "two images": (members(a_jpg=JPEG, a_png=JPEG, a_cls=0), "a has several images .*jpg and .png"),
    "an image without a class": (
        members(a_jpg=JPEG, a_cls=0, b_jpg=JPEG),
        "b has jpg; expected an image and .cls",
    ),
    "labels from 1": (members(a_jpg=JPEG, a_cls=1, b_jpg=JPEG, b_cls=2), "labels go from 1 to 2.*--first-label 1"),
    "an enormous label": (
        members(a_jpg=JPEG, a_cls=0, b_jpg=JPEG, b_cls=10**12),
        "labels go from 0 to 1000000000000",
    ),
    "a negative label": (members(a_jpg=JPEG, a_cls=-1), "labels go from -1"),
    "an empty label": (members(a_jpg=JPEG, a_cls=b""), ".cls of sample a is empty"),
    "captions": (
        members(
            a_jpg=JPEG, a_txt="a cat", b_jpg=JPEG, b_txt="a dog", c_jpg=JPEG, c_txt="two", d_jpg=JPEG, d_txt="six"
        ),
        "captions",
    ),
    "a name that leads outside": ([("../a.jpg", JPEG), ("../a.cls", b"0")], "outside"),
    "json without a class": (members(a_jpg=JPEG, a_json="{}"), "no class in sample a .*label, cls"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_web_datasets_are_named(fault: str, tmp_path: Path) -> None:
    files, says = FAULTS[fault]
    with pytest.raises(ValueError, match=says):
        open_sources(tar(tmp_path / "x.tar", files))


def test_keys_with_dots_masks_and_labels_from_1(tmp_path: Path) -> None:
    files = members(
        photo_1_jpg=JPEG, photo_1_cls=1, photo_2_jpg=JPEG, photo_2_cls=2, b__x_jpg=JPEG, b__x_seg_png=JPEG
    )
    sources = open_sources(tar(tmp_path / "x.tar", [*files, ("b/x.cls", b"2")]), first_label=1)
    assert sources.labels.tolist() == [0, 1, 1] and list(sources.names) == [
        "photo.1.jpg",
        "photo.2.jpg",
        "b/x.jpg",
    ]


# ---- archives


@pytest.mark.parametrize(
    ("mode", "undo"), [("w:bz2", "bunzip2"), ("w:xz", "unxz"), ("w:gz", "gunzip"), ("zst", "unzstd")]
)
def test_compressed_tars_say_what_undoes_it(mode: str, undo: str, images: Images, tmp_path: Path) -> None:
    path = tmp_path / "train.tar.packed"
    if mode == "zst":
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    else:
        tar(path, images.items(), mode)
    with pytest.raises(ValueError, match=undo) as caught:
        open_sources(path)
    assert "compressed" in str(caught.value) and "damaged" not in str(caught.value)


def test_a_zip_bomb_is_rejected_by_name(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member that says how large it is, and one that is larger than it says."""
    monkeypatch.setattr("pipelines.conversion.sources.files.MAX_FILE", 1 << 21)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
        archive.writestr("n01440764/bomb.png", bytes(3 << 20))
        archive.writestr("n01440764/liar.png", bytes(1 << 20))
    data = path.read_bytes()
    at = data.rindex(b"n01440764/liar.png") - 46  # its entry in the central directory
    path.write_bytes(data[: at + 24] + (1000).to_bytes(4, "little") + data[at + 28 :])
    sources = open_sources(path)
    failed = {}
    for position in range(len(sources)):
        try:
            sources[position]
        except ValueError as error:
            failed[Path(sources.names[position]).name] = str(error)
    assert set(failed) == {"bomb.png", "liar.png"} and "expected at most" in failed["bomb.png"]


def test_a_file_that_is_there_twice_is_named(images: Images, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [*images.items(), *images.items()])
    with pytest.raises(ValueError, match=r"n01440764_0.JPEG .* is in it twice"):
        open_sources(path)


class _Unmarked(zipfile.ZipInfo):
    """A name in UTF-8 that is not marked as such, as macOS writes it."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(), self.flag_bits


def test_names_in_utf8_in_latin1_and_from_a_mac(images: Images, tmp_path: Path) -> None:
    data = next(iter(images.values()))
    write(tmp_path / "utf8", {"größe/日本\u00a0x.JPEG": data})
    folder = open_sources(tmp_path / "utf8")
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr(_Unmarked("größe/日本\u00a0x.JPEG"), data)
    assert open_sources(tmp_path / "mac.zip").names == folder.names
    assert folder.classes == ("größe",) == tuple(index_image_folder(tmp_path / "utf8").classes)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + "/latin/größe".encode("latin-1")))
    write(latin, {"a.JPEG": data})
    for read in (open_sources, index_image_folder):
        with pytest.raises(ValueError, match="not UTF-8; rename it"):
            read(tmp_path / "latin")
    write(tmp_path / "broken", {"a/line\nbreak.JPEG": data})
    for read in (open_sources, index_image_folder):
        with pytest.raises(ValueError, match="line break"):
            read(tmp_path / "broken")


# ---- lists of classes, classes that are lost, wrong guesses


def test_a_line_that_is_a_folders_name_is_that_class(images: Images, tmp_path: Path) -> None:
    data = next(iter(images.values()))
    root = write(
        tmp_path / "d", {f"{name}/x.JPEG": data for name in ("golden retriever", "golden fish", "t-shirt")}
    )
    listed = tmp_path / "classes.txt"
    listed.write_bytes(b"\xef\xbb\xbfgolden retriever\r\ngolden fish\r\nt-shirt a comment\r\n")
    expected = ("golden retriever", "golden fish", "t-shirt")
    assert open_sources(root, read_classes(listed)).classes == expected
    shutil.rmtree(root / "golden fish")  # a validation set may lack it
    index = index_image_folder(root, classes=read_classes(listed))
    assert index.classes == expected and index.labels.tolist() == [0, 2]


def test_a_class_that_keeps_no_image_needs_a_decision(images: Images, tmp_path: Path) -> None:
    bad = {name: b"" if name.startswith(CLASSES[1]) else data for name, data in images.items()}
    source = write(tmp_path / "d", bad)
    for kind, more in (("resident", ["--size", 16]), ("shards", [])):
        arguments = (kind, source, tmp_path / kind, "--workers", 0, *more)
        ran = run_program(CONVERT, *arguments)
        assert ran.code == 2 and f"{CLASSES[1]!r} (1 in all) keeps no image" in ran.err, ran
        assert not (tmp_path / kind / "manifest.json").exists()
        ran = run_program(CONVERT, *arguments, "--empty-classes")
        assert ran.code == 0 and "1 classes without an image" in ran.out, ran


def test_a_folder_of_one_tar_per_class_whose_files_say_nothing(images: Images, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        tar(tmp_path / f"{name}.tar", [(f"{at}.jpg", data) for at, data in enumerate(images.values())])
    sources = open_sources(tmp_path)
    assert sources.classes == ("cats", "dogs") and np.bincount(sources.labels).tolist() == [12, 12]


def test_a_wrong_guess_says_what_was_looked_for(images: Images, tmp_path: Path) -> None:
    write(tmp_path / "d", {"notes.txt": b"x", "table.csv": b"x"})
    with pytest.raises(ValueError, match=r"looked for class folders .*WebDataset.*parquet.*; it has"):
        open_sources(tmp_path / "d")
    val = {f"{name}.JPEG": data for name, (_, data) in validation_names(images).items()}
    with pytest.raises(ValueError, match=r"looked for LOC_val_solution.csv .*devkit"):
        open_sources(write(tmp_path / "val", val))
    with pytest.raises(ValueError, match="no labels"):
        open_sources(write(tmp_path / "test", {"ILSVRC2012_test_00000001.JPEG": JPEG}))


def test_parquet_files_that_are_none(images: Images, tmp_path: Path) -> None:
    pq = needed("pyarrow.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1xxxxPAR1")
    write(tmp_path / "repository", {"README.md": b"x", "data/x.parquet": b"PAR1xxxxPAR1"})
    for source in (tmp_path / "repository", tmp_path / "x.parquet"):
        with pytest.raises(ValueError, match=r"x.parquet: not a whole parquet file"):
            open_sources(source)
    root = parquet_files(tmp_path / "hf", images)
    table = pq.read_table(root / "train-00000-of-00002.parquet")
    unlabelled = table.set_column(1, "label", [[-1] * len(table)])
    pq.write_table(unlabelled, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="without a label"):
        open_sources(tmp_path / "test.parquet")
    pq.write_table(table.drop_columns(["label"]), tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match=r"no column of classes .*; it has image"):
        open_sources(tmp_path / "bare.parquet")


def test_workers_share_parquet_files(images: Images, tmp_path: Path) -> None:
    source = parquet_files(tmp_path / "hf", images)
    for workers in (0, 2):
        arguments = ("resident", source, tmp_path / f"out{workers}", "--size", 16, "--workers", workers)
        ran = run_program(CONVERT, *arguments)
        assert ran.code == 0, ran.err
    assert (tmp_path / "out0/images.npy").read_bytes() == (tmp_path / "out2/images.npy").read_bytes()


def test_fifos_and_devices_are_no_sources(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    for path in (tmp_path / "fifo.tar", Path("/dev/zero")):
        ran = run_program(CONVERT, "resident", path, tmp_path / "out")
        assert ran.code == 2 and "expected a file" in ran.err and "Traceback" not in ran.err, ran
    ran = run_program(CONVERT, "resident", tmp_path, tmp_path / "out", "--classes", "/dev/zero")
    assert ran.code == 2 and "/dev/zero: a device" in ran.err, ran


def test_damaged_sources_are_named_in_one_line(images: Images, tmp_path: Path) -> None:
    """Bytes changed and cut off in archives and tables: read, rejected or refused, and nothing else is raised."""
    rng, refused = random.Random(0), 0
    for layout in (
        "a Mac's zip",
        "WebDataset, names in .json",
        "parquet",
        "Kaggle's val",
        "a folder of one tar a class",
    ):
        source = LAYOUTS[layout](tmp_path / layout, images)
        files = sorted(
            path for path in (tmp_path / layout).rglob("*") if path.is_file() and path.suffix != ".JPEG"
        )
        for number in range(20):
            file = files[number % len(files)]
            whole = file.read_bytes()
            data = bytearray(whole)
            for _ in range(rng.choice((1, 4))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            file.write_bytes(data[: rng.randrange(len(data)) if number % 10 == 9 else None])
            list_archive.cache_clear()
            try:
                sources = open_sources(source)
                for position in range(len(sources)):
                    with contextlib.suppress(ValueError):
                        sources[position]
            except ValueError as error:
                assert "\n" not in str(error), error
                refused += 1
            file.write_bytes(whole)
    assert 10 < refused < 90
