"""The GPU path, as far as a machine without one can show it; tests marked `cuda` run where there is one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdcd import experiment


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
