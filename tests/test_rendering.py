"""The compiled renderer of the CPU loaders: the reference's bytes whatever is stored, and memory that stays flat."""

import ctypes
import gc
import hashlib
import importlib.util
import itertools
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, Digits
from PIL import Image
from test_loader_contract import need, odd_files, plan_of

from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.formats.stored import open_stored
from pipelines.images import renderer as rendering
from pipelines.images.decode import render
from pipelines.plan import Crops, RankPlan


@pytest.fixture(scope="module")
def box_decoder(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Address of decode_box in jpeg_box.c, as it is now; what is installed may be older."""
    built = tmp_path_factory.mktemp("built")
    build = f"import setuptools; setuptools.setup(script_args=['build_ext', '-b', {str(built)!r}, '-t', {str(built)!r}])"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (file,) = built.rglob("*.so")
    spec = importlib.util.spec_from_file_location("jpeg_box", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    address: int = module.decode_box
    return address


@pytest.fixture
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes JPEGs: `box` (jpeg_box.c), `whole` (TurboJPEG), or `slow`, where neither is installed."""
    name: str = request.param
    if name == "slow":
        monkeypatch.setattr(rendering, "turbojpeg", lambda: None)
    address = request.getfixturevalue("box_decoder") if name == "box" else 0
    monkeypatch.setattr(rendering, "box_decoder", lambda: address)
    return name


def jpegs(image: Image.Image, folder: Path) -> None:
    """One JPEG of every kind that decoders treat in its own way, and of sizes around their blocks of 8 to 32 pixels."""
    folder.mkdir(parents=True)
    pixels = np.asarray(image)
    samplings = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in (411, 420, 422, 440, 444)}
    extents = ((150, 203), (97, 64), (33, 131))
    for (name, value), (height, width) in itertools.product(samplings.items(), extents):
        settings = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, value, cv2.IMWRITE_JPEG_QUALITY, 60 + height % 40)
        for kind, more in (("", ()), ("restart", (cv2.IMWRITE_JPEG_RST_INTERVAL, 1 + width % 5))):
            if kind and height != 150:
                continue
            assert cv2.imwrite(
                str(folder / f"{name}-{height}{kind}.jpg"), pixels[:height, :width, ::-1], [*settings, *more]
            )
    options: dict[str, Any]
    for title, (height, width), options in (
        ("optimized", (120, 95), {"optimize": True, "quality": 95}),
        ("rows", (99, 140), {"restart_marker_rows": 1}),
        ("progressive", (99, 140), {"progressive": True}),
        ("coarse", (130, 77), {"quality": 5}),
        ("one", (1, 1), {}),
        ("low", (3, 180), {}),
        ("narrow", (170, 2), {}),
    ):
        image.crop((0, 0, width, height)).save(folder / f"{title}.jpg", **options)
        image.convert("L").crop((0, 0, width, height)).save(folder / f"{title}-gray.jpg", **options)


@pytest.fixture(scope="module")
def folder(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, small JPEGs, and one of them in every format that people keep under such names."""
    root = tmp_path_factory.mktemp("rendering")
    (root / "photo").mkdir()
    for path in photographs[:4]:
        (root / "photo" / path.name).symlink_to(path)
    with Image.open(photographs[5]) as image:
        small = image.convert("RGB").crop((0, 0, 210, 200))
        jpegs(small, root / "jpeg")
        small.save(root / "small.jpg", quality=95)
        odd_files(root / "small.jpg", root / "odd")
        (root / "small.jpg").unlink()
        Image.fromarray(np.asarray(small.convert("L"), np.uint16) * 257).save(root / "odd" / "deep.png")
    return root


# Loaders by what they read, and the decoders that they may meet.
LOADERS = {"folder": "torch", "shards": "torch", "jpeg.beton": "ffcv", "raw.beton": "ffcv"}


@pytest.fixture(scope="module")
def datasets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as every CPU loader reads them; odd files are settled at conversion."""
    out = tmp_path_factory.mktemp("datasets")
    for name, write, jpeg in (("shards", to_shards, 1), ("jpeg.beton", to_beton, 1), ("raw.beton", to_beton, 0)):
        job = Job(sources=open_sources(folder), out=out / name, workers=1)
        write(job, Storage(max_size=None, jpeg=jpeg))
    return {"folder": folder, **{name: out / name for name in LOADERS if name != "folder"}}


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[int, int, bytes], torch.Tensor]:
    """What the reference made in plan number n of a row, by n, row and picture."""
    return {}


def boxes_of(loader: Loader, size: int, seed: int) -> RankPlan:
    """Every image once, through boxes anywhere, some reaching outside."""
    rng = np.random.default_rng(seed)
    extent = loader.index.sizes.astype(np.int64)
    shape = np.maximum((extent * rng.uniform(0, 1.2, extent.shape)).astype(int), 1)
    start = (rng.uniform(-0.1, 1, extent.shape) * np.maximum(extent - shape, 1)).astype(int)
    boxes = np.concatenate([start, shape], 1).astype(np.int32)
    crops = (Crops(boxes=boxes, flips=rng.random(len(boxes)) < 0.5, size=size),)
    return RankPlan(ids=np.arange(len(boxes)), crops=crops, batch_size=64, batches=-(-len(boxes) // 64))


def shown(loader: Loader, rank_plan: RankPlan) -> torch.Tensor:
    return torch.cat([batch.images[0] for batch in loader.epoch(rank_plan)])


BOXES = 3000


@pytest.mark.parametrize(
    ("decoder", "name"),
    [*itertools.product(("box", "whole"), LOADERS), *itertools.product(("slow",), ("folder", "shards"))],
    indirect=["decoder"],
)
def test_random_boxes_look_as_the_reference_shows_them(
    decoder: str, name: str, datasets: dict[str, Path], drawn: dict[tuple[int, int, bytes], torch.Tensor]
) -> None:
    """To the last bit, whatever is stored and whatever decodes it: 3,000 boxes, 32 to 512 pixels, mirrored or not."""
    with open_loader(LOADERS[name], datasets[name], LoaderOptions(workers=2)) as loader:
        stored = open_stored(datasets[name], loader.index)
        assert stored
        pictures = [stored.pixels(sample) for sample in range(len(loader.index))]
        stored.close()
        keys = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pictures]
        plans = -(-BOXES // len(pictures)) if decoder == "box" else 8
        different = []
        for number in range(plans):
            size = round(32 * 16 ** ((number * 0.618) % 1))
            rank_plan = boxes_of(loader, size, number)
            (each,) = rank_plan.crops
            for row, image in enumerate(shown(loader, rank_plan)):
                expected = drawn.get((number, row, keys[row]))
                if expected is None:
                    expected = render(pictures[row], each.boxes[row], bool(each.flips[row]), size)
                    drawn[number, row, keys[row]] = expected
                if not torch.equal(image, expected):
                    different.append((loader.index.names[row], each.boxes[row], size))
        assert not different, (len(different), different[:5])


@pytest.mark.parametrize("decoder", ["box", "whole"], indirect=True)
def test_several_crops_of_one_image_look_as_one_alone(decoder: str, folder: Path) -> None:
    """Decoded once, as much as all of them show."""
    with open_loader("torch", folder, LoaderOptions(workers=2)) as loader:
        plans = [boxes_of(loader, size, seed) for seed, size in enumerate((48, 96, 33))]
        together = replace(plans[0], crops=tuple(plan.crops[0] for plan in plans))
        found = [
            torch.cat(parts) for parts in zip(*(batch.images for batch in loader.epoch(together)), strict=True)
        ]
        for images, plan in zip(found, plans, strict=True):
            assert torch.equal(images, shown(loader, plan))


@pytest.mark.parametrize("decoder", ["box"], indirect=True)
def test_damage_is_noticed_where_it_is_shown_and_a_cut_file_always(
    decoder: str, photographs: list[Path], tmp_path: Path
) -> None:
    """Below its box a damaged JPEG is not read: the box shows what it did."""
    (tmp_path / "x").mkdir()
    with Image.open(photographs[0]) as image:
        whole = image.convert("RGB").resize((320, 320))
        whole.save(tmp_path / "x" / "cut.jpg", quality=90)
        whole.save(tmp_path / "x" / "marked.jpg", quality=90)
    cut, marked = (tmp_path / "x" / name for name in ("cut.jpg", "marked.jpg"))
    cut.write_bytes(cut.read_bytes()[:-200])
    data = bytearray(marked.read_bytes())
    data[len(data) * 3 // 4 : len(data) * 3 // 4 + 2] = b"\xff\xc0"  # a second frame, which no decoder takes
    marked.write_bytes(data)
    whole.save(tmp_path / "x" / "whole.jpg", quality=90)
    options = LoaderOptions(workers=1, on_decode_error="skip_and_report")
    with open_loader("torch", tmp_path, options) as loader:

        def crops(box: tuple[int, int, int, int]) -> torch.Tensor:
            made = Crops(boxes=np.tile(np.array(box, np.int32), (3, 1)), flips=np.zeros(3, np.bool_), size=64)
            return shown(loader, RankPlan(ids=np.arange(3), crops=(made,), batch_size=3, batches=1))

        upper = crops((16, 30, 100, 200))
        assert [*loader.undecodable] == [0] and torch.equal(upper[1], upper[2])
        lower = crops((250, 30, 60, 200))
        assert sorted(loader.undecodable) == [0, 1] and not lower[1].any() and lower[2].any()


def test_photographs_are_decoded_by_the_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progressive and gray ones too; the others are few."""
    left: list[str] = []
    with open_loader("torch", folder, LoaderOptions(workers=2)) as loader:
        source = loader._renderer._source  # type: ignore[attr-defined]
        decode_slowly = source.decode

        def noted(sample_id: int, data: bytes) -> torch.Tensor:
            left.append(loader.index.names[sample_id])
            return decode_slowly(sample_id, data)

        monkeypatch.setattr(source, "decode", noted)
        shown(loader, boxes_of(loader, 64, 0))
    named = {Path(name).name for name in left}
    assert named == {
        "alpha.png",
        "bitmap.bmp",
        "cmyk.JPEG",
        "deep.png",
        "gray.png",
        "palette.png",
        "png.JPEG",
        "web.webp",
    }


@pytest.mark.parametrize(
    ("name", "loads", "error", "says"),
    [
        ("turbojpeg", (ctypes, "CDLL"), OSError, "apt-get install libturbojpeg0"),
        ("box_decoder", (rendering, "import_module"), ImportError, "apt-get install g++ libjpeg-dev"),
    ],
)
def test_a_missing_library_is_named_once(
    name: str, loads: tuple[object, str], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("pipelines.images.renderer"), "handle", lambda record: lines.append(record.getMessage())
    )

    def nothing(name: str) -> None:
        raise error(name)

    monkeypatch.setattr(*loads, nothing)
    find = getattr(rendering, name)
    find.cache_clear()
    try:
        assert not find() and not find()
    finally:
        find.cache_clear()
    assert len(lines) == 1 and says in lines[0]


def test_a_file_replaced_after_indexing_is_named(folder: Path, tmp_path: Path) -> None:
    """By one of another size, which TurboJPEG would scale or write beyond the buffer; and by nothing."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "x" / name)
    options = LoaderOptions(workers=1, on_decode_error="skip_and_report")
    with open_loader("torch", tmp_path, options) as loader:
        Image.new("RGB", (640, 480)).save(tmp_path / "x" / "a.jpg")
        (tmp_path / "x" / "c.jpg").unlink()
        shown(loader, boxes_of(loader, 32, 0))
        assert sorted(loader.undecodable) == [0, 2]
        assert "480x640 pixels now" in str(loader.undecodable[0]) and "no such file" in str(loader.undecodable[2])


# ---- memory


def resident_bytes() -> int:
    """This process's memory, without what malloc keeps for itself."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(
    params=["torch", "torch-shards", "ffcv", "resident", "dali", "dali-shards", "synthetic", "replay:torch"]
)
def small(
    request: pytest.FixtureRequest, photographs: list[Path], digits: Digits, tmp_path: Path
) -> Iterator[Loader]:
    """Some photographs in each loader, as files of each kind; digits in memory."""
    kind = request.param
    backend, _, stored = kind.partition("-")
    backend, _, replays = backend.partition(":")
    if backend in ("ffcv", "dali"):
        need({"ffcv": "ffcv", "dali": "nvidia.dali"}[backend])
    if kind == "resident":
        path = digits.resident / "val"
    elif kind == "synthetic":
        path = Path("200x10")
    else:
        root = tmp_path / "photos"
        for number, photo in enumerate(photographs[:32]):
            with Image.open(photo) as image:
                made = root / str(number % 2) / photo.name
                made.parent.mkdir(parents=True, exist_ok=True)
                image.convert("RGB").reduce(4).save(made)
        path = tmp_path / "converted" if stored or kind == "ffcv" else root
        if path != root:
            write = to_beton if kind == "ffcv" else to_shards
            write(Job(sources=open_sources(root), out=path, workers=0), Storage())
    with open_loader(backend, path, LoaderOptions(workers=2, replays=replays)) as loader:
        yield loader


def test_memory_stays_flat_over_41_epochs_and_early_breaks(small: Loader) -> None:
    """Four broken off after each whole one: within 2 %."""

    def epochs(count: int) -> None:
        for number in range(count):
            for _ in small.epoch(plan_of(small, epoch=number, batch_size=8).for_rank((32,))):
                pass
            for broken in range(4):
                epoch = small.epoch(plan_of(small, epoch=number + broken, batch_size=8).for_rank((32,)))
                next(epoch)
                if broken % 2:
                    epoch.close()

    epochs(5)
    before = resident_bytes()
    epochs(41)
    assert resident_bytes() < 1.02 * before
