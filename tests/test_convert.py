"""Conversion through tools/convert.py: every kind of source, odd files, kills, full disks, and stock readers."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, absent, run_program
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import get_worker_info

from pipelines.base import LoaderOptions, open_loader
from pipelines.conversion import shard_writer
from pipelines.conversion.encode import Source, Storage
from pipelines.conversion.job import Job, to_beton, to_resident, to_shards
from pipelines.conversion.sources import Sources
from pipelines.files import Lock
from pipelines.formats.stored import open_stored
from pipelines.index import DatasetIndex

CONVERT = "tools/convert.py"
FORMATS = ("ffcv", "shards", "resident")
KILLS = int(os.environ.get("FASTDCD_KILLS", "6"))
SMALL = {"ffcv": ("--max-size", 120), "shards": ("--max-size", 120, "--shard-size", 7), "resident": ("--size", 48)}


@pytest.fixture(scope="module")
def tree(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real photographs, longest side 160 pixels, as JPEGs in 4 class folders, one of them nested."""
    root = tmp_path_factory.mktemp("sources") / "tree"
    for number, path in enumerate(photographs):
        folder = root / f"class{number % 4}" / ("deep" if number % 4 == 3 and number % 8 == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.draft("RGB", (160, 160))
            image.thumbnail((160, 160))
            image.convert("RGB").save(folder / f"{path.stem}.JPEG", quality=95)
    return root


def convert(kind: str, source: Path, out: Path, *more: object) -> Ran:
    return run_program(CONVERT, kind, source, out, "--workers", 1, *more)


def ok(ran: Ran) -> Ran:
    assert ran.code == 0, ran.err
    return ran


def snapshot(out: Path) -> dict[str, bytes]:
    """All files that a conversion leaves, hidden ones too."""
    return {
        str(path.relative_to(out.parent)): path.read_bytes()
        for path in sorted(out.parent.rglob("*"))
        if path.is_file() and str(path.relative_to(out.parent)).lstrip(".").startswith(out.name)
    }


def bytes_so_far(out: Path) -> int:
    """Of all files beside `out`, while a conversion goes on: they may be renamed while they are listed."""
    total = 0
    for path in out.parent.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def stored_pixels(kind: str, out: Path) -> dict[str, NDArray[np.uint8]]:
    """The stored image of every sample by name, through the project's own readers."""
    if kind == "resident":
        return dict(zip(DatasetIndex.load(out).names, np.load(out / "images.npy"), strict=True))
    index = DatasetIndex.load(out / "index" if kind == "shards" else out.with_name(f"{out.name}.index"))
    stored = open_stored(out, index)
    assert stored is not None
    return {
        name: np.ascontiguousarray(stored.pixels(row).permute(1, 2, 0).numpy())
        for row, name in enumerate(index.names)
    }


# Every kind of source


def make_tar(tree: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for image in sorted(tree.rglob("*.JPEG"), key=lambda image: image.name):  # an order of its own
            archive.add(image, f"./data/{image.relative_to(tree)}")
    return path


def make_tar_of_tars(tree: Path, path: Path) -> Path:
    """As ImageNet's training set comes."""
    with tarfile.open(path, "w") as archive:
        for folder in sorted(tree.iterdir()):
            inner = path.with_name(f"{folder.name}.tar")
            with tarfile.open(inner, "w") as tar:
                for image in folder.rglob("*.JPEG"):
                    tar.add(image, str(image.relative_to(folder)))
            archive.add(inner, inner.name)
    return path


def make_zip(tree: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(tree.rglob("*.JPEG")):
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.write(image, f"sets/train/{image.relative_to(tree)}", kind)
        archive.writestr("sets/train/class0/notes.txt", "no image")
        archive.write(image, "sets/val/class0/a.JPEG")
    return path / "sets" / "train"


@pytest.mark.parametrize("make", [make_tar, make_tar_of_tars, make_zip])
def test_archives_give_the_bytes_that_folders_give(
    tree: Path, tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    (tmp_path / "archive").mkdir()
    source = make(tree, tmp_path / "archive" / "data.bin")
    for kind in FORMATS:
        for name, each in (("folder", tree), ("archive", source)):
            ok(convert(kind, each, tmp_path / name / kind, *SMALL[kind]))
        assert snapshot(tmp_path / "folder" / kind) == snapshot(tmp_path / "archive" / kind), kind
    assert not list(tmp_path.rglob(".*.partial")) + list(tmp_path.rglob(".*.journal"))


def test_what_is_stored_is_the_shrunk_original(tree: Path, tmp_path: Path) -> None:
    ok(convert("ffcv", tree, tmp_path / "raw", "--jpeg-share", 0, "--max-size", 100))
    ok(convert("ffcv", tree, tmp_path / "mixed", "--max-size", 100))
    ok(convert("shards", tree, tmp_path / "shards", "--max-size", 0))
    raw, mixed = stored_pixels("ffcv", tmp_path / "raw"), stored_pixels("ffcv", tmp_path / "mixed")
    kept = stored_pixels("shards", tmp_path / "shards")
    names = sorted(
        (str(path.relative_to(tree)) for path in tree.rglob("*.JPEG")), key=lambda n: (n.split("/")[0], n)
    )
    assert list(raw) == list(mixed) == list(kept) == names
    manifest = json.loads((tmp_path / "mixed.index/manifest.json").read_text())
    assert manifest["images"] == 60 and 15 <= manifest["raw"] <= 45
    for name in names:
        with Image.open(tree / name) as image:
            assert np.array_equal(kept[name], np.array(image)), "a plain JPEG keeps its own bytes"
            scale = 100 / max(image.size)
            small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
        assert np.array_equal(raw[name], np.array(small))
        assert np.abs(mixed[name].astype(int) - np.array(small)).mean() < 8


class _Python2Pickler(pickle._Pickler):
    """Byte strings as Python 2 pickled them, in whose format CIFAR is published."""

    def save_string(self, text: bytes) -> None:
        self.write(pickle.BINSTRING + len(text).to_bytes(4, "little") + text)  # type: ignore[attr-defined]
        self.memoize(text)  # type: ignore[attr-defined]

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string}  # type: ignore[dict-item]  # noqa: RUF012


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def make_cifar(archive: Path, files: dict[str, object]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else python2_pickle(value)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def cifar_batch(images: NDArray[np.uint8], labels: list[int], files: list[str]) -> dict[bytes, Any]:
    flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return {b"data": flat, b"fine_labels": labels, b"filenames": [name.encode() for name in files]}


def test_cifar_archives(photographs: list[Path], tmp_path: Path) -> None:
    """Images of CIFAR's size, packed as published, give what the same images in class folders give."""
    images = {}
    for number, photograph in enumerate(random.Random(0).sample(photographs, 40)):
        path = tmp_path / "folders" / f"b{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(photograph) as image:
            image.convert("RGB").resize((32, 32)).save(path)
        images[path] = np.array(Image.open(path))
    names = sorted({path.parent.name for path in images})
    classes = ["zebra", *names]  # not sorted as a whole: labels must follow
    labels = [classes.index(path.parent.name) for path in images]
    test = cifar_batch(np.stack(list(images.values())), labels, [path.name for path in images])
    train = cifar_batch(np.zeros((1, 32, 32, 3), np.uint8), [0], ["z.png"])
    meta = {b"fine_label_names": [name.encode() for name in classes]}
    make_cifar(tmp_path / "cifar.tar.gz", {"meta": meta, "test": test, "train": train, "file.txt~": b"x"})
    ok(convert("resident", tmp_path / "cifar.tar.gz/test", tmp_path / "a", "--keep", "b*"))
    ok(convert("resident", tmp_path / "folders", tmp_path / "b"))
    assert snapshot(tmp_path / "a")["a/images.npy"] == snapshot(tmp_path / "b")["b/images.npy"]
    assert DatasetIndex.load(tmp_path / "a").digest == DatasetIndex.load(tmp_path / "b").digest
    ok(convert("ffcv", tmp_path / "cifar.tar.gz/train", tmp_path / "c"))
    ran = convert("ffcv", tmp_path / "cifar.tar.gz", tmp_path / "d")
    assert ran.code == 2 and "cifar.tar.gz/train or" in ran.err


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-was-run",)


def test_a_cifar_archive_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_cifar(tmp_path / "bad.tar.gz", {"meta": pickle.dumps(_Attack()), "train": pickle.dumps(_Attack())})
    ran = convert("resident", tmp_path / "bad.tar.gz/train", tmp_path / "out")
    assert ran.code == 2 and "posix.mkdir" in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "pickle-was-run").exists()


def test_shards_are_a_source_too(tree: Path, tmp_path: Path) -> None:
    """Ours, and anybody's WebDataset."""
    ok(convert("shards", tree, tmp_path / "ours", "--max-size", 0, "--shard-size", 25))
    ok(convert("ffcv", tree, tmp_path / "direct", *SMALL["ffcv"]))
    ok(convert("ffcv", tmp_path / "ours", tmp_path / "by-shards", *SMALL["ffcv"]))
    assert (tmp_path / "direct").read_bytes() == (tmp_path / "by-shards").read_bytes()
    webdataset = pytest.importorskip("webdataset") if not os.environ.get("CI") else __import__("webdataset")
    paths = sorted(tree.rglob("*.JPEG"))[:9]
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for number, path in enumerate(paths):
            writer.write({"__key__": f"a/{number}", "jpeg": path.read_bytes(), "cls": number % 3})
    ok(convert("shards", tmp_path / "theirs.tar", tmp_path / "theirs", "--max-size", 0))
    index = DatasetIndex.load(tmp_path / "theirs/index")
    assert index.labels.tolist() == [0, 1, 2] * 3 and index.classes == ("0", "1", "2")
    for pixels, path in zip(stored_pixels("shards", tmp_path / "theirs").values(), paths, strict=True):
        assert np.array_equal(pixels, np.array(Image.open(path)))


# Choosing what to convert


def test_classes_limit_and_keep(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("class3\nclass9\nclass1 a comment\nclass0\nclass2\n")
    ok(convert("shards", tree, tmp_path / "a", "--classes", tmp_path / "classes.txt", "--limit", 12))
    index = DatasetIndex.load(tmp_path / "a/index")
    assert index.classes == ("class3", "class9", "class1", "class0", "class2")
    assert np.bincount(index.labels).tolist() == [3, 0, 3, 3, 3]
    ok(convert("shards", tree, tmp_path / "b", "--keep", "class[13]"))
    index = DatasetIndex.load(tmp_path / "b/index")
    assert index.classes == ("class1", "class3") and np.bincount(index.labels).tolist() == [15, 15]
    assert all(
        name.startswith(index.classes[label]) for name, label in zip(index.names, index.labels, strict=True)
    )
    (tmp_path / "classes.txt").write_text("class0\n")
    ran = convert("shards", tree, tmp_path / "c", "--classes", tmp_path / "classes.txt")
    assert ran.code == 2 and "'class1' (3 in all) is not in the list" in ran.err


def test_parts_by_several_machines_are_the_whole(tree: Path, tmp_path: Path) -> None:
    ok(convert("shards", tree, tmp_path / "whole/x", *SMALL["shards"]))
    for part in (2, 0, 1):
        assert not (tmp_path / "parts/x/manifest.json").exists()
        ok(convert("shards", tree, tmp_path / "parts/x", *SMALL["shards"], "--shard", f"{part}/3"))
    assert snapshot(tmp_path / "whole/x") == snapshot(tmp_path / "parts/x")
    for kind in ("ffcv", "resident"):
        ok(convert(kind, tree, tmp_path / kind, *SMALL[kind]))
        halves = [tmp_path / f"{kind}{half}" for half in (0, 1)]
        for number, half in enumerate(halves):
            ok(convert(kind, tree, half, *SMALL[kind], "--shard", f"{number}/2"))
        joined = [name for half in halves for name in stored_pixels(kind, half)]
        assert joined == list(stored_pixels(kind, tmp_path / kind))


# Odd files


def odd_tree(photo: Path, root: Path) -> None:
    """What a collection from the web holds besides plain RGB JPEGs, and three files that are no images."""
    folder = root / "class0"
    folder.mkdir(parents=True)
    with Image.open(photo) as image:
        rotated = Image.Exif()
        rotated[0x0112] = 6  # orientation: shown rotated by 90 degrees
        image.save(folder / "exif.JPEG", exif=rotated, quality=95)
        image.convert("CMYK").save(folder / "cmyk.JPEG", quality=95)
        image.convert("L").save(folder / "gray.JPEG", quality=95)
        image.save(folder / "png.JPEG", "PNG")
        image.convert("P").save(folder / "palette.png")
        transparent = image.convert("RGBA")
        transparent.putalpha(image.convert("L"))
        transparent.save(folder / "alpha.png")
        image.save(folder / "web.webp", quality=90)
    data = photo.read_bytes()
    (folder / "cut.JPEG").write_bytes(data[: len(data) // 2])
    (folder / "empty.JPEG").write_bytes(b"")
    (folder / "text.JPEG").write_text("404 not found")


@pytest.mark.parametrize("kind", FORMATS)
def test_odd_files_look_as_pillow_sees_them(tree: Path, tmp_path: Path, kind: str) -> None:
    """EXIF rotation ignored, CMYK, gray, palettes converted, transparency dropped, bad files listed with reasons."""
    odd_tree(next(tree.rglob("*.JPEG")), tmp_path / "odd")
    arguments = {"ffcv": ("--jpeg-share", 0), "shards": ("--quality", 95), "resident": ()}
    ran = ok(convert(kind, tmp_path / "odd", tmp_path / "out", *arguments[kind]))
    assert "7 images" in ran.out and "3 rejected" in ran.out
    stored = stored_pixels(kind, tmp_path / "out")
    for name, pixels in stored.items():
        with Image.open(tmp_path / "odd" / name) as image:
            expected = np.array(image.convert("RGB")).astype(int)
        assert pixels.shape == expected.shape, name
        difference = np.abs(pixels.astype(int) - expected)
        # shards are JPEG: what was none is encoded once more, to which a dithered palette is noise
        assert (
            difference.max() == 0 if kind != "shards" else difference.mean() < (40 if "palette" in name else 8)
        ), name
    folder = tmp_path / ("out.index" if kind == "ffcv" else "out")
    with (folder / "rejects.csv").open() as file:
        rejects = list(csv.DictReader(file))
    assert [row["name"] for row in rejects] == ["class0/cut.JPEG", "class0/empty.JPEG", "class0/text.JPEG"]
    assert all(row["reason"] for row in rejects) and "truncated" in rejects[0]["reason"]
    assert json.loads((folder / "manifest.json").read_text())["rejected"] == 3


def test_a_shard_of_rejects_alone(tree: Path, tmp_path: Path) -> None:
    odd_tree(next(tree.rglob("*.JPEG")), tmp_path / "odd")
    ok(convert("shards", tmp_path / "odd", tmp_path / "out", "--shard-size", 1))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 7
    assert len(stored_pixels("shards", tmp_path / "out")) == 7


# Kills and full disks


def start(*arguments: object) -> multiprocessing.process.BaseProcess:
    """A conversion in a process of its own; forked, since importing torch takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=_exit_with, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process.start()
    return process


def _exit_with(*arguments: object) -> None:
    torch.set_num_threads(1)  # the threads of the process that this one was forked from are not here
    ran = run_program(CONVERT, *arguments)
    os.write(2, ran.err.encode())
    os._exit(ran.code)


def orphans() -> list[str]:
    """Processes forked from this one whose own parent is gone."""
    mine = Path("/proc/self/cmdline").read_bytes()
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = status.read_text().rpartition(")")[2].split()[1]
            if parent == "1" and status.with_name("cmdline").read_bytes() == mine and os.getppid() != 1:
                found.append(status.parent.name)
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_conversions_go_on_byte_for_byte(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    odd_tree(next(tree.rglob("*.JPEG")), tmp_path / "tree")
    for copy in range(max(6, KILLS)):  # long enough to be killed in the middle of it
        shutil.copytree(tree, tmp_path / "tree" / f"copy{copy}")
    monkeypatch.setattr("pipelines.conversion.job.PART", 4)
    rng = random.Random(kind)
    ok(convert(kind, tmp_path / "tree", tmp_path / "whole/x", *SMALL[kind]))
    out, kills, torn = tmp_path / "parts/x", 0, 0
    arguments = (kind, tmp_path / "tree", out, "--workers", 1, *SMALL[kind])
    while True:
        process = start(*arguments)
        bytes_before = bytes_so_far(out)
        moment = time.monotonic() + rng.uniform(0, 0.15)
        while process.is_alive() and (time.monotonic() < moment or bytes_so_far(out) == bytes_before):
            time.sleep(0.002)
        if not process.is_alive() or kills == KILLS:
            process.join()
            break
        time.sleep(rng.uniform(0, 0.06))
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        done = out.is_file() if kind == "ffcv" else (out / "manifest.json").is_file()
        torn += bool(snapshot(out)) and not done
    assert process.exitcode == 0 and kills >= KILLS / 3 and torn >= 1, (kills, torn)
    whole, parts = snapshot(tmp_path / "whole/x"), snapshot(out)
    leftovers = {
        name for name in parts if ".tmp" in name
    }  # a kill between opening a temporary file and renaming it
    assert {name: data for name, data in parts.items() if name not in leftovers} == whole
    assert not orphans(), "workers outlive the conversion that was killed"


def test_a_lost_worker_is_one_line_and_the_same_command_goes_on(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    for copy in range(10):
        shutil.copytree(tree, tmp_path / "tree" / f"copy{copy}")
    ok(convert("shards", tmp_path / "tree", tmp_path / "whole/x", *SMALL["shards"]))
    arguments = ("shards", tmp_path / "tree", tmp_path / "parts/x", "--workers", 2, *SMALL["shards"])
    process = start(*arguments)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (process.exitcode is None and list((tmp_path / "parts/x").glob("*.tar"))):
        assert process.is_alive(), capfd.readouterr().err
        time.sleep(0.002)
    os.kill(int(workers.read_text().split()[-1]), signal.SIGKILL)
    process.join(60)
    err = capfd.readouterr().err.splitlines()
    assert process.exitcode == 1 and "a worker process was lost" in err[-1], err
    assert "killed" in err[-1] and "the same command continues where this one stopped" in err[-1]
    assert not any("Traceback" in line for line in err)
    ok(run_program(CONVERT, *arguments))
    assert snapshot(tmp_path / "parts/x") == snapshot(tmp_path / "whole/x")


def test_storage_that_hangs_is_not_waited_for_without_an_end(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = shard_writer.encode_record

    def hang(source: Source, position: int, storage: Storage) -> shard_writer.ShardRecord:
        if get_worker_info() is not None and position == 9:
            time.sleep(2)
        return encode(source, position, storage)

    monkeypatch.setattr(shard_writer, "encode_record", hang)
    monkeypatch.setattr("pipelines.conversion.job.PATIENCE", 0.5)
    ran = convert("shards", tree, tmp_path / "x", *SMALL["shards"])
    assert ran.code == 1 and "the workers gave nothing for a long time" in ran.err.splitlines()[-1], ran.err
    assert "storage hangs, perhaps" in ran.err and "the same command continues" in ran.err
    assert "Traceback" not in ran.err
    monkeypatch.undo()
    ok(convert("shards", tree, tmp_path / "x", *SMALL["shards"]))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_a_clear_error(
    tree: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk; afterwards the same command finishes."""
    out = tmp_path / "out"
    arguments = (kind, tree, out, "--workers", 1, *SMALL[kind])
    if kind == "shards":
        arguments = (*arguments[:-2], "--shard-size", 30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the child inherits it
        process = start(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    process.join()
    error = capfd.readouterr().err
    assert process.exitcode == 1 and "no space left" in error and "Traceback" not in error, error
    assert not (out.is_file() or list(tmp_path.glob("out/*.tar")) or (out / "images.npy").exists())
    ok(run_program(CONVERT, *arguments))
    assert len(stored_pixels(kind, out)) == 60


def test_a_finished_conversion_is_left_alone(tree: Path, tmp_path: Path) -> None:
    for kind in FORMATS:
        out = tmp_path / kind
        ok(convert(kind, tree, out, *SMALL[kind]))
        before = snapshot(out)
        ok(convert(kind, tree, out, *SMALL[kind]))
        ran = convert(kind, tree, out, *SMALL[kind], "--limit", 5)
        assert ran.code == 2 and "other settings" in ran.err and "source" in ran.err, ran
        assert snapshot(out) == before


# Mistakes


def spoilt(tmp_path: Path, tree: Path, case: str) -> tuple[Path, str]:
    """A bad source, and what the message must say."""
    image = next(tree.rglob("*.JPEG"))
    path = tmp_path / "bad"
    if case.startswith("tar"):
        with tarfile.open(path, "w:gz" if "gz" in case else "w") as tar:
            if "link" in case:
                info = tarfile.TarInfo("class0/a.jpg")
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                tar.add(image, {"tar ..": "../class0/a.jpg", "tar flat": "a.jpg"}.get(case, "class0/a.jpg"))
        if "cut" in case:
            path.write_bytes(path.read_bytes()[:700])
        says = {"tar ..": "outside", "tar flat": "class folders", "tar link": "link", "tar gz": "gunzip"}
        return path, says.get(case, "")
    if case.startswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            name = {"zip ..": "class0/../../a.jpg", "zip root": "/class0/a.jpg"}[case]
            archive.writestr(zipfile.ZipInfo(name), image.read_bytes())
        return path, "outside"
    if case == "sets":
        shutil.copytree(tree, path / "val")
        return path, f"holds val, not classes; choose: {path}/val"
    path.mkdir()
    if case == "no images":
        (path / "class0").mkdir()
        return path, "no images in this class folder"
    if case == "all bad":
        (path / "class0").mkdir()
        (path / "class0/a.jpg").write_bytes(b"x")
        return path, "no samples"
    return path / "missing/further", "no such file"


BAD = ("tar ..", "tar flat", "tar link", "tar gz", "zip ..", "zip root", "no images", "all bad", "sets", "missing")


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tree: Path, tmp_path: Path, case: str) -> None:
    source, says = spoilt(tmp_path, tree, case)
    ran = convert("ffcv", source, tmp_path / "out")
    assert ran.code == 2 and says in ran.err and "Traceback" not in ran.err, ran
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_places_that_cannot_be_written_to(tree: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    ran = convert(kind, tree, tmp_path / "file" / "out", *SMALL[kind])
    assert ran.code == 2 and "choose another" in ran.err and "Traceback" not in ran.err, ran
    ran = convert(kind, tree, tmp_path / "file", *SMALL[kind])
    assert ran.code == 2 and "choose another" in ran.err and "Traceback" not in ran.err, ran
    assert snapshot(tmp_path / "file") == {"file": b""}


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """Ten times the images, 7 MB of raw pixels more: memory grows by their names and sizes only."""

    def peak(kind: str, count: int) -> int:
        images = np.random.default_rng(0).integers(256, size=(7, 48, 48, 3), dtype=np.uint8)
        sources = Sources(
            classes=("a",),
            names=[f"a/{number}.png" for number in range(count)],
            labels=np.zeros(count, np.int64),
            read=lambda row: images[row % len(images)],
            rows=np.arange(count),
        )
        job = Job(sources=sources, out=tmp_path / f"{kind}{count}", workers=0)
        tracemalloc.start()
        try:
            if kind == "shards":
                to_shards(job, Storage(), shard_size=200)
            elif kind == "ffcv":
                to_beton(job, Storage(jpeg=0))
            else:
                to_resident(job, None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    for kind in FORMATS:
        peak(kind, 50)  # imports
        growth = peak(kind, 1100) - peak(kind, 110)
        assert growth < 990 * 1000, f"{kind}: {growth / 990:.0f} bytes an image"


def test_images_of_several_sizes_need_a_size(tree: Path, tmp_path: Path) -> None:
    ran = convert("resident", tree, tmp_path / "out")
    assert ran.code == 2 and "--size" in ran.err


# Others' readers


def test_stock_readers_of_shards(tree: Path, tmp_path: Path) -> None:
    ok(convert("shards", tree, tmp_path / "s", "--max-size", 0, "--shard-size", 25))
    index, pixels = DatasetIndex.load(tmp_path / "s/index"), list(stored_pixels("shards", tmp_path / "s").values())
    tars = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    try:
        import webdataset
        from nvidia.dali import fn, pipeline_def
        from wds2idx import IndexCreator  # type: ignore[import-untyped]  # DALI's
    except ImportError as error:
        absent(f"{error}")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls", "json"))
    assert [label for _, label, _ in samples] == index.labels.tolist()
    assert [about["name"] for _, _, about in samples] == list(index.names)
    assert all(np.array_equal(image, stored) for (image, _, _), stored in zip(samples, pixels, strict=True))

    for tar in tars:
        with IndexCreator(tar, str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_text() == Path(tar).with_suffix(".idx").read_text()

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def pipeline() -> Any:
        indexes = [str(Path(tar).with_suffix(".idx")) for tar in tars]
        jpeg, label = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg", "cls"], name="reader")  # type: ignore[misc]
        return fn.decoders.image(jpeg), label

    pipe = pipeline()
    pipe.build()
    seen = 0
    for _ in range(3):
        images, labels = pipe.run()
        for row in range(20):
            assert np.array_equal(np.array(images.at(row)), pixels[seen])
            assert int(bytes(labels.at(row)).decode()) == index.labels[seen]
            seen += 1
    assert pipe.reader_meta("reader")["epoch_size"] == 60


def test_stock_reader_of_beton(tree: Path, tmp_path: Path) -> None:
    """FFCV's own Loader: same labels and, decoded by its own fast DCT and resized by its own kernel, same pictures."""
    ok(convert("ffcv", tree, tmp_path / "x.beton", "--max-size", 0))
    index, pixels = (
        DatasetIndex.load(tmp_path / "x.beton.index"),
        list(stored_pixels("ffcv", tmp_path / "x.beton").values()),
    )
    try:
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor
    except ImportError as error:
        absent(f"{error}")
    threads = torch.get_num_threads()
    loader = Loader(
        str(tmp_path / "x.beton"),
        batch_size=20,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={
            "image": [CenterCropRGBImageDecoder((96, 96), ratio=1), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    seen, differences = 0, []
    for images, labels in loader:
        for image, label in zip(images.numpy().copy(), labels.flatten().tolist(), strict=True):
            assert label == index.labels[seen]
            stored = Image.fromarray(pixels[seen])
            side = min(stored.size)
            left, top = (stored.width - side) // 2, (stored.height - side) // 2
            square = stored.resize((96, 96), Image.Resampling.BOX, (left, top, left + side, top + side))
            differences.append(np.abs(image.astype(int) - np.array(square)).mean())
            seen += 1
    assert seen == 60 and max(differences) < 12 and np.mean(differences) < 6, differences
    torch.set_num_threads(threads)


def test_every_backend_opens_what_was_converted(tree: Path, tmp_path: Path) -> None:
    for kind, backend in (("ffcv", "ffcv"), ("resident", "resident")):
        ok(convert(kind, tree, tmp_path / kind, *SMALL[kind]))
        with open_loader(backend, tmp_path / kind, LoaderOptions(workers=1)) as loader:
            assert len(loader.index) == 60 and loader.index.classes == ("class0", "class1", "class2", "class3")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_output_is_written_by_one_conversion(tree: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / ("out.beton" if kind == "ffcv" else "out")
    name = {"ffcv": ".out.beton.lock", "shards": "out/.convert-0-of-1.lock", "resident": "out/.convert.lock"}[kind]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with Lock(tmp_path / name, ""):
        ran = convert(kind, tree, out, *SMALL[kind])
        assert ran.code == 2 and "another conversion is writing there" in ran.err, ran.err
    ok(convert(kind, tree, out, *SMALL[kind]))
    assert not list(tmp_path.rglob("*.lock"))
