"""benchmarks/run_gpu.py: its parts run (tiny, on the CPU), what is missing is told from what is measured."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, Digits, run_program

RUN_GPU = "benchmarks/run_gpu.py"


@pytest.fixture
def run_gpu(
    digits: Digits, photographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The module, in a folder that has the configs and the data it looks for."""
    for number, path in enumerate(photographs[:8]):
        link = tmp_path / "data/imagenet-smoke/train" / "ab"[number % 2] / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (tmp_path / "data/cifar100-resident").symlink_to(digits.resident)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(importlib.import_module("benchmarks.record"), "RESULTS", tmp_path / "results")
    return importlib.import_module("benchmarks.run_gpu")


def results(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


# fused_loss.py starts a process for each of its figures, which is too slow here; tests/test_losses.py has its forms.
@pytest.mark.parametrize(
    "name", ["step-r18-160", "gpu-pixels", "gpu-loaders", "epoch-r18", "fill-cuda", "profiler-cuda", "cifar-pairs"]
)
def test_every_part_writes_its_results(run_gpu: ModuleType, tmp_path: Path, name: str) -> None:
    (part,) = [part for part in run_gpu.PARTS if part.name == name]
    _, *arguments = part.command(tiny=True)
    ran = run_program(f"benchmarks/{part.script}", *arguments)
    assert ran.code == 0, ran.err
    found = results(tmp_path / "results", name)
    assert {"command", "date", "gpu", "versions"} <= found["environment"].keys()
    assert (tmp_path / "results" / f"{name}.md").read_text().startswith("|")
    assert "did_not_run" not in found or not found["did_not_run"], found
    assert run_gpu.complete(tmp_path / "results", part)


def test_what_is_missing_is_run_once_and_told(run_gpu: ModuleType) -> None:
    for turn in range(2):
        ran = run_program(RUN_GPU, "fill-cuda", "--tiny")
        assert ran.code == 0, ran.err
        assert ("===" in ran.out) == (turn == 0), "its results are there: not again"
    assert results(run_gpu.TINY, "fill-cuda")["environment"]["gpu"] is None
    assert not list((ROOT / "benchmarks/results").glob("fill-cuda*")), "no figure where measured ones lie"
    listed = run_program(RUN_GPU, "--tiny", "--list").out
    measured, _, missing = listed.partition("NOT MEASURED YET")
    assert "fill-cuda" in measured and "fill-cuda" not in missing and "cifar-pairs" in missing
    path = run_gpu.TINY / "fill-cuda.json"
    path.write_text(json.dumps({**results(run_gpu.TINY, "fill-cuda"), "complete": False}))
    assert "fill-cuda" in run_program(RUN_GPU, "--tiny", "--list").out.partition("NOT MEASURED YET")[2]


def test_parts_that_cannot_run_are_told(run_gpu: ModuleType, tmp_path: Path) -> None:
    ran = run_program(RUN_GPU, "fused-los")
    assert ran.code == 2 and "fused-los: no such part; known: gpu-pixels" in ran.err
    (tmp_path / "data/cifar100-resident").unlink()
    ran = run_program(RUN_GPU, "fill-cuda", "--tiny")
    assert ran.code == 1 and "data/cifar100-resident/train is missing; docs/convert.md" in ran.err


def test_every_result_names_a_benchmark_that_exists() -> None:
    """make bench: each file of benchmarks/results has the command that makes it again."""
    ran = run_program(RUN_GPU, "--list")
    assert ran.code == 0, ran.err
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        found = json.loads(path.read_text())
        script = found.get("environment", found)["command"].split()[1]
        assert (ROOT / script).is_file() and path.stem in ran.out and path.with_suffix(".md").is_file()
