"""The GPU path, as far as a machine without one can show it; tests marked `cuda` run where there is one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from fastdcd import experiment
from fastdcd.losses import dcd
from pipelines.base import LoaderOptions, open_loader
from pipelines.plan import EpochPlan
from pipelines.views import RandomResizedCrop


def test_processes_stay_on_their_gpus_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(experiment, "PCI", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 8})
    kept: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: kept.append(cores))
    near = tmp_path / "0000:1b:00.0" / "local_cpulist"
    near.parent.mkdir()
    device = torch.device("cuda", 0)

    def keep(processes: int) -> set[int]:
        kept.clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        experiment._stay_near(device)
        return kept[0] if kept else set()

    assert keep(2) == set(), "nothing is known of the GPU: nothing is changed"
    near.write_text("2-5,8,12-15\n")
    assert keep(2) == {2, 3, 8}
    assert keep(1) == set(), "one process may use the whole machine"
    near.write_text("4-7\n")
    assert keep(2) == set(), "none of those that the process may use"


# ---- Triton, compiled ahead of time

# Shared memory that a block of threads may have, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("dimensions", [128, 256])
def test_triton_kernels_fit_and_spill_nothing(dimensions: int, tmp_path: Path) -> None:
    """Compiled by the real compiler and assembler for GPUs that are not here, in the blocks that training takes."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, str(ROOT / "tests/compile_triton.py"), str(dimensions), *map(str, SHARED)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = re.findall(r"(\w+) sm_(\d+) shared (\d+) registers (\d+) spilled (\d+) products (.+)", ran.stdout)
    assert len(lines) == 2 * len(SHARED), ran.stdout
    for kernel, target, shared, registers, spilled, products in lines:
        assert int(shared) <= SHARED[int(target)], (kernel, target, shared)
        assert int(registers) <= 255 and int(spilled) == 0, (kernel, target, registers, spilled)
        if dimensions == 128 and target == "90":
            assert products == "wgmma", "the fast tensor-core instruction of a Hopper GPU"


def test_triton_leaves_larger_embeddings_to_tiles() -> None:
    assert dcd.fastest("cuda", 65536, 256) == "triton" and dcd.fastest("cuda", 65536, 257) == "tiled"


# ---- what only a GPU can show: pytest -m cuda


@pytest.mark.cuda
def test_a_cached_samples_pixels_do_not_depend_on_its_batch(photographs: list[Path], tmp_path: Path) -> None:
    for number, path in enumerate(photographs):
        link = tmp_path / "ab"[number % 2] / path.name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)
    found = []
    with open_loader("dali", tmp_path, LoaderOptions(device=torch.device("cuda", 0), repeatable=True)) as loader:
        count = len(loader.index)
        for ids, rows in [(np.arange(count), 16), (np.random.default_rng(0).permutation(count), 7)]:
            plan = EpochPlan(
                index=loader.index,
                family=RandomResizedCrop(),
                view_seed=0,
                view=0,
                order=ids,
                batch_size=rows,
            )
            pixels = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
            for batch in loader.epoch(plan.for_rank((64,))):
                pixels[batch.ids] = batch.images[0].cpu()
            found.append(pixels)
    assert torch.equal(*found)


@pytest.mark.cuda
@pytest.mark.parametrize("dimensions", [128, 256])
def test_triton_on_a_gpu_is_the_reference(dimensions: int) -> None:
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2, 500, dimensions, device="cuda"), dim=2)
    results = []
    for form, dtype in [("naive", torch.float64), ("triton", torch.float32)]:
        z_s, z_t = (each.to(dtype).requires_grad_() for each in z)
        loss = dcd.dcd(z_s, z_t, torch.tensor(5.0, device="cuda", dtype=dtype), form=form).loss
        loss.backward()
        results.append([loss.detach().double(), z_s.grad.double(), z_t.grad.double()])
    for exact, ours in zip(*results, strict=True):
        # embeddings are rounded to bfloat16: 2^-9 of each, some percent of the smallest gradients
        assert (ours - exact).norm() <= 0.02 * exact.norm()
