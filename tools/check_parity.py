"""How far a backend's pixels are from the torch loader's, on your data, and what your teacher makes of it.

Every dataset renders the same boxes: random training crops and centre crops. Two comparisons:

    stored    the same stored pixels, decoded by torchvision and rendered by the torch loader
    source    the torch loader on the original images (--source), the boxes scaled to their size: what
              shrinking and encoding again did is part of it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdcd import cli, config_file
from fastdcd.experiment import open_set
from fastdcd.teacher import Teacher, load_teacher
from pipelines.base import Loader, LoaderOptions, open_loader
from pipelines.files import user_path, write_json
from pipelines.formats.stored import open_stored
from pipelines.image_folder import user_cache
from pipelines.images.decode import decode, render
from pipelines.plan import Crops, RankPlan
from pipelines.views import Boxes, Center, RandomResizedCrop, ViewFamily

CROPS: dict[str, ViewFamily] = {"train": RandomResizedCrop(), "centre": Center()}
BATCH = 32

_EPILOG = """example, with the teacher of a config:
  python tools/check_parity.py --config configs/imagenet/smoke/torch.yaml --source data/imagenet/val \\
      dali:data/imagenet/val dali:data/imagenet-shards/val ffcv:data/imagenet-ffcv/val.beton
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        difference: mean absolute difference of pixels, of 255, a sample [n].
        cosine, agree: of the teacher's features a sample [n], and whether its first choice is the same; None
            without a teacher.
    """

    dataset: str
    against: str
    crop: str
    difference: Tensor
    cosine: Tensor | None
    agree: Tensor | None

    def figures(self) -> dict[str, str | float]:
        """The figures of the line; what needs a teacher only if there is one."""
        found: dict[str, str | float] = {
            "dataset": self.dataset,
            "against": self.against,
            "crops": self.crop,
            "difference_mean": self.difference.mean().item(),
            "difference_worst": self.difference.max().item(),
        }
        if self.cosine is not None and self.agree is not None:
            found |= {
                "cosine_mean": self.cosine.mean().item(),
                "cosine_5_percent": self.cosine.quantile(0.05).item(),
                "top1_percent": self.agree.float().mean().item() * 100,
            }
        return found

    def __str__(self) -> str:
        widths = ("<42", "<7", "<7", ">6.3f", ">7.2f", ">8.5f", ">8.5f", ">7.1f")
        return " ".join(
            format(value, width) for value, width in zip(self.figures().values(), widths, strict=False)
        )


HEAD = (
    f"{'dataset':<42} {'against':<7} {'crops':<7} {'mean':>6} {'worst':>7} {'cosine':>8} {'5 %':>8} {'top-1 %':>7}"
)


def rendered(loader: Loader, ids: NDArray[np.int64], boxes: Boxes, flips: NDArray[np.bool_], size: int) -> Tensor:
    """What a loader makes of boxes: uint8 [n, 3, size, size]."""
    rank_plan = RankPlan(
        ids=ids,
        crops=(Crops(boxes=boxes, flips=flips, size=size),),
        batch_size=BATCH,
        batches=-(-len(ids) // BATCH),
    )
    return torch.cat([batch.images[0].cpu().contiguous() for batch in loader.epoch(rank_plan)])


def compare(
    loader: Loader,
    backend: str,
    path: Path,
    source: Path | None,
    *,
    images: int,
    size: int,
    teacher: Teacher | None,
) -> Iterator[Row]:
    """The rows of one dataset. Raises ValueError if `source` lacks its images."""
    index = loader.index
    ids = np.arange(min(images, len(index)), dtype=np.int64) * len(index) // min(images, len(index))
    samples = open_stored(path, index)
    if samples is None:
        raise ValueError(f"{path}: the {backend} backend stores nothing to compare with; name another dataset")
    with closing(samples):
        stored = [samples.pixels(int(sample)) for sample in ids]
    for crop, family in CROPS.items():
        boxes, flips = family.boxes(0, ids, 0, index.sizes[ids])
        ours = rendered(loader, ids, boxes, flips, size)

        seen = teacher.features(ours) if teacher else None

        def row(
            against: str, theirs: Tensor, crop: str = crop, ours: Tensor = ours, a: Tensor | None = seen
        ) -> Row:
            difference = (ours.int() - theirs.int()).abs().float().mean((1, 2, 3))
            cosine = agree = None
            if teacher and a is not None:
                b = teacher.features(theirs)
                cosine = torch.cosine_similarity(a, b)
                agree = teacher.logits(a).argmax(1) == teacher.logits(b).argmax(1)
            return Row(
                dataset=f"{backend}:{path.name}",
                against=against,
                crop=crop,
                difference=difference,
                cosine=cosine,
                agree=agree,
            )

        pairs = zip(stored, boxes, flips, strict=True)
        yield row("stored", torch.stack([render(image, box, bool(flip), size) for image, box, flip in pairs]))
        if source is not None:
            pictures = []
            for sample, box, flip in zip(ids.tolist(), boxes, flips, strict=True):
                original = source / index.names[sample]
                if not original.is_file():
                    raise ValueError(f"{original}: no such file; --source must be the folder that was converted")
                image = decode(original.read_bytes())
                scale = np.array(image.shape[1:]) / index.sizes[sample]
                start, end = np.rint(box[:2] * scale), np.rint((box[:2] + box[2:]) * scale)
                pictures.append(
                    render(image, np.concatenate([start, end - start]).astype(np.int32), bool(flip), size)
                )
            yield row("source", torch.stack(pictures))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "datasets", nargs="+", metavar="BACKEND:PATH", help="what to compare, as in ffcv:val.beton"
    )
    parser.add_argument("--source", type=user_path, metavar="DIR", help="class folders of the original images")
    parser.add_argument("--images", type=int, default=120, metavar="N", help="spread over the set (default 120)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="pixels (default 224; a teacher's own)")
    parser.add_argument("--json", type=user_path, metavar="F", help="write the figures there too")
    parser.add_argument(
        "--config", type=user_path, metavar="FILE", help="an experiment, for its teacher and classes"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value")
    arguments = parser.parse_args()
    settings = config_file.load(arguments.config, arguments.set) if arguments.config else None
    if arguments.images < 1 or arguments.size < 1:
        raise ValueError("--images and --size: expected 1 or more")
    teacher = None
    rows: list[Row] = []
    print(HEAD if settings else HEAD[: HEAD.index("cosine") - 1].rstrip())
    for dataset in arguments.datasets:
        backend, colon, name = dataset.partition(":")
        if not colon:
            raise ValueError(f"{dataset}: expected BACKEND:PATH, as in ffcv:data/val.beton")
        path = user_path(name)
        if settings:
            section = replace(settings.data, backend=backend, workers=min(settings.data.workers, 2))
            loader = open_set(section, path, torch.device("cpu"), dataset)
        else:
            loader = open_loader(backend, path, LoaderOptions(index_cache=user_cache()))
        with loader:
            size = arguments.size
            if settings and settings.teacher.mode != "none":
                size = settings.teacher_size
                teacher = teacher or load_teacher(
                    settings, classes=len(loader.index.classes), rows=BATCH, device=torch.device("cpu")
                )
            for row in compare(
                loader, backend, path, arguments.source, images=arguments.images, size=size, teacher=teacher
            ):
                print(row, flush=True)
                rows.append(row)
    if arguments.json:
        write_json(arguments.json, [row.figures() for row in rows])
    return 0


if __name__ == "__main__":
    cli.run(main)
