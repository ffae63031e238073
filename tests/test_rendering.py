"""The compiled renderer of the CPU loaders: the reference's bytes whatever is stored, and memory that stays flat."""

import ctypes
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Digits
from PIL import Image
from test_loader_contract import need, odd_files, plan_of

from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.formats.stored import open_shards
from pipelines.images import renderer as rendering
from pipelines.images.decode import decode, render
from pipelines.plan import Crops, RankPlan

SIZES = (32, 97, 224, 512)


@pytest.fixture(scope="module")
def folder(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and one of them in every format that people keep under such names."""
    root = tmp_path_factory.mktemp("rendering")
    odd_files(photographs[3], root / "odd")
    (root / "photo").mkdir()
    for path in photographs[:12]:
        (root / "photo" / path.name).symlink_to(path)
    with Image.open(photographs[5]) as image:
        for quality, subsampling in ((30, 2), (75, 1), (95, 0)):
            small = image.convert("RGB").crop((0, 0, 61 + quality, 77))
            small.save(root / "photo" / f"small{quality}.jpg", quality=quality, subsampling=subsampling)
            small.save(root / "photo" / f"small{quality}p.jpg", quality=quality, progressive=True)
        Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).save(root / "odd" / "deep.png")
    return root


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


def check(loader: Loader, stored: list[bytes], seeds: range) -> None:
    """Each image as the reference decodes and renders it, bit by bit."""
    pictures = [decode(data) for data in stored]
    for seed in seeds:
        size = SIZES[seed % len(SIZES)]
        rank_plan = boxes_of(loader, size, seed)
        (each,) = rank_plan.crops
        for row, image in enumerate(shown(loader, rank_plan)):
            expected = render(pictures[row], each.boxes[row], bool(each.flips[row]), size)
            assert torch.equal(image, expected), (loader.index.names[row], each.boxes[row], size)


@pytest.mark.parametrize("library", [True, False], ids=["turbojpeg", "none"])
def test_class_folders_show_the_references_bytes(
    library: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(rendering, "turbojpeg", lambda: None)
    with open_loader("torch", folder, LoaderOptions(workers=2)) as loader:
        check(loader, [(folder / name).read_bytes() for name in loader.index.names], range(8 if library else 2))


def test_shards_show_the_references_bytes(folder: Path, tmp_path: Path) -> None:
    to_shards(Job(sources=open_sources(folder), out=tmp_path / "shards", workers=1), Storage())
    index, samples = open_shards(tmp_path / "shards")
    stored = [bytes(samples.read(sample)) for sample in range(len(index))]
    with open_loader("torch", tmp_path / "shards", LoaderOptions(workers=2)) as loader:
        check(loader, stored, range(4))


def test_photographs_are_decoded_by_the_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progressive and gray ones too; the others are few."""
    left: list[str] = []
    with open_loader("torch", folder, LoaderOptions(workers=2)) as loader:
        source = loader._renderer._source  # type: ignore[attr-defined]
        decode_slowly = source.decode
        monkeypatch.setattr(
            source, "decode", lambda i, data: (left.append(loader.index.names[i]), decode_slowly(i, data))[1]
        )
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


def test_a_missing_library_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("pipelines.images.renderer"), "handle", lambda record: lines.append(record.getMessage())
    )

    def nothing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    rendering.turbojpeg.cache_clear()
    try:
        assert rendering.turbojpeg() is None and rendering.turbojpeg() is None
    finally:
        rendering.turbojpeg.cache_clear()
    assert len(lines) == 1 and "apt-get install libturbojpeg0" in lines[0]


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
