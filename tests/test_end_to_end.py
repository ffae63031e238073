"""From Hugging Face parquet to a student in timm: every program on the way, through an object store."""

import io
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import DATA, ObjectStore, forget_accelerate, needed, run_program
from PIL import Image
from timm.data import create_transform, resolve_data_config

from fastdcd import config_file, experiment
from pipelines.plan import evaluation_plan

CLASSES = ("n01440764", "n02085620", "n02708093", "n03445777", "n07565083")  # a kind of ImageNet's classes each
SIZE = 56  # 64 before the centre crop: a size that timm's two steps and our one share


def hundred(photographs: list[Path]) -> list[tuple[str, bytes, int]]:
    """100 photographs of five classes: name, JPEG, label. ImageNet's own, one a class, are in the order of classes;
    where there are fewer photographs, they come again under other names."""
    found = sorted((DATA / "imagenet-sample" / "train").glob("*/*"))[::2][:100] or photographs
    images = [found[at % len(found)] for at in range(100)]
    return [(f"{at:03d}_{path.name}", path.read_bytes(), at * 5 // 100) for at, path in enumerate(images)]


def write_parquet(folder: Path, images: list[tuple[str, bytes, int]]) -> None:
    """A repository of Hugging Face: data/train-*.parquet and data/validation-*.parquet, as `datasets` writes them."""
    pa, pq = needed("pyarrow"), needed("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# a data set")
    for name, rows in (("train", images), ("validation", images[::4])):
        for part in range(2):
            table = pa.table(
                {
                    "image": pa.array([{"bytes": data, "path": path} for path, data, _ in rows[part::2]]),
                    "label": pa.array([label for *_, label in rows[part::2]], pa.int64()),
                }
            ).replace_schema_metadata(metadata)
            path = folder / "data" / f"{name}-{part:05d}-of-00002.parquet"
            pq.write_table(table, path, row_group_size=16)


def run(*command: object) -> str:
    done = run_program(*map(str, command))
    assert done.code == 0, done.err
    forget_accelerate()
    return done.out + done.err


def test_a_hundred_photographs_from_parquet_in_an_object_store_to_timm(
    photographs: list[Path], tmp_path: Path, object_store: ObjectStore
) -> None:
    images = hundred(photographs)
    write_parquet(tmp_path / "hub", images)
    object_store.upload(tmp_path / "hub", "hub")
    source, shards = f"s3://{object_store.bucket}/hub", tmp_path / "shards"
    said = run("tools/convert.py", "shards", source, shards, "--max-size", 0, "--workers", 1, "--shard-size", 30)
    assert "100 images" in said and "25 images" in said and "classes from 'label'" in said
    run("tools/push.py", shards, f"s3://{object_store.bucket}/shards")
    shards = tmp_path / "another-machine" / "shards"
    assert "as their checksums say" in run("tools/stage.py", f"s3://{object_store.bucket}/shards", shards)
    config = tmp_path / "photographs.yaml"
    tree = {
        "data": {
            "train": f"{shards}/train",
            "val": f"{shards}/val",
            "batch_size": 20,
            "workers": 1,
            "device": "cpu",
        },
        "student": {"model": "timm:test_resnet", "image_size": SIZE, "channels_last": False},
        "optim": {"lr": 0.05},
        "train": {"epochs": 6},
        "eval": {"every": 6, "batch_size": 10},
        "run": {"dir": str(tmp_path / "run"), "trackers": []},
    }
    config.write_text(yaml.safe_dump(tree))
    run("fastdcd/train.py", "--config", config)
    run("tools/export.py", tmp_path / "run")

    student = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True).eval()
    assert student.pretrained_cfg["label_names"] == list(CLASSES)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    settings = resolve_data_config({}, model=student)
    ours, labels = predictions_of_our_pixels(student, config, settings["mean"], settings["std"])
    hits = [ours[name] == label for name, label in labels.items()]
    assert 100 * sum(hits) / len(hits) == pytest.approx(summary["top1"], abs=1e-4)
    assert len(set(ours.values())) > 1, "a student that says one thing of everything proves nothing"

    # timm's own transforms of the originals: another resize, so pixels differ a little, and answers hardly
    transform = create_transform(**settings)
    views = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for _, data, _ in images[::4]]
    with torch.inference_mode():
        theirs = dict(
            zip((name for name, *_ in images[::4]), student(torch.stack(views)).argmax(1).tolist(), strict=True)
        )
    assert sum(theirs[name] == said for name, said in ours.items()) >= 0.75 * len(ours)


def predictions_of_our_pixels(
    student: torch.nn.Module, path: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[dict[str, int], dict[str, int]]:
    """What a network of timm says of the validation set as our loader shows it, and the labels, by image."""
    cfg = config_file.load(path)
    said: dict[str, int] = {}
    truth: dict[str, int] = {}
    with experiment.open_set(cfg.data, cfg.data.val, torch.device("cpu"), "data.val") as loader:
        plan = evaluation_plan(loader.index, crop_ratio=cfg.eval.crop_ratio, batch_size=10).for_rank((SIZE,))
        for batch in loader.epoch(plan):
            pixels = batch.images[0].float() / 255
            pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            with torch.inference_mode():
                answers = student(pixels).argmax(1).tolist()
            names = [loader.index.names[sample] for sample in batch.ids.tolist()]
            said |= dict(zip(names, answers, strict=True))
            truth |= dict(zip(names, batch.labels.tolist(), strict=True))
    return said, truth
