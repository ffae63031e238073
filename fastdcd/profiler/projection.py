"""What a measured step would mean elsewhere: ImageNet's size, more GPUs, a price. A projection, not a measurement.

The model: every process keeps its rows of a step and its own loader (as many cores and as much bandwidth each),
so that only what P processes have to do for each other grows. A ring moves 2 (P - 1) / P times the gradients' bytes
through each process; what is longer than the backward pass is exposed, and the last bucket (DDP's 25 MiB) always is. On
a CPU all of it is: the cores that move gradients are those that compute them. DDP copies gradients into its buckets,
and all wait for the slowest, whose step varies as those that were measured.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

IMAGENET, IMAGENET_VAL = 1_281_167, 50_000
LAST_BUCKET = 25 * 2**20  # bytes: torch's DistributedDataParallel, bucket_cap_mb
BANDWIDTH = 25e9  # bytes per second and process: 200 Gbit/s, when it was not measured


# Images of ImageNet are trained on at 128 px and more; a step on small images says nothing about theirs.
SMALLEST = 96


def says_something(profile: dict[str, Any]) -> bool:
    """Whether the measured step is one that ImageNet could have."""
    return bool(profile["about"]["image_size"] >= SMALLEST)


def step_seconds(profile: dict[str, Any], processes: int, bandwidth: float) -> float:
    """A step on `processes` with this profile's rows each, seconds."""
    stages = {name: value["mean"] for name, value in profile["stages"].items()}
    alone = sum(stages.values()) - stages.get("all_reduce", 0.0)
    if processes == 1:
        return float(alone)
    size = profile["memory"]["gradients"]
    ring = 2 * (processes - 1) / processes / bandwidth
    hidden = stages["backward"] if profile["about"]["device"] != "cpu" else 0.0
    exposed = max(ring * size - hidden, ring * min(size, LAST_BUCKET))
    return float(alone + exposed + profile["gradient_copy_seconds"] + _slowest(profile["step"], processes))


def _slowest(step: dict[str, float], processes: int) -> float:
    """By how much the slowest of so many steps is expected to exceed the middle one (Blom's score of the largest of P
    normal values; the standard deviation from the quartiles)."""
    score = NormalDist().inv_cdf((processes - 0.375) / (processes + 0.25))
    return score * (step["quartile_75"] - step["quartile_25"]) / 1.349


def project(
    profile: dict[str, Any],
    *,
    gpus: tuple[int, ...] = (1, 8, 64),
    bandwidth: float | None = None,
    price: float | None = None,
) -> list[dict[str, float | None]]:
    """ImageNet epoch and whole recipe on so many devices like this one.

    Args:
        profile: from measure.profile.
        gpus: numbers of processes.
        bandwidth: of the all-reduce, bytes/s; the measured one if there is, else BANDWIDTH.
        price: of one device, an hour.
    """
    communication = profile["communication"] or {}
    speed = bandwidth or communication.get("bytes_per_second") or BANDWIDTH
    about = profile["about"]
    rows = profile["images_per_step"] / about["processes"]
    found: list[dict[str, float | None]] = []
    for count in gpus:
        step = step_seconds(profile, count, speed)
        epoch = IMAGENET / (rows * count) * step
        evaluating = IMAGENET_VAL * profile["evaluation"]["seconds_an_image"] * about["processes"] / count
        recipe = about["epochs"] * (epoch + evaluating / about["eval_every"])
        found.append(
            {
                "gpus": count,
                "images_per_second": rows * count / step,
                "epoch_seconds": epoch,
                "recipe_seconds": recipe,
                "cost": recipe / 3600 * count * price if price is not None else None,
            }
        )
    return found
