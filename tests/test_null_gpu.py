"""The real trainer on `cuda`, on a machine without a GPU: everything of CUDA is there but the arithmetic of kernels.

tests/null_gpu replaces CUDA's runtime, cuBLAS, cuDNN and NCCL (LD_PRELOAD). So this shows mixed devices, waits of the
host, pageable copies, memory that grows, calls on another rank's GPU, and crashes of our own code. It shows no value, no
time of the GPU, nothing of DALI's pipeline (which has a runtime of its own) and nothing of NCCL's order of calls.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH, ROOT, Digits, absent, run_program

NULL_GPU = ROOT / "tests" / "null_gpu"
Found = dict[str, Any]
pytestmark = pytest.mark.timeout(900)  # 40 s of CPU time, on however busy a machine


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built."""
    if not shutil.which("g++"):
        absent("no C++ compiler (g++)")
    if torch.version.cuda is None:
        absent("torch was built without CUDA")
    packages = Path(torch.__file__).parents[1]
    headers = [*packages.glob("triton/backends/nvidia/include"), *packages.glob("nvidia/cu*/include")]
    out = tmp_path_factory.mktemp("null-gpu")
    for library, sources in [
        ("libnullgpu.so", ["runtime.cpp", "libraries.cpp"]),
        ("libcuda.so.1", ["driver.cpp"]),
    ]:
        files = [NULL_GPU / source for source in sources]
        subprocess.run(
            ["g++", "-O1", "-shared", "-fPIC", f"-I{headers[0]}", "-o", out / library, *files], check=True
        )
    return out / "libnullgpu.so"


def start(null_gpu: Path, folder: Path, runs: dict[str, Any], **more: str) -> subprocess.Popen[str]:
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, *map(str, (NULL_GPU / "rehearse.py", folder / "runs.json", folder / "found.json"))]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(null_gpu),
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [str(null_gpu.parent), os.environ.get("LD_LIBRARY_PATH", "")])
        ),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], folder: Path) -> dict[str, Found]:
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 0, out
    found: dict[str, Found] = json.loads((folder / "found.json").read_text())
    return found


def rehearsals(digits: Digits, beton: Path, folder: Path) -> dict[str, Any]:
    """Name -> config. A row says what is new in it; together they cover what the issue of a GPU run can ask for."""
    files = {
        "train": str(digits.folder / "train"),
        "val": str(digits.folder / "val"),
        "backend": "torch",
        "workers": 1,
    }
    ffcv = {"train": str(beton), "val": str(beton), "backend": "ffcv", "workers": 1}
    noise = {"train": "500x10", "val": "60x10", "backend": "synthetic"}
    online, cached, fill = ({"mode": mode} for mode in ("online", "cached", "fill"))
    none = {"mode": "none"}
    cache = {"path": str(folder / "cache"), "device": "cpu", "check_rows": 0}  # nothing can be recomputed here
    rows: dict[str, dict[str, dict[str, Any]]] = {
        "resident, fp32, 20 epochs": {
            "teacher": none,
            "train": {"epochs": 20},
            "eval": {"every": 2, "flip": True},
        },
        "folders, bf16, teacher of another size online": {
            "data": files,
            "teacher": {**online, "image_size": 16, "precision": "bf16", "evaluate": True},
            "train": {"precision": "bf16"},
        },
        "filling, then reading from the host": {
            "teacher": fill,
            "views": {"count": 1},
            "cache": cache,
            "train": {"epochs": 4},
        },
        "filling, then reading from the device": {
            "teacher": fill,
            "views": {"count": 2},
            "cache": {"path": str(folder / "cache-2"), "device": "cuda"},
            "train": {"epochs": 5},
        },
        "cached on the host, tiled": {
            "teacher": cached,
            "cache": cache,
            "views": {"count": 1},
            "loss": {"form": "tiled"},
        },
        "cached on the device, masked": {
            "teacher": cached,
            "cache": {**cache, "device": "cuda"},
            "views": {"count": 1},
            "loss": {"mask_same_class": True},
        },
        "ffcv, fp16, adamw, parts, clipped": {
            "data": {**ffcv, "batch_size": 96},  # and a batch of 20
            "teacher": online,
            "optim": {"name": "adamw"},
            "train": {"precision": "fp16", "accumulate": 3, "clip": 1.0},
        },
        "noise, sgd, fp16": {"data": noise, "teacher": online, "train": {"precision": "fp16"}},
        "noise, timm's optimizer": {"data": noise, "teacher": none, "optim": {"name": "timm:lamb"}},
    }
    return {name: tree(digits, folder / f"run-{number}", **row) for number, (name, row) in enumerate(rows.items())}


def tree(digits: Digits, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    common: dict[str, dict[str, Any]] = {
        "data": {"device": "cuda", "batch_size": 100},
        "train": {"epochs": 3, "log_every": 2},
        "run": {"dir": str(run)},
        "loss": BOTH if sections["teacher"]["mode"] != "none" else {},
    }
    for name, values in sections.items():
        common[name] = {**common.get(name, {}), **values}
    return digits.tree(**common)


@pytest.fixture(scope="session")
def rehearsed(null_gpu: Path, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """All rehearsals in one process: a minute of importing torch otherwise."""
    folder = tmp_path_factory.mktemp("rehearsed")
    beton = folder / "x.beton"
    ran = run_program("tools/convert.py", "ffcv", digits.folder / "train", beton, "--workers", 1)
    assert ran.code == 0, ran.err
    return finish(start(null_gpu, folder, rehearsals(digits, beton, folder)), folder)


def check(name: str, found: Found, *, ranks: int = 1) -> None:
    assert found["error"] is None, f"{name}: {found['error']}"
    assert found["steps"] >= 3, (name, found)
    assert found["elsewhere"] == {}, (name, "calls on another GPU than the rank's own")
    steady = [each[1:] for each in found["found"] if each[0] == "steady"]
    assert not [each for each in steady if each[0] == "copy_to_gpu_pageable"], (name, steady)
    if ranks > 1:
        return  # DDP times its first ten steps, and waits for that; a vote to stop is waited for some steps later
    waits = [each for each in steady if each[0] in ("wait_stream", "wait_device", "wait_event", "copy_blocking")]
    main = [each for each in waits if each[1] == "main"]
    assert sum(each[3] for each in main) == found["lines"], (name, "waits, beside one a line of metrics", main)
    assert not [each for each in waits if each[1] == "beside" and "_store_arrived" not in each[2]], (name, waits)


def test_a_steady_step_waits_for_nothing_but_a_line_of_metrics(rehearsed: dict[str, Found]) -> None:
    """Nor does it copy from pageable memory, or meet tensors of two devices, in any way of training."""
    for name, found in rehearsed.items():
        check(name, found)


def test_memory_does_not_grow_from_epoch_to_epoch(rehearsed: dict[str, Found]) -> None:
    reserved = rehearsed["resident, fp32, 20 epochs"]["reserved"]
    assert len(reserved) == 19 and len(set(reserved[2:])) == 1, reserved


def test_features_held_on_the_device_do_not_travel(rehearsed: dict[str, Found]) -> None:
    def bytes_per_step(name: str) -> float:
        return float(rehearsed[name]["bytes_to_gpu"] / rehearsed[name]["steps"])

    batch = 100 * 64 * 2  # rows of features in fp16, bytes
    # the prefetcher may have copied up to its depth of batches before the steps that are watched
    assert rehearsed["cached on the host, tiled"]["bytes_to_gpu"] >= 2 * batch
    assert bytes_per_step("cached on the device, masked") < batch


def test_two_ranks_keep_to_their_own_gpus(null_gpu: Path, digits: Digits, tmp_path: Path) -> None:
    files = {
        "train": str(digits.folder / "train"),
        "val": str(digits.folder / "val"),
        "backend": "torch",
        "workers": 1,
    }
    sizes = {**files, "batch_size": 499}  # and a batch of one row: the other rank has none
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        (folder := tmp_path / f"rank-{rank}").mkdir()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        more = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NULL_GPU_DEVICES": "2"}
        run = tree(digits, folder / "run", teacher={"mode": "online"}, data=sizes, train={"epochs": 6})
        processes.append((start(null_gpu, folder, {"online": run}, **more), folder))
    for process, folder in processes:
        for name, found in finish(process, folder).items():
            check(f"{folder.name}, {name}", found, ranks=2)
