"""Conversion on the CPU: images per second beside FFCV's own DatasetWriter, and memory at several sizes of the data set.

Rates: the same photographs in class folders, converted in turns by both with two workers and the settings of
FFCV's ImageNet recipe (500 px, quality 90, half raw), so that a busy machine slows them alike.
Memory: tools/convert.py in a process of its own; the largest sum over it and its workers of their proportional
set sizes (pages that they share count once), sampled.

Sizes: the mean of what one photograph takes under several settings, each distinct one encoded once.

    python benchmarks/conversion.py --source IMAGENET_CLASS_FOLDERS [--images 600] [--rounds 5]
    python benchmarks/conversion.py --source CIFAR_100_ARCHIVE_OR_FOLDERS --memory 5000 50000     (memory alone)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import psutil

from benchmarks import record
from benchmarks.loaders import prepare
from fastdcd import cli
from pipelines.conversion import beton_writer, shard_writer
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.formats import beton

WORKERS = 2
SIDES = (500, 400, 256)  # longest side of a stored image, pixels
STORAGE = Storage(max_size=500, quality=90, jpeg=0.5)


def ours(kind: str, root: Path, out: Path) -> None:
    """What tools/convert.py does, listing the source included."""
    job = Job(sources=open_sources(root), out=out, workers=WORKERS)
    if kind == "ffcv":
        to_beton(job, STORAGE)
    else:
        to_shards(job, Storage(max_size=STORAGE.max_size, quality=STORAGE.quality))


def ffcv_writer(root: Path, out: Path) -> None:
    """FFCV's DatasetWriter over torchvision's ImageFolder, as in FFCV's ImageNet recipe."""
    beton.import_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    image = RGBImageField(
        write_mode="proportion",
        max_resolution=STORAGE.max_size,
        compress_probability=STORAGE.jpeg,
        jpeg_quality=STORAGE.quality,
    )
    writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=WORKERS)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer.from_indexed_dataset(ImageFolder(str(root)), chunksize=16)
    with out.open("rb") as file:
        os.fsync(file.fileno())  # ours is on disk when it says that it is done


def peak_memory(kind: str, root: Path, out: Path, *options: str) -> int:
    """The most memory, in bytes, of a tools/convert.py and its workers together."""
    program = str(Path(sys.path[0]) / "tools" / "convert.py")
    command = [sys.executable, program, kind, str(root), str(out), "--workers", str(WORKERS), *options]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            now = 0
            with contextlib.suppress(psutil.Error):
                for member in (family, *family.children(recursive=True)):
                    now += member.memory_full_info().pss
                most = max(most, now)
            time.sleep(0.1)
    assert process.returncode == 0
    return most


def bytes_an_image(source: Path) -> dict[str, dict[int, float]]:
    """Mean stored size of the photographs, by format and longest side."""
    sources = open_sources(source)
    found: dict[str, dict[int, float]] = {"ffcv, half raw": {}, "ffcv, JPEG": {}, "shards": {}}
    for side in SIDES:
        sizes: dict[str, list[int]] = {name: [] for name in found}
        for position in range(len(sources)):
            sample = sources[position]
            for name, share in (("ffcv, half raw", 0.5), ("ffcv, JPEG", 1.0)):
                record_ = beton_writer.encode_record(sample, position, Storage(max_size=side, jpeg=share))
                sizes[name].append(len(record_.payload))
            # three members of a tar, each with a header and filled up to 512 bytes
            data = shard_writer.encode_record(sample, position, Storage(max_size=side)).data
            sizes["shards"].append(len(data) + -len(data) % 512 + 512 * 5)
        for name, values in sizes.items():
            found[name][side] = sum(values) / len(values)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="N", help="memory alone, at N images of the source"
    )
    arguments = parser.parse_args()
    if arguments.memory:
        memory: dict[str, dict[int, int]] = {"ffcv": {}, "shards": {}}
        with tempfile.TemporaryDirectory() as folder:
            for count in arguments.memory:
                for kind, found in memory.items():
                    out = Path(folder) / f"{kind} {count}"
                    found[count] = peak_memory(kind, arguments.source, out, "--limit", str(count))
        record.write("conversion-memory", {"memory": memory}, "\n".join(memory_lines(memory)))
        return 0
    rates: dict[str, list[float]] = {"FFCV's DatasetWriter": [], "ours, ffcv": [], "ours, shards": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "n").mkdir()
        root = prepare(arguments.source, scratch / "n", arguments.images)
        for number in range(arguments.rounds + 1):  # the first round warms up
            for name in rates:
                out = scratch / f"{number} {name}"
                start = time.perf_counter()
                if "DatasetWriter" in name:
                    ffcv_writer(root, out)
                else:
                    ours(name.rpartition(" ")[2], root, out)
                if number:
                    rates[name].append(arguments.images / (time.perf_counter() - start))
                subprocess.run(["rm", "-rf", str(out), f"{out}.index"], check=True)
        memory = {"ffcv": {}, "shards": {}}
        for count in (arguments.images, 4 * arguments.images):
            (scratch / str(count)).mkdir()
            root = prepare(arguments.source, scratch / str(count), count)
            for kind, found in memory.items():
                found[count] = peak_memory(kind, root, scratch / f"{kind} {count}")
    write(arguments, rates, memory, bytes_an_image(arguments.source))
    return 0


def memory_lines(memory: dict[str, dict[int, int]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| most memory of all processes | " + " | ".join(f"{n:,} images" for n in memory["ffcv"]) + " |"]
    lines.append("|---|" + "---|" * len(memory["ffcv"]))
    for kind, found in memory.items():
        lines.append(f"| {kind} | " + " | ".join(f"{value / 1e6:.0f} MB" for value in found.values()) + " |")
    return lines


def write(
    arguments: argparse.Namespace,
    rates: dict[str, list[float]],
    memory: dict[str, dict[int, int]],
    sizes: dict[str, dict[int, float]],
) -> None:
    """benchmarks/results/conversion-cpu.*"""
    lines = [
        f"{arguments.images} photographs (the distinct ones of the source, again under other names), {WORKERS} workers, "
        f"medians and quartiles of {arguments.rounds} alternating rounds.",
        "",
        "| | images/s | to FFCV's DatasetWriter, same round |",
        "|---|---|---|",
    ]
    stock = next(iter(rates))
    ratios = {
        name: record.spread([a / b for a, b in zip(values, rates[stock], strict=True)])
        for name, values in rates.items()
    }
    for name, values in rates.items():
        ratio = record.text(ratios[name], 2) if name != stock else ""
        lines.append(f"| {name} | {record.text(record.spread(values), 0)} | {ratio} |")
    lines += ["", *memory_lines(memory)]
    lines += ["", "| kB an image, by longest side | " + " | ".join(f"{side} px" for side in SIDES) + " |"]
    lines.append("|---|" + "---|" * len(SIDES))
    for name, mean in sizes.items():
        lines.append(f"| {name} | " + " | ".join(f"{value / 1e3:.0f}" for value in mean.values()) + " |")
    results = {"rates": rates, "ratios": ratios, "memory": memory, "bytes_an_image": sizes}
    record.write("conversion-cpu", results, "\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
