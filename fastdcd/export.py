"""A trained student as others load it: a timm-style folder, ONNX, torch.export, and a model card.

The folder holds model.safetensors (the weights under their library's own names) and config.json (architecture,
classes, and the preprocessing of evaluation), as timm writes them for the Hugging Face Hub:

    timm.create_model("local-dir:runs/NAME/export", pretrained=True)          # timm:NAME, and torchvision's ResNets
    fastdcd.export.load("runs/NAME/export")                                   # any student

https://huggingface.co/docs/timm/hf_hub
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdcd
from fastdcd import models, weights
from fastdcd.config import Config
from pipelines.files import replace_file, write_json

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a folder says of a student.

    Attributes:
        model: its name in a config: torchvision:NAME, timm:NAME, cifar:NAME or path/to/file.py:callable.
        labels: class names in label order.
        image_size: height and width it was evaluated at, pixels.
        crop_ratio: side of the centre crop over the shorter side of the image (timm's crop_pct).
        mean, std: normalisation, in 0..1 units.
    """

    model: str
    labels: tuple[str, ...]
    image_size: int
    crop_ratio: float
    mean: models.Triple
    std: models.Triple


def describe(cfg: Config, labels: Sequence[str]) -> Exported:
    """The student of a config, for classes named `labels`."""
    normalize = models.normalize_for(cfg.student.model, cfg.student.mean, cfg.student.std)
    return Exported(
        model=cfg.student.model,
        labels=tuple(labels),
        image_size=cfg.eval_size,
        crop_ratio=cfg.eval.crop_ratio,
        mean=normalize.mean,
        std=normalize.std,
    )


def write_folder(folder: Path, about: Exported, tensors: Mapping[str, Tensor]) -> None:
    """Write a timm-style folder; config.json last, so that a half-written one is never loaded.

    Args:
        about: the student.
        tensors: its weights under the names of its library (FeatureModel.original_state_dict).
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(folder / WEIGHTS, tensors)
    write_json(
        folder / CONFIG,
        {
            "architecture": _timm_architecture(about.model, tensors) or about.model,
            "num_classes": len(about.labels),
            "label_names": list(about.labels),
            "pretrained_cfg": {
                "input_size": [3, about.image_size, about.image_size],
                "crop_pct": about.crop_ratio,
                "crop_mode": "center",
                "interpolation": "bilinear",
                "mean": list(about.mean),
                "std": list(about.std),
                "num_classes": len(about.labels),
                "custom_load": False,
            },
            "fastdcd": {"model": about.model, "version": fastdcd.__version__},
        },
    )


def _timm_architecture(model: str, tensors: Mapping[str, Tensor]) -> str | None:
    """timm's name of a student's architecture, if timm has it with the same tensors: all of timm's own, and
    torchvision's ResNets. Tags of pretrained weights are left out: these weights are others."""
    library, _, name = model.partition(":")
    if library == "timm":
        return name.partition(".")[0]
    if library != "torchvision":
        return None
    import timm

    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000).state_dict()
    same = theirs.keys() == tensors.keys() and all(
        theirs[key].shape[1:] == tensors[key].shape[1:]
        for key in tensors  # the classifier's rows are the classes
    )
    return name if same else None


def read_description(folder: Path) -> Exported:
    """What `write_folder` wrote of a student. Raises ValueError for another folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder exported by fastdcd (runs/NAME/export)")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        settings = tree["pretrained_cfg"]
        return Exported(
            model=str(tree["fastdcd"]["model"]),
            labels=tuple(map(str, tree["label_names"])),
            image_size=int(settings["input_size"][-1]),
            crop_ratio=float(settings["crop_pct"]),
            mean=_triple(settings["mean"]),
            std=_triple(settings["std"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: not written by fastdcd, or damaged ({error!r}); export the student again"
        ) from None


def _triple(values: Any) -> models.Triple:
    first, second, third = map(float, values)
    return first, second, third


class Classifier(nn.Module):
    """A student with its preprocessing: images uint8 [n, 3, H, W] RGB -> logits float32 [n, classes]."""

    def __init__(self, student: models.FeatureModel, normalize: models.Normalize) -> None:
        super().__init__()
        self.student, self.normalize = student, normalize

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.student(self.normalize(images)).logits
        return logits


def load(folder: Path | str) -> Classifier:
    """A student from its exported folder, in evaluation mode. Raises ValueError as `read_description` does, or if the
    weights do not fit."""
    about = read_description(Path(folder))
    student = models.build(about.model, classes=len(about.labels))
    weights.load_into(student, Path(folder) / WEIGHTS, what="student")
    return Classifier(student, models.Normalize(about.mean, about.std)).eval()


# ---- other formats


def to_onnx(classifier: Classifier, path: Path, image_size: int) -> None:
    """Write an ONNX model: input "images" uint8 [n, 3, size, size] RGB of any n, output "logits" float32 [n, classes].

    Raises ValueError if onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX needs packages that are not installed ({error}): pip install 'fastdcd[export]'"
        ) from None
    program = torch.onnx.export(
        classifier,
        (_example(image_size),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_any_batch(),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with replace_file(path) as file:
        program.save(file.name)


def to_exported_program(classifier: Classifier, path: Path, image_size: int) -> None:
    """Write a torch.export program (torch.export.load reads it): the same input and output as `to_onnx`."""
    program = torch.export.export(classifier, (_example(image_size),), dynamic_shapes=_any_batch())
    with replace_file(path) as file:
        torch.export.save(program, file)


def _any_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _example(image_size: int) -> Tensor:
    # two rows: a batch of one would be taken for a constant
    return torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)


# ---- the model card


def card(about: Exported, cfg: Config, summary: Mapping[str, Any], command: str) -> str:
    """README.md of an exported student: what it is, what it was taught by and how, how good it is, how to load it."""
    methods = {"ce": "cross-entropy", "kd": "KD", "dcd": "DCD (arXiv 2407.11802)"}
    terms = [f"{methods.get(name, name)} x {weight:g}" for name, weight in _terms(cfg).items()]
    library, _, name = about.model.partition(":")
    teacher = " + ".join(model for model, _ in cfg.teacher.members) if cfg.teacher.mode != "none" else "none"
    lines = [
        "---",
        "library_name: timm" if library in ("timm", "torchvision") else "library_name: fastdcd",
        "tags: [image-classification, knowledge-distillation]",
        "---",
        f"# {name or about.model}, {len(about.labels)} classes",
        "",
        "| | |",
        "|---|---|",
        f"| top-1 / top-5, validation set | {summary['top1']:.2f} % / {summary['top5']:.2f} % |",
        f"| parameters | {summary['student_parameters']:,} |",
        f"| input | uint8 RGB, {about.image_size} x {about.image_size}; centre crop {about.crop_ratio:g}, bilinear |",
        f"| normalisation | mean {list(about.mean)}, std {list(about.std)} |",
        f"| training data | {cfg.data.train} |",
        f"| validation data | {cfg.data.val} |",
        f"| teacher | {teacher} ({cfg.teacher.mode}) |",
        f"| loss | {', '.join(terms)} |",
        f"| recipe | {cfg.train.epochs} epochs, batch {cfg.data.batch_size}, {cfg.optim.name}, lr {cfg.optim.lr:g}, "
        f"{cfg.schedule.name}, {cfg.train.precision} |",
        "",
        f"Trained by fastdcd {fastdcd.__version__}: `{command}`; the complete config is in config.yaml beside the run.",
        "",
        "```python",
        "import fastdcd.export, torch",
        "",
        'classifier = fastdcd.export.load("THIS FOLDER")',
        f"logits = classifier(torch.zeros(1, 3, {about.image_size}, {about.image_size}, dtype=torch.uint8))",
        "```",
        "",
    ]
    return "\n".join(lines)


def _terms(cfg: Config) -> dict[str, float]:
    from fastdcd.losses.terms import TERMS

    return {name: weight for name in TERMS if (weight := getattr(cfg.loss, name))}
