"""Pixels of every backend beside the torch loader's, and what a real teacher makes of them: tools/check_parity.py.

Converts photographs into what each backend reads and compares the same boxes at the teacher's resolution: on the
same stored pixels, and with the originals.

    python benchmarks/parity.py --source IMAGENET_CLASS_FOLDERS --classes CLASSES.txt --teacher efficientnet-lite2.pth \
        --backend dali
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run by path: import from the checkout

from benchmarks import record
from fastdcd import cli
from pipelines.conversion.encode import Storage
from pipelines.conversion.job import Job, to_beton, to_shards
from pipelines.conversion.sources import open_sources
from pipelines.image_folder import read_classes

CONFIG = "configs/imagenet/smoke/torch.yaml"
HEAD = "| dataset | against | crops | mean difference of 255 (worst image) | teacher's features, cosine, mean (5 %) | same top-1, % |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="parity.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="class folders of real photographs")
    parser.add_argument("--classes", type=Path, required=True, help="ImageNet's class names in label order")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="weights of EfficientNet-Lite2: docs/convert.md"
    )
    parser.add_argument("--backend", choices=("dali", "ffcv"), required=True)
    parser.add_argument("--images", type=int, default=120)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = open_sources(arguments.source, read_classes(arguments.classes))
        if arguments.backend == "dali":
            to_shards(Job(sources=sources, out=scratch / "shards 500 px"), Storage())
            (scratch / "originals").symlink_to(arguments.source.resolve())
            names = ["originals", "shards 500 px"]
        else:
            for name, jpeg in (("raw", 0.0), ("JPEG", 1.0)):
                job = Job(sources=sources, out=scratch / f"500 px {name}.beton")
                to_beton(job, Storage(jpeg=jpeg))
            names = ["500 px raw.beton", "500 px JPEG.beton"]
        datasets = [f"{arguments.backend}:{scratch / name}" for name in names]
        command = [sys.executable, str(ROOT / "tools/check_parity.py"), *datasets]
        command += [
            "--config",
            str(ROOT / CONFIG),
            "--source",
            str(arguments.source),
            "--images",
            str(arguments.images),
        ]
        command += ["--json", str(scratch / "figures.json"), "--set", f"data.classes={arguments.classes}"]
        command += [f"teacher.checkpoint={arguments.teacher}", "data.workers=2"]
        subprocess.run(command, check=True)
        rows = json.loads((scratch / "figures.json").read_text(encoding="utf-8"))
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for row in rows:
        pixels = f"{row['difference_mean']:.3f} ({row['difference_worst']:.2f})"
        features = f"{row['cosine_mean']:.5f} ({row['cosine_5_percent']:.5f})"
        cells = [row["dataset"], row["against"], row["crops"], pixels, features, f"{row['top1_percent']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{arguments.images} photographs at 224 px; stored: the same stored pixels, source: the originals.",
    ]
    record.write(f"parity-{arguments.backend}-cpu", {"rows": rows}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)
