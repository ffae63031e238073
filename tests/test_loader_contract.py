"""What every loader backend promises, tested through the public interface on real photographs.

A backend joins by adding a `Case` maker below: it stores the photographs in its own way and says which
pixels it stored. Expected pixels come from Pillow, written here independently of any loader.
"""

import functools
import gc
import importlib.util
import io
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import absent
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines import files
from pipelines.base import BACKENDS, Batch, DecodeError, Loader, LoaderOptions, open_loader
from pipelines.conversion import beton_writer, shard_writer
from pipelines.conversion.encode import Source, Storage
from pipelines.formats import shards
from pipelines.images.decode import render
from pipelines.index import DatasetIndex
from pipelines.plan import Crops, EpochPlan, RankPlan, order
from pipelines.views import Center, RandomResizedCrop, ViewFamily

PHOTOS = 40
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One backend on one way of storing the photographs.

    Attributes:
        name: its entry in CASES: the backend, and what it reads where there is a choice.
        path: the dataset.
        stored: the pixels of every sample, uint8 [H, W, 3], by id.
        labels: by id.
        tolerance: mean and largest difference (of 255) from Pillow's crop and resize of `stored`.
        damage: destroys a sample's encoded bytes, by id; None if plain pixels are stored.
    """

    name: str
    path: Path
    stored: list[Pixels]
    labels: list[int]
    tolerance: tuple[float, int]
    damage: Callable[[Path, int], None] | None = None

    @property
    def backend(self) -> str:
        return self.name.partition("-")[0]

    def open(self, **options: object) -> Loader:
        return open_loader(self.backend, self.path, LoaderOptions(**{"workers": 2, **options}))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def photos(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree of real photographs in 8 classes."""
    root = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(photographs[:PHOTOS]):
        folder = root / f"class{number * 8 // PHOTOS}"
        folder.mkdir(exist_ok=True)
        (folder / path.name).symlink_to(path)
    return root


def photo_paths(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"), key=lambda path: str(path.relative_to(root)))


def read_pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def folder_labels(root: Path) -> list[int]:
    return [int(path.parent.name.removeprefix("class")) for path in photo_paths(root)]


def cut_file(root: Path, sample: int) -> None:
    """Replace a file of an ImageFolder by its first half."""
    path = photo_paths(root)[sample]
    data = path.read_bytes()
    path.unlink()  # it is a link to the shared original
    path.write_bytes(data[: len(data) // 2])


def torch_case(photos: Path, scratch: Path) -> Case:
    pixels = [read_pixels(path) for path in photo_paths(photos)]
    return Case("torch", photos, pixels, folder_labels(photos), (0.3, 2), cut_file)


def resident_case(photos: Path, scratch: Path) -> Case:
    pixels = [np.array(ImageOps.fit(Image.fromarray(read_pixels(p)), (64, 48))) for p in photo_paths(photos)]
    labels = folder_labels(photos)
    names = [str(path.relative_to(photos)) for path in photo_paths(photos)]
    sizes = np.full((len(pixels), 2), (48, 64), np.int32)
    classes = tuple(sorted({path.parent.name for path in photo_paths(photos)}))
    index = DatasetIndex(classes=classes, labels=np.array(labels), sizes=sizes, names=names)
    index.save(scratch)
    np.save(scratch / "images.npy", np.stack(pixels))
    return Case("resident", scratch, pixels, labels, (0.3, 2))


def stored_sources(photos: Path) -> list[Source]:
    """The photographs as a converter gets them."""
    paths, labels = photo_paths(photos), folder_labels(photos)
    names = [str(path.relative_to(photos)) for path in paths]
    return [Source(name=n, label=v, data=p.read_bytes()) for n, v, p in zip(names, labels, paths, strict=True)]


def need(module: str) -> None:
    """An optional package: without it, its backend is not tested."""
    if importlib.util.find_spec(module) is None:
        absent(f"{module} is not installed")


def ffcv_case(photos: Path, scratch: Path, jpeg: float) -> Case:
    """Images of at most 400 pixels, JPEG or raw."""
    need("ffcv")
    storage = Storage(max_size=400, jpeg=jpeg)
    path = scratch / "photos.beton"
    records = [beton_writer.encode_record(s, number, storage) for number, s in enumerate(stored_sources(photos))]
    writer = beton_writer.BetonWriter(path, capacity=len(records), storage=storage)
    writer.append(records, sources=len(records))
    index = writer.finish([f"class{number}" for number in range(8)])
    assert index.offsets is not None
    if jpeg:
        pixels = [np.array(Image.open(io.BytesIO(record.payload.tobytes()))) for record in records]
    else:
        pixels = [record.payload.reshape(record.height, record.width, 3) for record in records]
    offsets = index.offsets.tolist()

    def damage(path: Path, sample: int) -> None:
        with path.open("r+b") as file:
            file.seek(offsets[sample])
            file.write(bytes(100))

    name, labels = ("ffcv-jpeg" if jpeg else "ffcv-raw"), [record.label for record in records]
    return Case(name, path, pixels, labels, (0.3, 2), damage if jpeg else None)


# DALI repeats the pixels at the edge of a crop where Pillow leaves them out of the filter's sum.
DALI = (1.2, 40)


def dali_folder_case(photos: Path, scratch: Path) -> Case:
    need("nvidia.dali")
    return replace(torch_case(photos, scratch), name="dali-folder", tolerance=DALI)


def dali_shards_case(photos: Path, scratch: Path) -> Case:
    need("nvidia.dali")
    return replace(torch_shards_case(photos, scratch), name="dali-shards", tolerance=DALI)


def torch_shards_case(photos: Path, scratch: Path) -> Case:
    """Images of at most 400 pixels, shrunk and encoded again, in three tars."""
    storage = Storage(max_size=400)
    records = [shard_writer.encode_record(s, number, storage) for number, s in enumerate(stored_sources(photos))]
    for number, start in enumerate(range(0, PHOTOS, 15)):
        shard_writer.write_shard(scratch, number, records[start : start + 15])
    shard_writer.finish_shards(scratch, [f"class{number}" for number in range(8)])
    pixels = [np.array(Image.open(io.BytesIO(record.data))) for record in records]
    places = [
        (shards.shard_path(scratch, n), line)
        for n in range(3)
        for line in shard_writer._read_idx(shards.shard_path(scratch, n))
    ]

    def damage(path: Path, sample: int) -> None:
        tar, members = places[sample]
        with tar.open("r+b") as file:
            file.seek(members["jpg"].offset)
            file.write(bytes(100))

    return Case("torch-shards", scratch, pixels, [record.label for record in records], (0.3, 2), damage)


CASES: dict[str, Callable[[Path, Path], Case]] = {
    "torch": torch_case,
    "torch-shards": torch_shards_case,
    "resident": resident_case,
    "ffcv-jpeg": functools.partial(ffcv_case, jpeg=1.0),
    "ffcv-raw": functools.partial(ffcv_case, jpeg=0.0),
    "dali-shards": dali_shards_case,
    "dali-folder": dali_folder_case,
}
PLAIN_PIXELS = ("resident", "ffcv-raw")  # nothing to decode, nothing that can fail to
READS_ORIGINALS = ("torch", "dali-folder")


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](photos, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def loader(case: Case) -> Iterator[Loader]:
    """One loader a backend for the tests that only read: every test is another epoch of it."""
    with case.open() as loader:
        yield loader


def random_rendering(case: Case, ids: NDArray[np.int64], size: int, seed: int, outside: int = 0) -> Crops:
    """Boxes anywhere in the images, from 1 pixel to the whole, reaching up to `outside` pixels beyond."""
    rng = np.random.default_rng(seed)
    extent = np.array([case.stored[i].shape[:2] for i in ids])
    shape = np.maximum((extent * rng.uniform(0, 1, extent.shape)).astype(int), 1)
    shape[::7] = extent[::7]
    start = (rng.uniform(0, 1, extent.shape) * (extent - shape + 1)).astype(int)
    start -= rng.integers(0, outside + 1, start.shape)
    shape += rng.integers(0, 2 * outside + 1, shape.shape)
    boxes = np.concatenate([start, shape], 1).astype(np.int32)
    return Crops(boxes=boxes, flips=rng.random(len(ids)) < 0.5, size=size)


def make_work(case: Case, sizes: tuple[int, ...] = (64,), *, batch_size: int = 16, seed: int = 0) -> RankPlan:
    ids = np.random.default_rng(seed).permutation(len(case.stored))
    crops = tuple(random_rendering(case, ids, size, seed + n) for n, size in enumerate(sizes))
    return RankPlan(ids=ids, crops=crops, batch_size=batch_size, batches=-(-len(ids) // batch_size))


def select(rank_plan: RankPlan, rows: list[int]) -> RankPlan:
    """Some rows of `work`, as one batch."""
    crops = tuple(Crops(boxes=r.boxes[rows], flips=r.flips[rows], size=r.size) for r in rank_plan.crops)
    return RankPlan(ids=rank_plan.ids[rows], crops=crops, batch_size=len(rows), batches=1)


def plan_of(loader: Loader, *, epoch: int = 0, batch_size: int = 12) -> EpochPlan:
    return EpochPlan(
        index=loader.index,
        family=RandomResizedCrop(),
        view_seed=5,
        view=1,
        order=order(len(loader.index), seed=3, epoch=epoch),
        batch_size=batch_size,
    )


def expected_pixels(stored: Pixels, box: NDArray[np.int32], flip: bool, size: int) -> Pixels:
    """Pillow's crop (black outside), antialiased bilinear resize and mirror."""
    top, left, height, width = (int(value) for value in box)
    image = Image.fromarray(stored).crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(ImageOps.mirror(image) if flip else image)


def check_pixels(case: Case, rank_plan: RankPlan, batches: list[Batch]) -> None:
    means, largest = [], 0
    for number, batch in enumerate(batches):
        rows = rank_plan.rows(number)
        for each, images in zip(rank_plan.crops, batch.images, strict=True):
            assert images.dtype == torch.uint8
            assert images.shape == (len(batch.ids), 3, each.size, each.size)
            for row, image in zip(range(*rows.indices(len(rank_plan.ids))), images, strict=True):
                pixels = case.stored[rank_plan.ids[row]]
                expected = expected_pixels(pixels, each.boxes[row], each.flips[row], each.size)
                difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
                means.append(difference.mean())
                largest = max(largest, int(difference.max()))
    mean_limit, limit = case.tolerance
    assert max(means) <= mean_limit and largest <= limit, f"mean {max(means):.3f}, max {largest}"


def by_id(batches: list[Batch]) -> dict[int, bytes]:
    """Every sample's pixels in every rendering, as bytes, by id."""
    return {
        int(sample): b"".join(images[row].contiguous().numpy().tobytes() for images in batch.images)
        for batch in batches
        for row, sample in enumerate(batch.ids)
    }


def test_every_backend_has_a_case() -> None:
    assert set(BACKENDS) <= {name.partition("-")[0] for name in CASES}


def test_index_describes_the_stored_images(case: Case, loader: Loader) -> None:
    assert loader.index.sizes.tolist() == [list(pixels.shape[:2]) for pixels in case.stored]
    assert loader.index.labels.tolist() == case.labels


def test_pixels_labels_and_ids(case: Case, loader: Loader) -> None:
    rank_plan = make_work(case)
    batches = list(loader.epoch(rank_plan))
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]  # the last one is short
    assert torch.cat([batch.ids for batch in batches]).tolist() == rank_plan.ids.tolist()
    assert all(batch.ids.dtype == batch.labels.dtype == torch.int64 for batch in batches)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [case.labels[i] for i in rank_plan.ids]
    check_pixels(case, rank_plan, batches)


def test_batches_do_not_overwrite_each_other(case: Case, loader: Loader) -> None:
    rank_plan = make_work(case, batch_size=4)
    kept = list(loader.epoch(rank_plan))
    again: dict[int, Any] = {}
    for batch in loader.epoch(rank_plan):
        again |= by_id([batch])
    assert by_id(kept) == again


def test_boxes_that_reach_outside_read_black(case: Case, loader: Loader) -> None:
    rank_plan = make_work(case)
    rank_plan = replace(rank_plan, crops=(random_rendering(case, rank_plan.ids, 48, seed=1, outside=20),))
    check_pixels(case, rank_plan, list(loader.epoch(rank_plan)))


def test_a_box_of_the_output_size_is_copied_unchanged(case: Case, loader: Loader) -> None:
    """Pad-and-crop: shifted by up to 4 pixels, never resized; exact in every backend."""
    rank_plan = make_work(case)
    rng = np.random.default_rng(0)
    boxes = np.full((len(rank_plan.ids), 4), 40, np.int32)
    boxes[:, :2] = rng.integers(-4, 5, (len(rank_plan.ids), 2))
    rank_plan = replace(rank_plan, crops=(Crops(boxes=boxes, flips=rank_plan.crops[0].flips, size=40),))
    check_pixels(replace(case, tolerance=(0.0, 0)), rank_plan, list(loader.epoch(rank_plan)))


def test_renderings_of_several_sizes_and_boxes(case: Case, loader: Loader) -> None:
    different = make_work(case, (48, 96))
    check_pixels(case, different, list(loader.epoch(different)))
    first = different.crops[0]
    same = replace(different, crops=(first, replace(first, size=80)))
    check_pixels(case, same, list(loader.epoch(same)))


def test_another_size_each_epoch(case: Case, loader: Loader) -> None:
    for epoch, size in enumerate((32, 56, 40)):
        rank_plan = make_work(case, (size,), seed=epoch)
        check_pixels(case, rank_plan, list(loader.epoch(rank_plan)))


@pytest.mark.parametrize("family", [RandomResizedCrop(), Center()], ids=["train", "centre"])
def test_pixels_are_those_of_the_torch_loader(case: Case, loader: Loader, family: ViewFamily) -> None:
    """At 224 px, from the same stored pixels; tools/check_parity.py shows it for a user's own data and teacher."""
    plan = replace(plan_of(loader), family=family)
    rank_plan = plan.for_rank((224,))
    differences = []
    for number, batch in enumerate(loader.epoch(rank_plan)):
        for row, image in zip(range(*rank_plan.rows(number).indices(PHOTOS)), batch.images[0], strict=True):
            pixels = torch.from_numpy(case.stored[rank_plan.ids[row]]).permute(2, 0, 1)
            each = rank_plan.crops[0]
            expected = render(pixels, each.boxes[row], bool(each.flips[row]), 224)
            differences.append((image.int() - expected.int()).abs().float().mean().item())
    limit = {"torch": 0.0, "ffcv": 0.0, "dali": 0.3, "resident": 0.3}[case.backend]
    assert len(differences) == PHOTOS and max(differences) <= limit, max(differences)


def test_ffcv_from_a_file_larger_than_memory(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are then asked for image by image: the same bytes."""
    case = ffcv_case(photos, tmp_path, jpeg=1.0)
    pictures = []
    for memory in (1, 1 << 50):
        monkeypatch.setattr(files, "memory_bytes", lambda memory=memory: memory)
        with case.open() as loader:
            pictures.append(torch.cat([batch.images[0] for batch in loader.epoch(make_work(case, (64,)))]))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("jpeg", [0.0, 1.0], ids=["raw", "jpeg"])
def test_ffcv_renders_any_shape_bit_by_bit(tmp_path: Path, jpeg: float) -> None:
    """Images of a few pixels, boxes that reach far outside them, outputs that no vector divides."""
    need("ffcv")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*rng.integers(1, 50, 2), 3), dtype=np.uint8) for _ in range(200)]
    sources = [
        Source(name=f"{number}.png", label=0, data=encode_png(picture)) for number, picture in enumerate(pictures)
    ]
    storage = Storage(jpeg=jpeg)
    records = [beton_writer.encode_record(source, number, storage) for number, source in enumerate(sources)]
    writer = beton_writer.BetonWriter(tmp_path / "x.beton", capacity=len(records), storage=storage)
    writer.append(records, sources=len(records))
    writer.finish(["noise"])
    if jpeg:
        pictures = [np.array(Image.open(io.BytesIO(record.payload.tobytes()))) for record in records]
    with open_loader("ffcv", tmp_path / "x.beton", LoaderOptions(workers=2)) as loader:
        for size in (5, 16, 43, 67):
            rank_plan = plan_of(loader).for_rank((size,))
            shapes = rng.integers(1, 70, (len(rank_plan.ids), 2))
            corners = rng.integers(1 - shapes, loader.index.sizes[rank_plan.ids])  # some pixel is inside
            boxes = np.concatenate([corners, shapes], 1).astype(np.int32)
            each = replace(rank_plan.crops[0], boxes=boxes)
            for number, batch in enumerate(loader.epoch(replace(rank_plan, crops=(each,)))):
                for row, image in zip(
                    range(*rank_plan.rows(number).indices(len(rank_plan.ids))), batch.images[0], strict=True
                ):
                    pixels = torch.from_numpy(pictures[rank_plan.ids[row]]).permute(2, 0, 1)
                    expected = render(pixels, boxes[row], bool(each.flips[row]), size)
                    assert torch.equal(image, expected), (pixels.shape, boxes[row], size)


def encode_png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("name", ["ffcv", "dali"])
def test_a_missing_package_is_a_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"ffcv": "ffcv", "dali": "nvidia.dali"}[name]
    for module in [each for each in sys.modules if each == package or each.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"pip install 'fastdcd[{name}]'")):
        open_loader(name, tmp_path / "x", LoaderOptions())


def test_empty_last_batch(loader: Loader) -> None:
    """Fewer samples left than ranks: this rank has no row of the last batch, but takes the step."""
    plan = replace(plan_of(loader), order=np.arange(25, dtype=np.int64))  # 12 + 12 + 1: rank 0 of 2 has 6, 6, 0
    batches = list(loader.epoch(plan.for_rank((32,), rank=0, world_size=2)))
    assert [len(batch.ids) for batch in batches] == [6, 6, 0]
    assert batches[-1].images[0].shape == (0, 3, 32, 32)


def test_resumed_epoch_is_the_rest_of_it(loader: Loader) -> None:
    plan = plan_of(loader)
    whole = list(loader.epoch(plan.for_rank((32,))))
    rest = list(loader.epoch(plan.for_rank((32,), start_step=2)))
    assert by_id(rest) == by_id(whole[2:])
    assert list(loader.epoch(plan.for_rank((32,), start_step=plan.steps))) == []


def test_same_bytes_whatever_the_order_batch_size_and_workers(case: Case, loader: Loader) -> None:
    expected = by_id(list(loader.epoch(plan_of(loader, epoch=0).for_rank((48,)))))
    assert len(expected) == PHOTOS
    shuffled = plan_of(loader, epoch=1, batch_size=7).for_rank((48,))
    assert by_id(list(loader.epoch(shuffled))) == expected
    for workers in (1, 3):
        with case.open(workers=workers) as other:
            assert by_id(list(other.epoch(plan_of(other, epoch=2).for_rank((48,))))) == expected


def test_same_bytes_on_one_and_two_ranks(case: Case, loader: Loader) -> None:
    plan = plan_of(loader)
    alone = list(loader.epoch(plan.for_rank((48,))))
    with case.open(workers=1) as other:
        parts = [
            list(rank.epoch(plan.for_rank((48,), rank=r, world_size=2))) for r, rank in enumerate((loader, other))
        ]
    for whole, first, second in zip(alone, *parts, strict=True):
        assert whole.ids.tolist() == first.ids.tolist() + second.ids.tolist()
        assert torch.equal(whole.images[0], torch.cat([first.images[0], second.images[0]]))


def test_starting_an_epoch_ends_the_running_one(case: Case, loader: Loader) -> None:
    first_work, second_work = make_work(case, seed=1), make_work(case, seed=2)
    first = loader.epoch(first_work)
    next(first)
    second = loader.epoch(second_work)
    batches = [next(second)]
    assert next(first, None) is None
    batches += list(second)
    check_pixels(case, second_work, batches)


def resources() -> dict[str, int]:
    """Threads, child processes and file descriptors of this process."""
    gc.collect()
    children = sum(
        len((task / "children").read_text().split()) for task in Path("/proc/self/task").iterdir() if task.exists()
    )
    return {
        "python threads": threading.active_count(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "children": children,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def settled_resources(limit: dict[str, int], seconds: float = 5.0) -> dict[str, int]:
    """Wait until nothing exceeds `limit`: threads and processes need a moment to go."""
    end = time.monotonic() + seconds
    while True:
        now = resources()
        if all(now[name] <= limit[name] for name in limit) or time.monotonic() > end:
            return now
        time.sleep(0.05)


def test_breaking_out_of_epochs_leaks_nothing(case: Case) -> None:
    def interrupted_epochs(loader: Loader, count: int) -> None:
        for seed in range(count):
            epoch = loader.epoch(make_work(case, (32,), batch_size=4, seed=seed))
            next(epoch)
            if seed % 2:
                epoch.close()

    with case.open() as warm:  # libraries start pools of their own once a process
        interrupted_epochs(warm, 2)
    before = resources()
    with case.open() as loader:
        interrupted_epochs(loader, 2)
        running = resources()
        interrupted_epochs(loader, 12)
        assert len(list(loader.epoch(make_work(case)))) == 3
        after = settled_resources(running)
        assert all(after[name] <= running[name] for name in running), (running, after)
    loader.close()  # twice is fine
    closed = settled_resources(before)
    assert all(closed[name] <= before[name] for name in before), (before, closed)


@pytest.fixture(params=[name for name in CASES if name not in PLAIN_PIXELS])
def damaged(request: pytest.FixtureRequest, photos: Path, tmp_path: Path) -> Case:
    """A case of its own, whose files a test may damage."""
    copy = tmp_path / "photos"
    for path in photo_paths(photos):
        target = copy / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    (tmp_path / "dataset").mkdir()
    return CASES[request.param](copy, tmp_path / "dataset")


def test_a_damaged_image_names_its_sample(damaged: Case) -> None:
    assert damaged.damage
    rank_plan = make_work(damaged)
    bad = int(rank_plan.ids[20])
    with damaged.open() as loader:
        damaged.damage(damaged.path, bad)
        epoch = loader.epoch(rank_plan)
        next(epoch)  # the first batch is whole
        with pytest.raises(DecodeError, match=re.escape(loader.index.names[bad])) as error:
            list(epoch)
        assert error.value.sample_id == bad
        good = select(rank_plan, list(range(16)))
        check_pixels(damaged, good, list(loader.epoch(good)))  # the loader still works


def test_damaged_images_can_be_skipped_and_reported(damaged: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one batch and one later: shown black under their own label; everything else is right."""
    assert damaged.damage
    warnings: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("pipelines.base"), "handle", lambda record: warnings.append(record.getMessage())
    )
    rank_plan = make_work(damaged)
    bad = sorted(int(rank_plan.ids[row]) for row in (2, 9, 35))
    with damaged.open(on_decode_error="skip_and_report") as loader:
        for sample in bad:
            damaged.damage(damaged.path, sample)
        for _ in range(2):
            batches = list(loader.epoch(rank_plan))
        assert sorted(loader.undecodable) == bad
        assert [sum(loader.index.names[sample] in line for line in warnings) for sample in bad] == [1, 1, 1]
    shown = list(damaged.stored)
    for sample in bad:
        shown[sample] = np.zeros_like(shown[sample])
    check_pixels(replace(damaged, stored=shown), rank_plan, batches)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [damaged.labels[i] for i in rank_plan.ids]


def odd_files(photo: Path, folder: Path) -> None:
    """What a collection of photographs from the web holds besides plain RGB JPEGs."""
    folder.mkdir(parents=True)
    with Image.open(photo) as image:
        rotated = Image.Exif()
        rotated[0x0112] = 6  # orientation: shown rotated by 90 degrees
        image.save(folder / "exif.JPEG", exif=rotated)
        image.convert("CMYK").save(folder / "cmyk.JPEG")
        image.convert("L").save(folder / "gray.JPEG")
        image.save(folder / "progressive.JPEG", progressive=True)
        image.save(folder / "full_chroma.JPEG", subsampling=0)
        image.save(folder / "png.JPEG", "PNG")
        image.convert("L").save(folder / "gray.png")
        image.convert("P").save(folder / "palette.png")
        transparent = image.convert("RGBA")
        transparent.putalpha(image.convert("L"))
        transparent.save(folder / "alpha.png")
        image.save(folder / "bitmap.bmp")
        image.save(folder / "web.webp", quality=80)


@pytest.mark.parametrize("backend", READS_ORIGINALS)
def test_odd_files_look_as_pillow_sees_them(backend: str, photos: Path, tmp_path: Path) -> None:
    """EXIF rotation ignored, CMYK, gray and palettes converted, transparency dropped; names do not matter."""
    odd_files(photo_paths(photos)[3], tmp_path / "tree/class0")
    paths = photo_paths(tmp_path / "tree")
    pixels = [read_pixels(path) for path in paths]
    tolerance = DALI if backend == "dali-folder" else (0.5, 3)
    case = Case(backend, tmp_path / "tree", pixels, [0] * len(pixels), tolerance)
    rank_plan = make_work(case, batch_size=len(pixels))
    with case.open() as loader:
        for name in (path.name for path in paths):
            print(name)
            one = select(rank_plan, [int(np.flatnonzero(rank_plan.ids == [p.name for p in paths].index(name))[0])])
            check_pixels(case, one, list(loader.epoch(one)))


def test_a_missing_dataset_is_a_clear_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        open_loader(case.backend, tmp_path / "nowhere", LoaderOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        open_loader(case.backend, tmp_path / "empty", LoaderOptions())


CONTAINERS = {
    "ffcv-jpeg": "photos.beton",
    "ffcv-raw": "photos.beton",
    "torch-shards": "shard-000001.tar",
    "dali-shards": "shard-000001.tar",
    "resident": "images.npy",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_cut_file_is_refused(name: str, photos: Path, tmp_path: Path) -> None:
    """Wherever it was cut; FFCV itself opens one that lacks its tail, and shows other pixels."""
    case = CASES[name](photos, tmp_path)
    path = tmp_path / CONTAINERS[name]
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut|not a whole|empty"):
            case.open()
    path.write_bytes(whole)
    case.open().close()


def test_the_kernel_compiles_once_for_all(loader: Loader, case: Case) -> None:
    """Whatever the epoch, the output sizes, the stored images and the number of renderings."""
    if case.backend not in ("torch", "ffcv"):
        return
    from pipelines.images.renderer_kernel import render_samples

    for seed, sizes in enumerate([(24,), (56,), (32, 48)]):
        list(loader.epoch(make_work(case, sizes, seed=seed, batch_size=5 + seed)))
    assert len(render_samples.overloads) == 1


def test_an_unknown_backend_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'pillow'"):
        open_loader("pillow", tmp_path, LoaderOptions())


# ---- DALI on a GPU: its real graph, without one


class _Graph(Exception):
    """The outputs of a pipeline that would be built."""


def decoders_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> dict[str, str]:
    """The operators that decode, and their arguments, as DALI would get them for batches of `path`."""
    if importlib.util.find_spec("nvidia.dali") is None:
        absent("DALI is not installed")
    from nvidia import dali

    def stop(pipe: object, *outputs: object) -> None:
        raise _Graph(outputs)

    monkeypatch.setattr(dali.Pipeline, "set_outputs", stop)
    device = torch.device("cuda", 0)
    with open_loader("dali", path, LoaderOptions(device=device, **options)) as loader:  # type: ignore[arg-type]
        monkeypatch.setattr(loader._dali.backend, "ReleaseUnusedMemory", lambda: None)  # type: ignore[attr-defined]
        plan = EpochPlan(
            index=loader.index,
            family=RandomResizedCrop(),
            view_seed=0,
            view=0,
            order=np.arange(len(loader.index)),
            batch_size=8,
        )
        with pytest.raises(_Graph) as caught:
            next(loader.epoch(plan.for_rank((32, 64))))
        found: dict[str, str] = {"fingerprint": loader.fingerprint["decode"]}
    waiting = list(caught.value.args[0])
    while waiting:
        operator = waiting.pop().source
        spec = str(operator.spec)
        if "decoders" in spec.splitlines()[0]:
            found[spec.splitlines()[0]] = spec
        waiting += [
            node for inputs in operator.inputs for node in (inputs if isinstance(inputs, list) else [inputs])
        ]
    return found


def test_a_decoder_chosen_by_the_batch_never_meets_a_cache(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"repeatable": True}, "hw_decoder_load: 0.000000", "gpu, by kernels"),
        ({"own": {"hw_decoder_load": 0.0}}, "hw_decoder_load: 0.000000", "gpu, by kernels"),
        ({}, "hw_decoder_load: 0.650000", "gpu, 0.65 by the engine"),
        ({"own": {"hw_decoder_load": 1.0}}, "hw_decoder_load: 1.000000", "gpu, 1 by the engine"),
    ]
    for options, load, decode in cases:
        found = decoders_on_a_gpu(photos, monkeypatch, **options)
        assert found.pop("fingerprint") == decode
        assert list(found) == ["OpSpec for decoders__Image:"], "regions crash in nvImageCodec 0.9 on a GPU"
        (spec,) = found.values()
        assert load in spec and "device: mixed" in spec and "jpeg_fancy_upsampling: True" in spec
        assert ("preallocate_height_hint: 0" in spec or "preallocate_height_hint" not in spec) == ("0.000" in load)
    for share in (0.65, 1.0):
        with pytest.raises(ValueError, match="same in every batch"):
            with_engine = LoaderOptions(
                device=torch.device("cuda", 0), repeatable=True, own={"hw_decoder_load": share}
            )
            open_loader("dali", photos, with_engine)
    cpu = LoaderOptions(repeatable=True, own={"hw_decoder_load": 0.65})  # an engine is not asked on the CPU
    with open_loader("dali", photos, cpu) as loader:
        assert loader.fingerprint["decode"] == "cpu"


def test_every_loader_notes_what_decodes(case: Case) -> None:
    wanted = {
        "torch": {"torchvision", "pillow"},
        "resident": {"device"},
        "ffcv": {"libjpeg-turbo"},
        "dali": {"dali", "nvidia-nvimgcodec"},
    }
    with case.open() as loader:
        assert loader.environment.keys() == wanted[case.backend]
        for name, value in loader.environment.items():
            assert re.fullmatch(r"cpu|\d+(\.\d+)+", value), (name, value)
