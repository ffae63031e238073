"""How the files in this folder were made: with the code of version 0.1.0 (commit 4f767ba), once.

    git worktree add /tmp/old 4f767ba && cd /tmp/old
    python PATH/TO/tests/data/v0/make.py        # writes tests/data/v0/ below the old checkout; copy it over

They are never made again: tests/test_compatibility.py holds today's code to them.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[0] = str(Path.cwd())

OUT = Path("tests/data/v0")
COMMON = {
    "data.train": OUT / "resident",
    "data.val": OUT / "resident",
    "data.backend": "resident",
    "data.batch_size": 4,
    "data.device": "cpu",
    "views.family": "pad_crop",
    "views.padding": 2,
    "views.count": 2,
    "student.model": "configs/digits/tiny.py:tiny",
    "student.image_size": 8,
    "train.log_every": 1,
    "eval.crop_ratio": 1.0,
    "run.trackers": "[]",
}
TEACHER = {
    "teacher.model": "configs/digits/tiny.py:tiny",
    "teacher.checkpoint": OUT / "teacher.safetensors",
    "teacher.image_size": 8,
}


def program(path: str, *arguments: object, **settings: object) -> None:
    """Run a program of the old checkout."""
    text = [f"{key}={value}" for key, value in settings.items()]
    extra = ["--config", str(OUT / "config.yaml"), *(["--set", *text] if text else [])] if settings else []
    environment = {**os.environ, "XDG_CACHE_HOME": "build/cache", "PYTHONPATH": "."}
    subprocess.run([sys.executable, path, *map(str, arguments), *extra], check=True, env=environment)


def images() -> None:
    """20 pictures of two classes: 11 JPEGs and 9 PNGs of several sizes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:40j, 0:1:40j]
    for number in range(20):
        height, width = 20 + number % 3 * 4, 20 + number % 4 * 4
        a, b, c = rng.uniform(1, 6, (3, 3, 1, 1))
        pixels = 127 + 100 * np.sin(a * x + b * y + c) + rng.normal(0, 6, (3, 40, 40))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)[:, :height, :width].transpose(1, 2, 0))
        path = OUT / "images" / "ab"[number % 2] / f"{number:02d}.{'png' if number % 5 < 2 and number else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **({"quality": 85} if path.suffix == ".jpg" else {}))


def begun() -> None:
    """A conversion to a resident set that was killed after 12 of its images."""
    from pipelines.resident_writer import ResidentWriter, encode_record
    from pipelines.sources import open_sources

    sources = open_sources(OUT / "images")
    writer = ResidentWriter(OUT / "resident-begun", {"source": sources.digest, "size": 12})
    writer.append([encode_record(sources[position], position, 12) for position in range(12)], 12)
    writer.close()


def tables() -> None:
    """What an epoch shows, and how features become bytes."""
    import torch

    from fastdcd.cache import CODECS
    from pipelines.index import DatasetIndex
    from pipelines.plan import EpochPlan, order
    from pipelines.views import FAMILIES, describe, table_digest

    sizes = np.random.default_rng(1).integers(1, 600, (50, 2)).astype(np.int32)
    found: dict[str, object] = {"sizes": sizes.tolist(), "orders": {}, "families": {}}
    for kind in ("random", "paged", "sequential"):
        found["orders"][kind] = order(50, seed=7, epoch=3, kind=kind).tolist()
    for name, family in FAMILIES.items():
        boxes, flips = family().boxes(11, np.arange(50), 2, sizes)
        found["families"][name] = {
            "describe": {key: str(value) for key, value in describe(family()).items()},
            "boxes": boxes.tolist(),
            "flips": flips.tolist(),
            "digest": table_digest(family(), 11, sizes),
        }
    index = DatasetIndex.load(OUT / "resident")
    plan = EpochPlan(
        index=index,
        family=FAMILIES["pad_crop"](),
        view_seed=3,
        view=1,
        order=order(20, seed=5, epoch=1),
        batch_size=8,
    )
    parts = [plan.work((8, 12), rank=rank, world_size=3, start_step=1) for rank in range(3)]
    found["ranks"] = [
        {"ids": part.ids.tolist(), "boxes": part.renderings[0].boxes.tolist(), "batches": part.batches}
        for part in parts
    ]
    features = np.random.default_rng(2).normal(0, 3, (6, 8)).astype(np.float32)
    found["features"] = features.tolist()
    found["codecs"] = {
        name: codec.encode(torch.from_numpy(features)).numpy().tolist() for name, codec in CODECS.items()
    }
    (OUT / "tables.json").write_text(json.dumps(found))


def pixels() -> None:
    """What every backend says of itself, and what it shows of its set."""
    from pipelines.base import LoaderOptions, open_loader
    from pipelines.plan import EpochPlan, order
    from pipelines.views import FAMILIES

    sets = {"torch": "images", "resident": "resident", "ffcv": "set.beton", "dali": "shards"}
    shown, fingerprints = {}, {}
    for backend, name in sets.items():
        family = FAMILIES["pad_crop" if backend == "resident" else "random_resized_crop"]()
        with open_loader(backend, OUT / name, LoaderOptions(workers=0)) as loader:
            plan = EpochPlan(
                index=loader.index,
                family=family,
                view_seed=3,
                view=1,
                order=order(len(loader.index), seed=5, epoch=1),
                batch_size=8,
            )
            size = 12 if backend == "resident" else 8
            batches = list(loader.epoch(plan.work((size,))))
            shown[backend] = np.concatenate([batch.images[0].numpy() for batch in batches])
            ids = np.concatenate([batch.ids.numpy() for batch in batches])
            assert ids.tolist() == plan.order.tolist()
            fingerprints[backend] = {"data.index": loader.index.digest, **loader.fingerprint}
    np.savez_compressed(OUT / "pixels.npz", **shown)
    (OUT / "fingerprints.json").write_text(json.dumps(fingerprints, indent=1) + "\n")


def main() -> None:
    OUT.mkdir(parents=True)
    (OUT / "config.yaml").write_text("{}\n")
    images()
    for folder in ("resident", "shards", "set.beton"):
        kind = "ffcv" if folder == "set.beton" else folder
        extra = {"ffcv": ["--jpeg-share", 0.5], "shards": ["--shard-size", 12], "resident": ["--size", 12]}[kind]
        program("tools/convert.py", kind, OUT / "images", OUT / folder, *extra, "--workers", 0)
    begun()
    # an image folder's index, as a run leaves it in the user's cache; and the teacher
    first = {**COMMON, "run.dir": "build/run", "train.max_steps": 1, "train.epochs": 1}
    folders = {"data.train": OUT / "images", "data.val": OUT / "images", "data.backend": "torch"}
    program("fastdcd/train.py", **{**first, **folders, "views.family": "random_resized_crop", "data.workers": 0})
    (entry,) = Path("build/cache/fastdcd/indexes").iterdir()
    shutil.copytree(entry, OUT / "folder-index" / entry.name)
    program("fastdcd/train.py", **{**COMMON, "run.dir": "build/teacher", "train.epochs": 2})
    shutil.copy("build/teacher/student.safetensors", OUT / "teacher.safetensors")
    for dtype in ("fp16", "uint8"):
        settings = {**COMMON, **TEACHER, "teacher.mode": "cached", "cache.dtype": dtype}
        program("tools/cache_teacher.py", "fill", **{**settings, "cache.path": OUT / f"cache-{dtype}"})
    both = {**COMMON, **TEACHER, "loss.kd": 1, "loss.dcd": 1, "loss.feat_dim": 16, "train.epochs": 3}
    filling = {**both, "teacher.mode": "fill", "cache.path": OUT / "cache-begun", "run.dir": "build/fill"}
    program("fastdcd/train.py", **{**filling, "train.max_steps": 3})
    cached = {**both, "teacher.mode": "cached", "cache.path": OUT / "cache-fp16", "cache.dtype": "fp16"}
    program("fastdcd/train.py", **{**cached, "run.dir": "build/whole"})
    program("fastdcd/train.py", **{**cached, "run.dir": OUT / "run", "train.max_steps": 7})
    shutil.copy("build/whole/metrics.jsonl", OUT / "whole-run-metrics.jsonl")
    tables()
    pixels()
    with (OUT / "set.beton").open("rb") as file:  # 16 MB, nearly all of it padding
        (OUT / "set.beton.gz").write_bytes(gzip.compress(file.read(), mtime=0))
    (OUT / "set.beton").unlink()
    for lock in OUT.rglob("*.lock"):
        lock.unlink()
    shutil.copy(__file__, OUT / "make.py")


if __name__ == "__main__":
    main()
