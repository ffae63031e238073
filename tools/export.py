"""Export a trained student: a timm-style folder with a model card, ONNX, a torch.export program, the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from fastdcd import cli, config_file, experiment, export, weights
from fastdcd.config import Config
from pipelines.files import replace_file
from pipelines.plan import evaluation_plan

TOLERANCE = 1e-4  # of logits, ONNX against the student

_EPILOG = """examples:
  python tools/export.py runs/imagenet/resnet18                     # runs/imagenet/resnet18/export/
  python tools/export.py runs/imagenet/resnet18 --onnx --torch-export --check
  python tools/export.py runs/imagenet/resnet18 --push NAME/resnet18-distilled
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to; RUN/export if not given")
    parser.add_argument("--onnx", action="store_true", help="also model.onnx, for batches of any size")
    parser.add_argument("--torch-export", action="store_true", help="also model.pt2, for torch.export.load")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare ONNX with the student on the validation set: logits to 1e-4, and equal top-1",
    )
    parser.add_argument("--push", metavar="REPOSITORY", help="upload the folder to the Hugging Face Hub")
    arguments = parser.parse_args()
    run, out = arguments.run.expanduser(), (arguments.out or arguments.run / "export").expanduser()
    cfg, summary = _finished(run)
    about = _folder(run, out, cfg, summary)
    print(f"{out}: {about.model}, {len(about.labels)} classes, top-1 {summary['top1']:.2f} %")
    classifier = export.load(out)
    if arguments.torch_export:
        export.to_exported_program(classifier, out / "model.pt2", about.image_size)
        print(out / "model.pt2")
    if arguments.onnx:
        export.to_onnx(classifier, out / "model.onnx", about.image_size)
        print(out / "model.onnx")
    if arguments.check:
        if not (out / "model.onnx").is_file():
            raise ValueError(f"{out}/model.onnx: no such file to check; add --onnx")
        _check(cfg, about, classifier, out / "model.onnx")
    if arguments.push:
        _push(out, arguments.push)
    return 0


def _finished(run: Path) -> tuple[Config, dict[str, object]]:
    """Config and summary of a finished run."""
    path = run / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a finished run (run.dir)")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not summary["finished"]:
        raise ValueError(f"{run}: the run is not finished; resume it: fastdcd/train.py --config ... --resume auto")
    return config_file.load(run / "config.yaml"), summary


def _folder(run: Path, out: Path, cfg: Config, summary: dict[str, object]) -> export.Exported:
    """The timm-style folder with its card; training wrote one at RUN/export, which knows the labels."""
    about = export.read_description(run / "export")
    if out.resolve() != (run / "export").resolve():
        export.write_folder(out, about, weights.load(run / "export" / export.WEIGHTS))
    command = f"python fastdcd/train.py --config {run / 'config.yaml'}"
    with replace_file(out / export.CARD) as file:
        file.write(export.card(about, cfg, summary, command).encode())
    return about


def _check(cfg: Config, about: export.Exported, classifier: export.Classifier, path: Path) -> None:
    """Raises ValueError if ONNX and the student disagree on the validation set."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"--check runs onnxruntime, which is not installed ({error}): pip install 'fastdcd[export]'"
        ) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst, hits, onnx_hits, images = 0.0, 0, 0, 0
    with (
        experiment.open_set(cfg.data, cfg.data.val, torch.device("cpu"), "data.val") as loader,
        torch.inference_mode(),
    ):
        plan = evaluation_plan(loader.index, crop_ratio=about.crop_ratio, batch_size=cfg.eval.batch_size).for_rank(
            (about.image_size,)
        )
        for batch in tqdm(loader.epoch(plan), "check", plan.batches, unit="batch", disable=None):
            pixels = batch.images[0].contiguous()
            ours = classifier(pixels).numpy()
            (theirs,) = session.run(None, {"images": pixels.numpy()})
            worst = max(worst, float(np.abs(ours - theirs).max(initial=0.0)))
            labels = batch.labels.numpy()
            hits += int((ours.argmax(1) == labels).sum())
            onnx_hits += int((theirs.argmax(1) == labels).sum())
            images += len(labels)
    print(
        f"{images:,} images: top-1 {100 * hits / images:.2f} %, ONNX {100 * onnx_hits / images:.2f} %; logits differ by at most {worst:.1e}"
    )
    if worst > TOLERANCE or hits != onnx_hits:
        raise ValueError(
            f"{path}: differs from the student by more than {TOLERANCE:g}, or in top-1; do not use it"
        )


def _push(folder: Path, repository: str) -> None:
    """Upload a folder to the Hugging Face Hub; raises ValueError if that is refused."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        print(api.upload_folder(folder_path=folder, repo_id=repository))
    except (HfHubHTTPError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--push {repository}: {first}; log in first: hf auth login") from None


if __name__ == "__main__":
    cli.run(main)
