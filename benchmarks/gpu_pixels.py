"""Does a GPU's decoder show an image the same way in every batch? Pixels of two orders, by share of the JPEG engine.

A teacher cache needs it: a fill runs in order of ids, training shuffles. Each variant decodes the same training crops in order
of ids and shuffled, and says how many images differ; then its pixels, and a network's features of them, are compared
with those of DALI on the CPU. Every variant is a process of its own: one that crashes is named, and costs no other.

    python benchmarks/gpu_pixels.py --source IMAGENET_CLASS_FOLDERS --name gpu-pixels
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: import from the checkout

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from fastdcd import cli, models
from pipelines.base import LoaderOptions, open_loader
from pipelines.plan import EpochPlan, order
from pipelines.views import RandomResizedCrop

CPU = "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_pixels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--loads", nargs="+", default=["0", "0.65", "1"], help="shares of the JPEG engine")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--model", default="torchvision:resnet18", help="untrained: of features only the agreement"
    )
    parser.add_argument("--name", default="gpu-pixels", help="results are written to benchmarks/results/NAME")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant is not None:
        print(json.dumps(one_variant(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: in_a_process(name, Path(scratch)) for name in (CPU, *arguments.loads)}
        network = models.build(arguments.model, classes=1000).eval().to(device())
        reference = Path(scratch, f"{CPU}.npy")
        for name, values in found.items():
            pixels = Path(scratch, f"{name}.npy")
            if "did_not_run" not in values and reference.is_file():
                values |= agreement(np.load(reference), np.load(pixels), network)
    record.write(arguments.name, {"variants": found, "batch_size": arguments.batch_size}, table(found))
    return 0


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def in_a_process(name: str, scratch: Path) -> dict[str, Any]:
    """What a variant finds; or how its process ended."""
    command = [sys.executable, *sys.argv, "--variant", name, "--pixels", str(scratch / f"{name}.npy")]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"did_not_run": "not finished after 120 s"}
    if ran.returncode:
        return {"did_not_run": f"exit code {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1]}"}
    values: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return values


def one_variant(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pixels of all images in two orders: images, how many differ, by how much at most."""
    on_cpu = arguments.variant == CPU
    options = LoaderOptions(
        workers=2,
        device=torch.device("cpu") if on_cpu else device(),
        own={} if on_cpu else {"hw_decoder_load": float(arguments.variant)},
    )
    with open_loader("dali", arguments.source, options) as loader:
        count = len(loader.index)
        both: list[NDArray[np.uint8]] = []
        for ids in (np.arange(count), order(count, seed=1, epoch=0, kind="random")):
            plan = EpochPlan(
                index=loader.index,
                family=RandomResizedCrop(),
                view_seed=0,
                view=0,
                order=ids,
                batch_size=min(arguments.batch_size, count),
            )
            pixels = np.empty((count, 3, arguments.size, arguments.size), np.uint8)
            for batch in loader.epoch(plan.for_rank((arguments.size,))):
                pixels[batch.ids.numpy()] = batch.images[0].cpu().numpy()
            both.append(pixels)
    np.save(arguments.pixels, both[0])
    difference = np.abs(both[0].astype(np.int16) - both[1]).reshape(count, -1).max(1)
    return {"images": count, "differ": int((difference > 0).sum()), "largest": int(difference.max())}


@torch.no_grad()
def agreement(
    reference: NDArray[np.uint8], pixels: NDArray[np.uint8], network: models.FeatureModel
) -> dict[str, float]:
    """Mean and largest difference of pixels, and least and mean cosine of features."""
    normalize = models.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD).to(device())
    cosines = []
    for start in range(0, len(pixels), 50):
        ours, theirs = (
            network.features(normalize(torch.from_numpy(each[start : start + 50]).to(device())))
            for each in (pixels, reference)
        )
        cosines.append(torch.cosine_similarity(ours, theirs))
    cosine = torch.cat(cosines)
    difference = np.abs(reference.astype(np.int16) - pixels)
    return {
        "mean_off_cpu": float(difference.mean()),
        "most_off_cpu": int(difference.max()),
        "least_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| decoder | images that differ between two orders | by at most | off the CPU's: mean, most | cosine of features: least, mean |",
        "|---" * 5 + "|",
    ]
    for name, values in found.items():
        title = "DALI on the CPU" if name == CPU else f"engine's share {name}"
        if "did_not_run" in values:
            lines.append(f"| {title} | did not run: {values['did_not_run']} | | | |")
            continue
        lines.append(
            f"| {title} | {values['differ']} of {values['images']} | {values['largest']} | {values['mean_off_cpu']:.3f}, "
            f"{values['most_off_cpu']} | {values['least_cosine']:.5f}, {values['mean_cosine']:.5f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
