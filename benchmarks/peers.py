"""This trainer beside others': the same images, models, batch and machine, one run, programs in turns.

    python benchmarks/peers.py cifar  --images CIFAR/train --reference CHECKOUT --name peers-cifar
    python benchmarks/peers.py photos --images IMAGENET/train --timm CHECKOUT --ffcv-imagenet CHECKOUT --name peers-photos

Peers are checkouts of pytorch-image-models (timm), giakoumoglou/distillers and libffcv/ffcv-imagenet, started as
their authors publish them, by command line alone; benchmarks/run_reference.py says what the second needs beyond that.
What is compared is images per second of an epoch of training, without its evaluation; each program's first epoch is not
counted. A peer that is not given, or that does not run here, is named in the table with its own last words. What a peer
imports must be installed beside this trainer: for ffcv-imagenet fastargs and torchmetrics.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks import record
from fastdcd import cli, models, weights
from pipelines.files import write_json

ROOT = Path(__file__).resolve().parents[1]
OURS = "this trainer"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One trainer with its arguments.

    Attributes:
        name: in the table.
        beside: the program it is compared with, one of ours.
        command: what to start in an empty folder; "{out}" stands for that folder.
        seconds: epochs' times, from the folder and what was printed.
        images: of one epoch.
        absent: why it cannot be started.
    """

    name: str
    beside: str
    command: list[str]
    seconds: Callable[[Path, str], list[float]]
    images: int
    absent: str = ""
    rates: list[float] = field(default_factory=list)
    last_words: list[str] = field(default_factory=list)

    def turn(self, folder: Path) -> None:
        """Train once and note the median rate of the epochs after the first; what went wrong, if it did."""
        if self.absent or self.last_words:
            return
        folder.mkdir(parents=True)
        command = [each.replace("{out}", str(folder)) for each in self.command]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = self.seconds(folder, done.stdout) if done.returncode == 0 else []
        if len(found) < 2:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            self.last_words.append(lines[-1] if lines else f"exit status {done.returncode}")
            print(done.stdout[-3000:], file=sys.stderr)
            return
        self.rates.append(self.images / float(np.median(found[1:])))
        print(f"{self.name}: {self.rates[-1]:,.1f} images/s", file=sys.stderr)


# ---- this trainer


def ours(name: str, work: Path, tree: dict[str, Any], images: int, beside: str = "") -> Program:
    """One of our configs. Fills its cache first, outside the measurement."""
    file = work / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    if tree.get("teacher", {}).get("mode") == "cached":
        subprocess.run(
            [sys.executable, str(ROOT / "tools/cache_teacher.py"), "fill", "--config", str(file)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    command = [sys.executable, str(ROOT / "fastdcd/train.py"), "--config", str(file), "--set", "run.dir={out}/run"]
    return Program(name=name, beside=beside or name, command=command, seconds=_our_epochs, images=images)


def _our_epochs(folder: Path, printed: str) -> list[float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    marks = [0.0, *(line["seconds"] for line in lines if line["kind"] == "epoch")]
    return np.diff(marks).tolist()


# ---- peers


def timm(name: str, checkout: Path | None, arguments: list[str], images: int, beside: str) -> Program:
    """timm's train.py. It says the mean time of an epoch's steps so far; whole batches only."""
    if checkout is None:
        return Program(
            name=name, beside=beside, command=[], seconds=_timm_epochs, images=0, absent="--timm not given"
        )
    command = [sys.executable, str(checkout.absolute() / "train.py"), *arguments, "--output", "{out}"]
    return Program(name=name, beside=beside, command=command, seconds=_timm_epochs, images=images)


def _timm_epochs(folder: Path, printed: str) -> list[float]:
    last: dict[int, float] = {}
    pattern = r"Train: (\d+) \[ *\d+/(\d+) .*?Time: [\d.]+s, +[\d.]+/s +\(([\d.]+)s,"
    for epoch, steps, mean in re.findall(pattern, printed):
        last[int(epoch)] = int(steps) * float(mean)
    return [last[epoch] for epoch in sorted(last)]


def reference(name: str, checkout: Path | None, arguments: list[str], images: int, beside: str) -> Program:
    """The authors' program for CIFAR. It says each epoch's time; whole batches only."""
    if checkout is None:
        return Program(
            name=name,
            beside=beside,
            command=[],
            seconds=_reference_epochs,
            images=0,
            absent="--reference not given",
        )
    program = checkout.absolute() / "cifar" / "train_student.py"
    command = [sys.executable, str(ROOT / "benchmarks" / "run_reference.py"), str(program), *arguments]
    return Program(name=name, beside=beside, command=command, seconds=_reference_epochs, images=images)


def _reference_epochs(folder: Path, printed: str) -> list[float]:
    return [float(each) for each in re.findall(r"^Epoch \d+, total time ([\d.]+)$", printed, re.MULTILINE)]


def ffcv_imagenet(name: str, checkout: Path | None, arguments: list[str], images: int, beside: str) -> Program:
    """ffcv-imagenet's train_imagenet.py. Its log has a line after each epoch's evaluation, with that one's time."""
    if checkout is None:
        return Program(
            name=name,
            beside=beside,
            command=[],
            seconds=_ffcv_epochs,
            images=0,
            absent="--ffcv-imagenet not given",
        )
    folder = checkout.absolute()
    command = [sys.executable, str(folder / "train_imagenet.py")]
    command += ["--config-file", str(folder / "rn18_configs" / "rn18_16_epochs.yaml"), *arguments]
    return Program(name=name, beside=beside, command=command, seconds=_ffcv_epochs, images=images)


def _ffcv_epochs(folder: Path, printed: str) -> list[float]:
    lines = [
        json.loads(line) for file in folder.glob("*/log") for line in file.read_text(encoding="utf-8").splitlines()
    ]
    ends = [line for line in lines if "train_loss" in line]  # the last evaluation belongs to no epoch
    marks = [0.0, *(line["relative_time"] for line in ends)]
    return [
        after - before - line["val_time"] for before, after, line in zip(marks[:-1], marks[1:], ends, strict=True)
    ]


# ---- what they are compared on


def cifar(arguments: argparse.Namespace, work: Path) -> list[Program]:
    """DCD + KD, resnet32x4 -> resnet8x4, on images of 32x32 pixels in class folders."""
    files = sorted(arguments.images.glob("*/*.png"))
    if len(files) < arguments.limit:
        raise ValueError(
            f"{arguments.images}: {len(files)} PNG files in class folders, expected {arguments.limit}"
        )
    chosen = [files[len(files) * i // arguments.limit] for i in range(arguments.limit)]
    classes = sorted({file.parent.name for file in files})
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in chosen])
    labels = [classes.index(file.parent.name) for file in chosen]
    if len(classes) != 100:
        raise ValueError(
            f"{arguments.images}: {len(classes)} classes, expected 100: the reference knows no other number"
        )
    few = slice(0, None, 8)  # evaluation is not compared
    _write_cifar(work / "data" / "cifar-100-python", classes, pixels, labels, few)
    for part, rows in (("train", slice(None)), ("val", few)):
        for name in classes:  # each part has all classes
            (work / "folders" / part / name).mkdir(parents=True)
        for file in chosen[rows]:
            (work / "folders" / part / file.parent.name / file.name).symlink_to(file.absolute())
        for name in classes:
            place = work / "folders" / part / name
            if not any(place.iterdir()):
                file = next(each for each in files if each.parent.name == name)
                (place / file.name).symlink_to(file.absolute())
        convert = [
            sys.executable,
            str(ROOT / "tools/convert.py"),
            "resident",
            f"folders/{part}",
            f"resident/{part}",
        ]
        subprocess.run(convert, cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    torch.manual_seed(0)
    state = models.build("cifar:resnet32x4", classes=100).original_state_dict()
    teacher = work / "resnet32x4_vanilla" / "teacher.pth"
    teacher.parent.mkdir()
    theirs = {name.replace("shortcut", "downsample"): value for name, value in state.items()}
    torch.save({"model": theirs}, teacher)
    weights.save(work / "teacher.safetensors", state)
    tree: dict[str, Any] = {
        "base": str(ROOT / "configs/cifar100/resnet32x4_resnet8x4_dcd_kd.yaml"),
        "data": {
            "train": str(work / "resident/train"),
            "val": str(work / "resident/val"),
            "device": arguments.device,
        },
        "teacher": {"checkpoint": str(work / "teacher.safetensors"), "evaluate": False},
        "views": {"count": arguments.epochs},
        "cache": {"path": str(work / "cache")},
        "train": {"epochs": arguments.epochs},
    }
    cached = {**tree, "teacher": {**tree["teacher"], "mode": "cached"}}
    online = "this trainer, DCD + KD, teacher online"
    flags = f"--path_t {teacher} --model_s resnet8x4 --epochs {arguments.epochs} --num_workers {arguments.workers}".split()
    whole = arguments.limit // 64 * 64
    return [
        ours(online, work, tree, arguments.limit),
        ours("this trainer, DCD + KD, teacher cached", work, cached, arguments.limit, online),
        reference(
            "reference, KD as published",
            arguments.reference,
            [*flags, *["--distill", "kd", "-a", "1", "-b", "0"]],
            whole,
            online,
        ),
        reference(
            "reference, DCD + KD",
            arguments.reference,
            [*flags, *["--distill", "dcd", "-a", "1", "-b", "1"]],
            whole,
            online,
        ),
    ]


def _write_cifar(folder: Path, classes: list[str], pixels: np.ndarray, labels: list[int], few: slice) -> None:
    """The images as torchvision's CIFAR100 reads them: pickles, since that is the data set's own format."""
    folder.mkdir(parents=True)
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    for name, content in {
        "train": {"data": rows, "fine_labels": labels},
        "test": {"data": rows[few], "fine_labels": labels[few]},
        "meta": {"fine_label_names": classes},
    }.items():
        (folder / name).write_bytes(pickle.dumps(content))


def photos(arguments: argparse.Namespace, work: Path) -> list[Program]:
    """KD, timm's resnet34 -> resnet18, and resnet18 without a teacher, on photographs in class folders."""
    files = sorted(path for path in arguments.images.glob("*/*") if path.is_file())[: arguments.limit]
    if not files:
        raise ValueError(f"{arguments.images}: no files in class folders")
    classes, size, batch = sorted({file.parent.name for file in files}), arguments.size, arguments.batch
    for part, chosen in (("train", files), ("val", files[:batch])):
        for file in chosen:
            place = work / "photos" / part / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / file.name).symlink_to(file.absolute())
    names = work / "classes.txt"
    names.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")

    torch.manual_seed(0)
    count = len(classes)
    state = models.build("timm:resnet34", classes=count).original_state_dict()
    local = work / "resnet34"
    local.mkdir()
    weights.save(local / "model.safetensors", state)  # a folder as timm's local-dir: reads it
    write_json(
        local / "config.json",
        {"architecture": "resnet34", "num_classes": count, "pretrained_cfg": {"num_classes": count}},
    )

    epochs = arguments.epochs
    tree: dict[str, Any] = {
        "data": {
            "train": str(work / "photos/train"),
            "val": str(work / "photos/val"),
            "classes": str(names),
            "backend": "torch",
            "workers": arguments.workers,
            "batch_size": batch,
            "device": arguments.device,
        },
        "student": {"model": "timm:resnet18", "image_size": size},
        "views": {"count": epochs},
        "cache": {"path": str(work / "cache")},
        "train": {"epochs": epochs},
        "eval": {"every": epochs},
    }
    plain = {
        **tree,
        "data": {
            **tree["data"],
            "backend": "ffcv",
            "train": str(work / "train.beton"),
            "val": str(work / "val.beton"),
        },
    }
    plain["data"].pop("classes")
    flags = (
        f"--data-dir {work / 'photos'} --train-split train --val-split val --class-map {names} --num-classes {count} "
        f"--model resnet18 --img-size {size} --batch-size {batch} --workers {arguments.workers} "
        f"--epochs {epochs} --sched step --opt sgd --lr 0.1 --color-jitter 0 --smoothing 0 --train-interpolation bilinear "
        f"--device {arguments.device} --channels-last --log-interval 100000 --kd-model-name local-dir:{local} "
        "--distill-loss-weight 1 --task-loss-weight 1 --kd-temperature 4"
    ).split()
    programs: list[Program] = []
    whole = len(files) // batch * batch
    for precision in arguments.precisions:
        online = f"this trainer, KD, teacher online, {precision}"
        section = {
            "mode": "online",
            "model": "timm:resnet34",
            "checkpoint": str(local / "model.safetensors"),
            "evaluate": False,
            "precision": precision,
        }
        kd = {
            **tree,
            "loss": {"kd": 1.0},
            "teacher": section,
            "train": {**tree["train"], "precision": precision},
            "cache": {"path": str(work / f"cache-{precision}")},
        }
        amp = ["--amp", "--amp-dtype", "bfloat16"] if precision == "bf16" else []
        programs += [
            ours(online, work, kd, len(files)),
            ours(
                f"this trainer, KD, teacher cached, {precision}",
                work,
                {**kd, "teacher": {**section, "mode": "cached"}},
                len(files),
                online,
            ),
            timm(f"timm, KD, {precision}", arguments.timm, [*flags, *amp], whole, online),
        ]
    for part in ("train", "val"):
        convert = [sys.executable, str(ROOT / "tools/convert.py"), "ffcv", f"photos/{part}", f"{part}.beton"]
        convert += ["--classes", str(names)]
        subprocess.run(convert, cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    alone = "this trainer, no teacher, FFCV, bf16"
    theirs = (
        f"--data.train_dataset={work / 'train.beton'} --data.val_dataset={work / 'val.beton'} "
        f"--data.num_workers={arguments.workers} --training.batch_size={batch} --training.epochs={epochs} "
        f"--training.use_blurpool=0 --resolution.min_res={size} --resolution.max_res={size} "
        "--logging.folder={out} --logging.log_level=1"
    ).split()
    return [
        *programs,
        ours(alone, work, {**plain, "train": {**tree["train"], "precision": "bf16"}}, len(files)),
        ffcv_imagenet("ffcv-imagenet, no teacher", arguments.ffcv_imagenet, theirs, whole, alone),
    ]


# ---- the comparison


def table(programs: list[Program]) -> tuple[dict[str, Any], str]:
    """Ratios of every program to the one beside it, turn by turn."""
    lines = ["| program | images/s | over ours, teacher as its own | turns |", "|---|---|---|---|"]
    results: dict[str, Any] = {}
    rates = {program.name: program.rates for program in programs}
    for program in programs:
        if not program.rates:
            why = program.absent or program.last_words[0]
            results[program.name] = {"did_not_run": why}
            lines.append(f"| {program.name} | did not run: {why} | | |")
            continue
        ratios = [a / b for a, b in zip(program.rates, rates[program.beside], strict=True)]
        results[program.name] = {"images_per_second": program.rates, "ratio": record.spread(ratios)}
        own = program.name == program.beside
        lines.append(
            f"| {program.name} | {record.text(record.spread(program.rates), 1)} | "
            f"{'1' if own else record.text(record.spread(ratios), 2)} | {len(ratios)} |"
        )
    lines += ["", "| images/s of | over those of | |", "|---|---|---|"]
    for peer in programs:
        if not peer.rates or peer.name.startswith(OURS):
            continue
        for program in programs:
            if program.name.startswith(OURS) and program.beside == peer.beside:
                ratio = record.spread([a / b for a, b in zip(program.rates, peer.rates, strict=True)])
                results[program.name].setdefault("over", {})[peer.name] = ratio
                lines.append(f"| {program.name} | {peer.name} | {record.text(ratio, 2)} |")
    return results, "\n".join(lines)


def revision(checkout: Path | None) -> str | None:
    """The commit of a checkout."""
    if checkout is None:
        return None
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


SETS = {"cifar": cifar, "photos": photos}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=sorted(SETS), help="what to train on")
    parser.add_argument("--images", type=Path, required=True, help="class folders of images")
    parser.add_argument("--limit", type=int, default=1920, help="images of an epoch (default 1920)")
    for peer in ("timm", "reference", "ffcv-imagenet"):
        parser.add_argument(f"--{peer}", type=Path, metavar="DIR", help="its checkout")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program (default 3)")
    parser.add_argument("--epochs", type=int, default=3, help="of a turn; the first is not counted (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that decode (default: one a core)")
    parser.add_argument("--size", type=int, default=128, help="photos: pixels (default 128)")
    parser.add_argument("--batch", type=int, default=32, help="photos: images of a step (default 32)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", required=True, help="results are written to benchmarks/results/NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        programs = SETS[arguments.set](arguments, work)
        for number in range(arguments.rounds):
            for place, program in enumerate(programs):
                program.turn(work / "turns" / f"{number}-{place}")
        results, lines = table(programs)
    commits = {name: revision(getattr(arguments, name)) for name in ("timm", "reference", "ffcv_imagenet")}
    record.write(arguments.name, {"set": arguments.set, "commits": commits, "programs": results}, lines)
    return 0


if __name__ == "__main__":
    cli.run(main)
