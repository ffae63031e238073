"""Going on with a run: under which other config, from which checkpoint, and in whose folder."""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH, ROOT, Digits, metric_lines, run_program

from fastdcd import checkpoint

TRAIN = "fastdcd/train.py"
Sections = dict[str, dict[str, Any]]
PLAIN: Sections = {
    "teacher": {"mode": "none"},
    "data": {"batch_size": 100},
    "schedule": {"name": "step", "milestones": [1], "warmup": 0},
    "train": {"epochs": 3, "checkpoint_every": 1, "keep_checkpoints": 20, "log_every": 1},
}


@pytest.fixture(scope="module")
def stopped(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps an epoch that was stopped after 7, and its config x.yaml."""
    folder = tmp_path_factory.mktemp("stopped")
    file = digits.file(folder / "x.yaml", **PLAIN)
    ran = run_program(TRAIN, "--config", file, "--set", "train.max_steps=7")
    assert ran.code == 0, ran.err
    return folder


def again(stopped: Path, folder: Path, *settings: str, resume: str = "auto") -> Any:
    """Go on with a copy of it for a step, unless the settings say otherwise."""
    shutil.copytree(stopped / "run", folder / "run")
    settings = (f"run.dir={folder}/run", "train.max_steps=8", *settings)
    return run_program(TRAIN, "--config", stopped / "x.yaml", "--resume", resume, "--set", *settings)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- a full disk


def test_a_checkpoint_that_finds_no_room_keeps_those_before_it(stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped / "run", run)
    there = snapshot(run / "checkpoints")
    resume = (
        TRAIN,
        "--config",
        stopped / "x.yaml",
        "--resume",
        "auto",
        "--set",
        f"run.dir={run}",
        "train.max_steps=8",
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # to the file system a full disk: it takes no more
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(map(len, there.values())) - 1000, limits[1]))
    try:
        ran = run_program(*resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 1 and ran.err.count("\n") == 1, ran.err
    assert f"{run}/checkpoints/step-000000008.pt: no space left" in ran.err
    assert "free some space and resume with --resume auto" in ran.err
    assert snapshot(run / "checkpoints") == there
    ran = run_program(*resume)
    assert ran.code == 0 and "step-000000007.pt" in ran.out, ran.err


# ---- another config

# what is changed, and what the one line has: both values
REFUSED: dict[str, list[str]] = {
    "data.batch_size=64": ["data.batch_size 100 there, 64 now"],
    "data.batch_size=500": ["data.batch_size 100 there, 500 now"],
    "data.order=sequential": ['data.order "random" there, "sequential" now'],
    "views.seed=3": ["views.seed 0 there, 3 now"],
    "views.padding=2": ["views.padding 1 there, 2 now"],
    "views.flip=0.1": ["views.flip 0.5 there, 0.1 now"],
    "views.count=1": ["views.count 0 there, 1 now"],
    "run.seed=1": ["run.seed 0 there, 1 now"],
    "optim.name=adamw": ['optim.name "sgd" there, "adamw" now'],
    "optim.weight_decay=0.1": ["optim.weight_decay 0.0005 there, 0.1 now"],
    "optim.momentum=0.5": ["optim.momentum 0.9 there, 0.5 now"],
    "optim.lr=0.2": ["optim.lr 0.1 there, 0.2 now"],
    "schedule.name=cosine": ['schedule.name "step" there, "cosine" now'],
    "schedule.gamma=0.5": ["schedule.gamma 0.1 there, 0.5 now"],
    "schedule.milestones=[0.4]": ["schedule.milestones [1.0] there, [0.4] now"],
    "student.image_size={0: 8, 1: 6}": ["student.image_size 8 there"],
    "train.accumulate=2": ["train.accumulate 1 there, 2 now"],
    "train.clip=1.0": ["train.clip 0.0 there, 1.0 now"],
    "train.precision=bf16": ['train.precision "fp32" there, "bf16" now'],
    "loss.label_smoothing=0.1": ["loss.label_smoothing 0.0 there, 0.1 now"],
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_of_what_was_trained_is_refused(stopped: Path, tmp_path: Path, change: str) -> None:
    ran = again(stopped, tmp_path, change)
    assert ran.code == 2 and "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "step-000000007.pt" in lines[0]
    for words in REFUSED[change]:
        assert words in lines[0]
    assert snapshot(tmp_path / "run").keys() == {
        name.replace(str(stopped), str(tmp_path)) for name in snapshot(stopped / "run")
    }


def test_data_and_teacher_are_compared_as_they_are(digits: Digits, stopped: Path, tmp_path: Path) -> None:
    ran = again(stopped, tmp_path, f"data.train={digits.resident / 'val'}")
    assert ran.code == 2 and "digest of names, labels and sizes in data.train" in ran.err, ran.err
    shutil.copytree(digits.resident / "train", tmp_path / "elsewhere")
    (tmp_path / "2").mkdir()
    assert again(stopped, tmp_path / "2", f"data.train={tmp_path / 'elsewhere'}").code == 0, "the same, moved"
    (tmp_path / "3").mkdir()
    other = ["data.backend=torch", *(f"data.{part}={digits.folder / part}" for part in ("train", "val"))]
    ran = again(stopped, tmp_path / "3", *other, "data.workers=0")
    assert ran.code == 2 and "data.backend: resize bilinear" in ran.err, ran.err


# what leaves the steps that are done as they were, and whether it is said
TAKEN: dict[str, bool] = {
    "train.epochs=4": True,  # no rate of a step schedule depends on them
    "schedule.milestones=[1, 2.5]": True,
    "student.image_size={0: 8, 2: 6}": True,
    "train.log_every=3": True,
    "data.workers=1": True,
    "eval.batch_size=50": True,
    "loss.form=naive": True,
    "views.scale=[0.5, 1.0]": True,  # not of this family
    "teacher.model=cifar:resnet14": True,  # there is none
    "train.max_steps=9": False,
}


@pytest.mark.parametrize("change", TAKEN)
def test_a_change_of_what_comes_is_taken_and_said(stopped: Path, tmp_path: Path, change: str) -> None:
    ran = again(stopped, tmp_path, change)
    assert ran.code == 0, ran.err
    assert (f"{change.partition('=')[0]}: " in ran.out) == TAKEN[change] and "from step" not in ran.err


def test_more_epochs_are_what_they_would_have_been(stopped: Path, digits: Digits, tmp_path: Path) -> None:
    assert again(stopped, tmp_path, "train.epochs=4", "train.max_steps=0").code == 0
    file = digits.file(tmp_path / "x.yaml", **{**PLAIN, "run": {"dir": str(tmp_path / "whole")}})
    assert run_program(TRAIN, "--config", file, "--set", "train.epochs=4").code == 0
    found, exact = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("run", "whole"))
    assert found == exact


def test_checkpoints_of_older_versions_are_resumed(stopped: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    state = torch.load(stopped / "run" / "checkpoints" / "step-000000007.pt", weights_only=True)
    del state["config"], state["origin"]
    torch.save(state, path)
    ran = again(stopped, tmp_path, resume=str(path))
    assert ran.code == 0 and "config it was made with is not compared" in ran.out, ran.err
    state["progress"]["step_in_epoch"] = 6
    torch.save(state, path)
    shutil.rmtree(tmp_path / "run")
    ran = again(stopped, tmp_path, resume=str(path))
    assert ran.code == 2 and "an epoch has 5 steps now: data.batch_size" in ran.err, ran.err


# ---- damaged files


def test_the_checkpoint_before_a_damaged_one_is_taken(stopped: Path, digits: Digits, tmp_path: Path) -> None:
    whole = again(stopped, tmp_path, "train.max_steps=0")
    assert whole.code == 0
    exact = (tmp_path / "run" / "student.safetensors").read_bytes()
    for name, spoil in {
        "cut": lambda data: data[:3000],
        "empty": lambda data: b"",
        "other": lambda data: b"x" * 99,
    }.items():
        broken = tmp_path / name
        shutil.copytree(stopped / "run", broken / "run")
        newest = broken / "run" / "checkpoints" / "step-000000007.pt"
        newest.write_bytes(spoil(newest.read_bytes()))
        settings = (f"run.dir={broken}/run", "train.max_steps=0")
        ran = run_program(TRAIN, "--config", stopped / "x.yaml", "--resume", "auto", "--set", *settings)
        assert ran.code == 0 and "step-000000007.pt" in ran.out and "step-000000006.pt taken instead" in ran.out, (
            ran
        )
        assert (broken / "run" / "student.safetensors").read_bytes() == exact
        assert newest.with_name(f"{newest.name}.damaged").exists(), "nothing is deleted"


def test_damaged_checkpoints_only(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1000])
    settings = ["--set", f"run.dir={tmp_path}/run"]
    ran = run_program(TRAIN, "--config", stopped / "x.yaml", "--resume", "auto", *settings)
    assert ran.code == 2 and "step-000000007.pt" in ran.err and "so are the 6 older" in ran.err, ran.err
    one = tmp_path / "run" / "checkpoints" / "step-000000006.pt"
    ran = run_program(TRAIN, "--config", stopped / "x.yaml", "--resume", one, *settings)
    assert ran.code == 2 and "step-000000006.pt" in ran.err and len(list(one.parent.iterdir())) == 7, ran.err


def same(found: Any, exact: Any) -> bool:
    if isinstance(exact, torch.Tensor):
        return torch.equal(found, exact)
    if isinstance(exact, dict):
        return found.keys() == exact.keys() and all(same(found[key], exact[key]) for key in exact)
    if isinstance(exact, list | tuple):
        return len(found) == len(exact) and all(map(same, found, exact))
    return bool(found == exact)


def test_no_byte_of_a_checkpoint_changes_in_silence(stopped: Path, tmp_path: Path) -> None:
    """100 bits flipped, one at a time, half of them outside the tensors' bytes: refused, or the very same state."""
    path = stopped / "run" / "checkpoints" / "step-000000007.pt"
    whole, exact = path.read_bytes(), checkpoint.read(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        pickle = archive.getinfo(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    chosen, refused = random.Random(18), 0
    places = [chosen.randrange(len(whole)) for _ in range(50)]
    places += [chosen.randrange(directory, len(whole)) for _ in range(30)]
    places += [pickle.header_offset + chosen.randrange(pickle.file_size) for _ in range(20)]
    for place in places:
        changed = tmp_path / "changed.pt"
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chosen.randrange(8)]) + whole[place + 1 :])
        try:
            found = checkpoint.read(changed)
        except ValueError as error:
            assert str(changed) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert same(found.state, exact.state) and found.progress == exact.progress, place
            assert (found.config, found.origin) == (exact.config, exact.origin)
    assert refused > 50


def test_made_up_checkpoints_are_one_line(stopped: Path, tmp_path: Path) -> None:
    path = stopped / "run" / "checkpoints" / "step-000000007.pt"
    state = torch.load(path, weights_only=True)
    made_up = {
        "a list": [1, 2],
        "nothing": None,
        "no progress": {key: value for key, value in state.items() if key != "progress"},
        "progress of texts": {**state, "progress": {"epoch": "1"}},
        "progress below 0": {**state, "progress": {**state["progress"], "step": -1}},
        "progress without end": {**state, "progress": {**state["progress"], "step": 10**30}},
        "origin of numbers": {**state, "origin": {"a": 1}},
    }
    for name, value in made_up.items():
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="not a checkpoint of fastdcd, or damaged"):
            pytest.fail(f"{name}: {checkpoint.read(tmp_path / 'x.pt')}")
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for each in there.namelist():
            packed.writestr(each, there.read(each))
    with pytest.raises(ValueError, match="compressed"):
        checkpoint.read(tmp_path / "x.pt")
    part_value: Any
    for part, part_value in (("module", 3), ("optimizer", {}), ("random", {"cpu": torch.zeros(3)}), ("scaler", 3)):
        torch.save({**state, part: part_value}, tmp_path / "x.pt")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ran = again(stopped, tmp_path, resume=str(tmp_path / "x.pt"))
        assert "Traceback" not in ran.err and ran.code == (0 if part == "scaler" else 2), (part, ran.err)


def test_a_damaged_line_of_metrics_is_left_out_by_name(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(
            b"\0\0\0\n\xff\xfe\n[1]\n{}\n" + b"[" * 5000 + b"\n" + b'{"kind": "train", "step": "a"}\n{"kind": "tr'
        )
    ran = run_program("tools/report.py", tmp_path / "run", "--html", tmp_path / "x.html")
    lines = (stopped / "run" / "metrics.jsonl").read_text().count("\n")
    assert ran.code == 2 and f"metrics.jsonl: line {lines + 1} is damaged" in ran.err
    settings = ["--set", f"run.dir={tmp_path}/run", "train.max_steps=8"]
    ran = run_program(TRAIN, "--config", stopped / "x.yaml", "--resume", "auto", *settings)
    assert ran.code == 0 and f"metrics.jsonl: line {lines + 1} is damaged and is left out" in ran.err, ran.err
    assert [line["step"] for line in metric_lines(tmp_path / "run", "train")] == list(range(1, 9))


# ---- one run a folder


def test_a_folder_is_held_by_one_run(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", **{**PLAIN, "train": {"epochs": 100_000, "log_every": 1}})
    command = [sys.executable, str(ROOT / TRAIN), "--config", str(file)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 3):
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        for resume in ("auto", "none"):
            ran = run_program(TRAIN, "--config", file, "--resume", resume)
            assert ran.code == 2 and "another run is writing there" in ran.err and "run.dir" in ran.err
    finally:
        first.terminate()
        out, _ = first.communicate(timeout=30)
    assert first.returncode == 0, out
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if line["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_mistake_leaves_no_folder(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", data={"train": "/no/such"}, loss=BOTH, teacher={"mode": "online"})
    assert run_program(TRAIN, "--config", file).code == 2
    assert not (tmp_path / "run").exists()
