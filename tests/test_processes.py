"""Training on several processes and machines: the same numbers, whatever their number, and whoever is lost."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from accelerate import Accelerator
from conftest import BOTH, ROOT, Digits, absent, metric_lines, run_program
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastdcd import config, experiment
from fastdcd.guard import GuardedOptimizer, flatten_buffers
from fastdcd.optim import build_optimizer
from fastdcd.train import train

# A server that has imported everything forks each process: torch alone takes seconds to import.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["fastdcd.train", "fastdcd.cache.fill", "torch._dynamo"])  # DDP imports the last

# A student whose result does not depend on how a batch is shared out, and one that spoils steps.
STUDENTS = """
import os
import torch
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))

class Faulty(nn.Module):
    def __init__(self, num_classes, bad):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, num_classes)
        self.bad, self.calls = bad, 0
    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls in self.bad and os.environ.get("RANK", "0") == os.environ.get("BAD_RANK", "0"):
                x = torch.cat([x[:1] * float("inf"), x[1:]])
        return self.head(self.body(x))

def second(num_classes):
    return Faulty(num_classes, {2})

def always(num_classes):
    return Faulty(num_classes, range(10**9))
"""


@pytest.fixture
def students(tmp_path: Path) -> Path:
    path = tmp_path / "students.py"
    path.write_text(STUDENTS)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(count: int, target: Callable[..., None], *arguments: Any) -> list[Any]:
    """`target` on `count` processes that know each other."""
    port = free_port()
    processes = [
        FORK.Process(target=ranks.as_rank, args=(rank, count, port, target, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def run(count: int, target: Callable[..., None], *arguments: Any) -> None:
    processes = start(count, target, *arguments)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_those_of_one_process(count: int) -> None:
    run(count, ranks.gradients_equal, {torch.float64: 1e-12, torch.float32: 1e-6})


# ---- training -----------------------------------------------------------------------------------------------------


def states(run_dir: Path, count: int) -> list[dict[str, Tensor]]:
    return [torch.load(run_dir / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def loss_lines(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(run_dir, "train")]


def test_any_number_of_processes_trains_alike(digits: Digits, students: Path, tmp_path: Path) -> None:
    """2 processes, then 4, then 1 resume each other: losses are those of one process all along. Every epoch's last
    batch has one row, so that all processes but one have none of it; and all end bit-identical to each other."""
    files = {}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        files[name] = digits.file(
            tmp_path / name / "x.yaml",
            student={"model": f"{students}:plain"},
            loss={**BOTH, "mask_same_class": True},
            teacher={"mode": "online"},
            data={"batch_size": 499},
            train={"epochs": 5},
        )
    run(1, ranks.run_training, files["whole"], [])
    parts = tmp_path / "parts" / "run"
    for count, steps in ((2, 3), (4, 7), (1, 0)):
        run(count, ranks.run_training, files["parts"], ["train.resume=auto", f"train.max_steps={steps}"])
        first, *others = states(parts, count)
        assert any(name.endswith("log_tau") for name in first)
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    exact = loss_lines(tmp_path / "whole" / "run")
    assert len(exact) == 10 and loss_lines(parts) == pytest.approx(exact, rel=1e-5)
    ours, theirs = (
        metric_lines(folder / "run", "eval")[-1] for folder in (tmp_path / "parts", tmp_path / "whole")
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name in ("whole", "parts"):
        summary = json.loads((tmp_path / name / "run" / "summary.json").read_text())
        assert summary["teacher_images"] == 5 * 500, "of all processes"


def test_sync_bn_says_where_it_works(digits: Digits, tmp_path: Path) -> None:
    class TwoProcesses(Accelerator):
        num_processes = 2

    cfg = digits.config(tmp_path / "run", student={"sync_bn": True}, teacher={"mode": "none"})
    with pytest.raises(ValueError, match=r"student\.sync_bn: got true, but torch has it on GPUs only"):
        experiment.build_student(cfg, 10, None, TwoProcesses(cpu=True))


# ---- steps that are skipped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw", "timm:sgd", "timm:lion"])  # fused ones, and any others
@pytest.mark.parametrize("bad_first", [False, True])
def test_a_skipped_step_leaves_no_trace(name: str, bad_first: bool) -> None:
    """Weights, momentum and BatchNorm statistics: as if the bad batch had not been there, bit for bit."""
    settings = config.Optim(name=name, lr=0.1, weight_decay=0.1, momentum=0.9 if "sgd" in name else 0.0)

    def train_on(batches: list[Tensor]) -> tuple[nn.Module, GuardedOptimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        accelerator = Accelerator(cpu=True)
        module, optimizer = accelerator.prepare(module, build_optimizer(module, settings))
        guard = GuardedOptimizer(module, optimizer, accelerator, limit=2)
        for batch in batches:
            optimizer.zero_grad()
            guard.remember()
            module(batch).square().mean().backward()
            guard.step()
        return module, guard

    torch.manual_seed(1)
    good = list(torch.randn(5, 16, 4).unbind())
    bad = torch.cat([good[0][:15], torch.full((1, 4), float("nan"))])
    exact, _ = train_on(good)
    found, guard = train_on([bad, *good] if bad_first else [*good[:3], bad, *good[3:]])
    for name, value in found.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, exact.state_dict()[name]), name
    counts = {name: float(value) for name, value in guard.take().items()}
    assert counts == {"skipped_steps": 1, "skipped_in_a_row": 1}
    assert all(value == 0 for value in guard.take().values())
    guard.check(1)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        guard.check(2)


def test_skipping_costs_a_few_calls_whatever_the_depth() -> None:
    """The host issues as many for 50 layers of BatchNorm as for one; buffers keep their names and values."""
    counts = []
    for layers in (1, 50):
        module = nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(layers)))
        each: Any
        for each in module:
            each.running_mean.uniform_()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        flatten_buffers(module)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
        guard = GuardedOptimizer(module, optimizer, Accelerator(cpu=True), limit=2)
        module(torch.randn(16, 6)).square().mean().backward()
        optimizer.step = lambda: None  # type: ignore[method-assign,assignment,misc]  # what the optimizer does is not the guard's
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            guard.remember()
            guard.step()
        counts.append(sum(each.count for each in recorded.key_averages() if each.key.startswith("aten::")))
    assert counts[0] == counts[1] < 40


def test_all_processes_skip_a_step_that_is_bad_on_one(digits: Digits, students: Path, tmp_path: Path) -> None:
    sections = {"student": {"model": f"{students}:second"}, "loss": BOTH, "teacher": {"mode": "online"}}
    file = digits.file(tmp_path / "x.yaml", train={"max_steps": 3}, **sections)
    run(2, ranks.with_bad_rank, "1", file)
    first, second = states(tmp_path / "run", 2)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert all(value.isfinite().all() for value in first.values())
    lines = metric_lines(tmp_path / "run", "train")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0]
    assert [line["loss"] is None for line in lines] == [False, True, False]
    for line in lines:
        assert len(line["data_wait_ranks"]) == 2 and all(0 <= each <= 1 for each in line["data_wait_ranks"])


def test_a_run_that_only_skips_ends(digits: Digits, students: Path, tmp_path: Path) -> None:
    sections = {"student": {"model": f"{students}:always"}, "teacher": {"mode": "none"}}
    file = digits.file(tmp_path / "x.yaml", train={"max_skipped": 4, "log_every": 3}, **sections)
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 1 and "6 steps in a row had a gradient that is not finite" in ran.err
    assert "Traceback" not in ran.err and "optim.lr" in ran.err


@pytest.mark.parametrize("count", [1, 2])
def test_steps_do_not_wait_for_the_device(digits: Digits, tmp_path: Path, count: int) -> None:
    """Counted: reads of numbers from tensors. They do not grow with the steps, and by one with a line logged."""

    def reads(name: str, *, steps: int, log_every: int) -> int:
        (tmp_path / name).mkdir()
        settings = {"max_steps": steps, "log_every": log_every}
        file = digits.file(tmp_path / name / "x.yaml", loss=BOTH, teacher={"mode": "online"}, train=settings)
        run(count, ranks.count_reads, file)
        found = [int(each.read_text()) for each in sorted((tmp_path / name).glob("reads-*"))]
        assert len(found) == count
        return found[0]

    few = reads("few", steps=2, log_every=100)
    assert reads("more", steps=7, log_every=100) == few
    assert reads("lines", steps=7, log_every=2) == few + 3


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_a_fill_on_2_processes_goes_on_on_3(digits: Digits, tmp_path: Path) -> None:
    files = {}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        files[name] = digits.file(
            tmp_path / name / "x.yaml",
            loss=BOTH,
            teacher={"mode": "cached"},
            views={"count": 12},
            cache={"path": str(tmp_path / name / "cache")},
        )
    run(1, ranks.run_fill, files["whole"])
    processes = start(2, ranks.run_fill, files["parts"])
    cache = tmp_path / "parts" / "cache"
    while not (cache / "view-003.done.npy").exists():
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    assert not (cache / "view-011.crc32.npy").exists(), "the kill came too late to test anything"
    run(3, ranks.run_fill, files["parts"])
    names = sorted(path.name for path in (tmp_path / "whole" / "cache").iterdir() if path.suffix != ".lock")
    assert len(names) > 24
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / "whole" / "cache" / name).read_bytes(), name


def test_a_checkpoint_waits_for_the_rows_of_all_processes(digits: Digits, tmp_path: Path) -> None:
    """Else a crash after it would leave rows of its steps unmarked, and with a view an epoch nobody fills them again."""
    file = digits.file(
        tmp_path / "x.yaml",
        loss=BOTH,
        teacher={"mode": "fill"},
        cache={"path": str(tmp_path / "cache")},
        train={"max_steps": 3},
    )
    run(2, ranks.fill_with_a_slow_rank, file)
    assert int((tmp_path / "done").read_text()) == 3 * 64


KILLS = int(os.environ.get("FASTDCD_KILLS", "3"))


@pytest.mark.timeout(600)
def test_two_processes_survive_kills(digits: Digits, students: Path, tmp_path: Path) -> None:
    """Both are killed, one before the other, while they train and fill their cache: all ends as if nothing had
    happened, bit for bit."""
    moments, epochs, views = random.Random(2407), 12, 8
    files = {}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        files[name] = digits.file(
            tmp_path / name / "x.yaml",
            student={"model": f"{students}:plain"},
            loss=BOTH,
            teacher={"mode": "fill"},
            views={"count": views},
            cache={"path": str(tmp_path / name / "cache")},
            train={"epochs": epochs, "checkpoint_every": 2},
            eval={"every": 4},
        )
    run(2, ranks.run_training, files["whole"], [])
    checkpoints = tmp_path / "parts" / "run" / "checkpoints"
    for number in range(KILLS):
        step = int((number + moments.random()) / (KILLS + 1) * epochs * 8)
        processes = start(2, ranks.run_training, files["parts"], ["train.resume=auto"])
        while all(each.is_alive() for each in processes) and newest_step(checkpoints) <= step:
            time.sleep(0.001)
        for process in moments.sample(processes, 2):
            time.sleep(moments.uniform(0, 0.02))
            assert process.is_alive() or process.exitcode, "it ended before it was killed"
            process.kill()
        for process in processes:
            process.join(60)
    run(2, ranks.run_training, files["parts"], ["train.resume=auto"])
    for pattern in ("run/student.safetensors", "cache/view-*", "cache/manifest.json"):
        found = {path.name: path.read_bytes() for path in (tmp_path / "parts").glob(pattern)}
        assert found and found == {path.name: path.read_bytes() for path in (tmp_path / "whole").glob(pattern)}
    ours, theirs = (tmp_path / name / "run" for name in ("parts", "whole"))
    assert metric_lines(ours, "eval") == metric_lines(theirs, "eval")
    summaries = [json.loads((each / "summary.json").read_text()) for each in (ours, theirs)]
    assert summaries[0]["teacher_images"] == summaries[1]["teacher_images"] == views * 500


def newest_step(checkpoints: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in checkpoints.glob("step-*.pt")), default=0)


# ---- launchers ----------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """As a user's shell, with this Python's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def last_step(run_dir: Path) -> int:
    lines = metric_lines(run_dir, "train") if (run_dir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


@pytest.mark.timeout(200)
def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    digits: Digits, students: Path, tmp_path: Path
) -> None:
    """torchrun starts anew once by itself; lost once more, all end with a word; --resume auto goes on from there."""
    file = digits.file(
        tmp_path / "x.yaml",
        student={"model": f"{students}:plain"},
        teacher={"mode": "none"},
        train={"epochs": 10_000, "checkpoint_every": 5, "log_every": 5},
        eval={"every": 10_000},
    )
    run_dir = tmp_path / "run"
    command = ["torchrun", "--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}"]
    command += [str(ROOT / "fastdcd" / "train.py"), "--config", str(file), "--resume", "auto"]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: last_step(run_dir) >= 20, process, 60)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        lost_at = last_step(run_dir)
        wait_for(lambda: last_step(run_dir) >= lost_at + 100, process, 60)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        begin = time.monotonic()
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - begin < 45
    finally:
        process.kill()
    assert "resumed from" in out, "by itself"
    assert "another process of this run was lost" in out and "--resume auto" in out
    lost_at = last_step(run_dir)
    ran = run_program(
        "fastdcd/train.py", "--config", file, "--resume", "auto", "--set", f"train.max_steps={lost_at + 9}"
    )
    assert ran.code == 0 and "resumed from" in ran.out, ran.err
    steps = [line["step"] for line in metric_lines(run_dir, "train")]
    assert steps == sorted(set(steps)) and lost_at - 5 <= steps[-1] <= lost_at + 9


def test_a_signal_to_one_process_stops_all(digits: Digits, students: Path, tmp_path: Path) -> None:
    """At once, in the middle of an epoch and between two lines of metrics."""
    file = digits.file(
        tmp_path / "x.yaml",
        student={"model": f"{students}:plain"},
        teacher={"mode": "none"},
        data={"batch_size": 2},
        train={"epochs": 1000, "log_every": 100_000, "checkpoint_every": 5, "keep_checkpoints": 1},
        eval={"every": 1000},
    )
    processes = start(2, ranks.run_training, file, [])
    end, checkpoints = time.monotonic() + 60, tmp_path / "run" / "checkpoints"
    while not any(checkpoints.glob("step-*.pt")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    (saved,) = checkpoints.iterdir()
    step = int(saved.stem.split("-")[1])
    assert step < 250, "an epoch"
    run(1, ranks.run_training, file, ["train.resume=auto", f"train.max_steps={step + 3}"])


LAUNCHERS = {
    "accelerate, one process": ["accelerate", "launch", "--cpu", "--num_processes", "1"],
    "accelerate, two processes": [
        "accelerate",
        "launch",
        "--config_file",
        str(ROOT / "configs/accelerate/cpu_2.yaml"),
    ],
    "torchrun": ["torchrun", "--nproc_per_node=2"],
}


def launch(name: str, file: Path) -> "subprocess.Popen[str]":
    port = {"torchrun": "--master_port"}.get(name, "--main_process_port")
    command = [*LAUNCHERS[name], port, str(free_port()), str(ROOT / "fastdcd" / "train.py"), "--config", str(file)]
    return subprocess.Popen(
        command, env=environment(), cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_end_with_our_message(digits: Digits, tmp_path: Path, name: str) -> None:
    file = digits.file(tmp_path / "x.yaml", data={"train": "/no/such"}, teacher={"mode": "none"})
    process = launch(name, file)
    out, _ = process.communicate(timeout=100)
    said = "train.py: error: data.train: /no/such: no such file or folder"
    assert process.returncode == 1 and out.count(said) == 1, out
    words = [line for line in out.splitlines() if line.strip("= ")]
    assert words[-1].endswith(said), out


@pytest.mark.parametrize("name", ["accelerate, one process", "torchrun"])
def test_a_signal_to_the_launcher_stops_and_saves(
    digits: Digits, students: Path, tmp_path: Path, name: str
) -> None:
    file = digits.file(
        tmp_path / "x.yaml",
        student={"model": f"{students}:plain"},
        teacher={"mode": "none"},
        data={"batch_size": 2},
        train={"epochs": 1000, "log_every": 100, "checkpoint_every": 5, "keep_checkpoints": 1},
        eval={"every": 1000},
    )
    process = launch(name, file)
    wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*.pt")), process, 150)
    process.terminate()
    out, _ = process.communicate(timeout=60)  # the pipe ends with the last process
    assert "everything is saved" in out, out
    assert not (tmp_path / "run" / "run.lock").exists()


def test_every_accelerate_config_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    found = {file.stem: load_config_from_file(str(file)) for file in files}
    sizes = {name: (each.num_machines, each.num_processes) for name, each in found.items()}
    assert sizes == {
        "cpu": (1, 1),
        "cpu_2": (1, 2),
        "cpu_two_machines": (2, 2),
        "gpu": (1, 1),
        "gpu_8": (1, 8),
        "gpu_two_machines": (2, 16),
    }


@pytest.fixture
def small(digits: Digits, students: Path, tmp_path: Path) -> tuple[Path, list[float]]:
    """A config of one epoch, and the losses of one process."""
    sections: dict[str, Any] = {
        "student": {"model": f"{students}:plain"},
        "loss": BOTH,
        "teacher": {"mode": "online"},
        "train": {"epochs": 1},
    }
    train(digits.config(tmp_path / "one", **sections))
    return digits.file(tmp_path / "x.yaml", **sections), loss_lines(tmp_path / "one")


def test_two_processes_by_accelerate_launch(small: tuple[Path, list[float]], tmp_path: Path) -> None:
    command = ["accelerate", "launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    command += [
        "--main_process_port",
        str(free_port()),
        str(ROOT / "fastdcd" / "train.py"),
        "--config",
        str(small[0]),
    ]
    ran = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("done:") == 1, "one run, not two"
    assert loss_lines(tmp_path / "run") == pytest.approx(small[1], rel=1e-5)


UNFINISHED = """
import torch
from torch import distributed, nn
from fastdcd import cli

def main():
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    nn.parallel.DistributedDataParallel(nn.Linear(4, 4))(torch.ones(2, 4)).sum().backward()
    for _ in range(1000):  # more than gloo's threads are done with when the program ends
        distributed.all_reduce(torch.ones(3), async_op=True)
    distributed.destroy_process_group()
    print("all of main")
    return 0

cli.run(main)
"""


def test_a_program_that_is_done_does_not_abort(tmp_path: Path) -> None:
    """Gloo's threads, left behind by DDP, abort a process whose interpreter goes down (pytorch#179291)."""
    (tmp_path / "program.py").write_text(UNFINISHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(tmp_path / "program.py")]
    ran = subprocess.run(
        command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("all of main") == 2


def test_slurm_script(small: tuple[Path, list[float]], tmp_path: Path) -> None:
    """The script as it is, SLURM's own programs replaced: two processes on one node."""
    stubs = {"srun": 'shift; exec env SLURM_NODEID=0 "$@"', "scontrol": "echo 127.0.0.1"}
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
        stub.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(free_port())}
    settings = environment(**slurm, SLURM_SUBMIT_DIR=str(ROOT), PROCESSES_PER_NODE="2")
    settings["PATH"] = f"{tmp_path / 'bin'}:{settings['PATH']}"
    script = [str(ROOT / "configs" / "accelerate" / "slurm.sh"), "--config", str(small[0])]
    ran = subprocess.run(script, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert loss_lines(tmp_path / "run") == pytest.approx(small[1], rel=1e-5)


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces, addresses 10.77.0.1 and 10.77.0.2, joined by a cable; gone afterwards."""
    names = [f"fastdcd-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"fd{os.getpid() % 100_000}{end}" for end in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "link", "set", cable, "name", "eth0")
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove_machines(names, cables)
        absent(f"no network namespaces here: {error}")
    yield names
    remove_machines(names, cables)


def remove_machines(names: list[str], cables: list[str]) -> None:
    for command in (["link", "delete", cables[0]], *(["netns", "delete", name] for name in names)):
        with suppress(OSError):
            subprocess.run(["ip", *command], capture_output=True)


def test_two_machines(small: tuple[Path, list[float]], two_machines: list[str], tmp_path: Path) -> None:
    """accelerate launch with the shipped config on two machines with their own addresses."""
    launched = []
    for rank, machine in enumerate(two_machines):
        command = ["ip", "netns", "exec", machine, "accelerate", "launch"]
        command += ["--config_file", str(ROOT / "configs/accelerate/cpu_two_machines.yaml")]
        command += ["--machine_rank", str(rank), "--main_process_ip", "10.77.0.1"]
        command += [str(ROOT / "fastdcd" / "train.py"), "--config", str(small[0])]
        settings = environment(GLOO_SOCKET_IFNAME="eth0")
        launched.append(
            subprocess.Popen(
                command, env=settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        ended = [(process.communicate(timeout=120)[0], process.returncode) for process in launched]
    finally:
        for process in launched:
            process.kill()
    assert [code for _, code in ended] == [0, 0], ended
    assert loss_lines(tmp_path / "run") == pytest.approx(small[1], rel=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
