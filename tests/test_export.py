"""A trained student leaves as others load it: timm-style folder, ONNX, torch.export, model card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Digits, run_program

from fastdcd import export, models
from fastdcd.train import train

LABELS = ("cat", "dog", "owl")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_timm_loads_the_folder_and_sees_the_same(name: str, tmp_path: Path) -> None:
    import timm
    from timm.data import resolve_data_config

    student = models.build(name, classes=len(LABELS)).eval()
    normalize = models.normalize_for(name)
    about = export.Exported(
        model=name, labels=LABELS, image_size=64, crop_ratio=0.9, mean=normalize.mean, std=normalize.std
    )
    export.write_folder(tmp_path, about, student.original_state_dict())
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(normalize(images)), student(normalize(images)).logits)
    settings = resolve_data_config({}, model=theirs)
    assert tuple(settings["input_size"]) == (3, 64, 64) and settings["crop_pct"] == 0.9
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (normalize.mean, normalize.std)
    assert theirs.pretrained_cfg["label_names"] == list(LABELS)


def test_a_student_that_timm_does_not_know_loads_here(tmp_path: Path) -> None:
    student = models.build("cifar:resnet8", classes=len(LABELS)).eval()
    about = export.Exported(
        model="cifar:resnet8",
        labels=LABELS,
        image_size=32,
        crop_ratio=1.0,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.3),
    )
    export.write_folder(tmp_path, about, student.original_state_dict())
    assert export.read_description(tmp_path) == about
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = student(models.Normalize(about.mean, about.std)(images)).logits
    assert torch.equal(export.load(tmp_path)(images), expected)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"architecture": "resnet18"}',
        '{"fastdcd": {"model": "x"}, "label_names": 3, "pretrained_cfg": {}}',
    ],
)
def test_another_folder_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        export.read_description(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="not written by fastdcd, or damaged") as refused:
        export.read_description(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_finished_run_exports_onnx_and_torch_export_that_agree_with_the_student(
    digits: Digits, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(digits.config(run, train={"epochs": 1}))
    done = run_program("tools/export.py", run, "--onnx", "--torch-export", "--check")
    assert done.code == 0, done.err
    folder = run / "export"
    summary = json.loads((run / "summary.json").read_text())
    assert f"top-1 {summary['top1']:.2f} %, ONNX {summary['top1']:.2f} %" in done.out
    card = (folder / "README.md").read_text()
    assert f"{summary['top1']:.2f} %" in card and str(run / "config.yaml") in card
    classifier, program = export.load(folder), torch.export.load(folder / "model.pt2").module()
    size = export.read_description(folder).image_size
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 5):
        images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8)
        ours = classifier(images).detach().numpy()
        np.testing.assert_allclose(program(images).detach().numpy(), ours, atol=1e-4)
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], ours, atol=1e-4)


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"finished": false}')
    done = run_program("tools/export.py", tmp_path)
    assert done.code == 2 and "not finished; resume it" in done.err
    done = run_program("tools/export.py", tmp_path / "none")
    assert done.code == 2 and "expected the folder of a finished run" in done.err
