"""Configs from strangers, and locks: bounded in time and memory, one line, nothing touched that is not ours."""

import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Digits

from fastdcd import config_file
from fastdcd.cache.store import TeacherCache
from pipelines.files import Lock

GOOD = "data: {train: a, val: b}\nstudent: {model: 'cifar:resnet8'}\n"


def aliases_of_aliases(levels: int) -> str:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


CONFIGS: dict[str, tuple[str, str]] = {
    "aliases of aliases": (aliases_of_aliases(12), "more than 10000 values"),
    "a node inside itself": ("data: &a [*a]", "more than 10000 values"),
    "nested deeply": ("data: " + "[" * 100_000, "nested more than 20 deep"),
    "nested deeply in blocks": ("\n".join(" " * n + "a:" for n in range(400)), "nested more than 20 deep"),
    "many values": ("data: [" + "1," * 20_000 + "]", "more than 10000 values"),
    "large": ("# " + "x" * 300_000, "larger than 256 KiB"),
    "digits by the thousand": (GOOD + f"train: {{epochs: {'9' * 5000}}}", "a value cannot be read"),
    "more than memory": (GOOD + f"train: {{epochs: {'9' * 400}}}", "train.epochs"),
    "an image of a billion pixels": (GOOD.replace("model:", "image_size: 1000000, model:"), "student.image_size"),
    "workers by the million": (GOOD.replace("train: a", "train: a, workers: 1000000"), "data.workers"),
    "infinite": (GOOD + "optim: {lr: 1e400}", "optim.lr"),
    "not a number": (GOOD + "optim: {lr: .nan}", "optim.lr"),
    "base is a number": ("base: 3\n" + GOOD, "base: got 3, expected a path"),
    "base is a section": ("base: {a: b}\n" + GOOD, "base: got {'a': 'b'}, expected a path"),
    "base is nothing": ("base: ~\n" + GOOD, "base: got None, expected a path"),
    "base is a device": ("base: /dev/zero\n" + GOOD, "/dev/zero: not a file"),
    "base is a folder": ("base: .\n" + GOOD, "not a file"),
    "a date is a key": ("2026-01-01: 3\n" + GOOD, "the key '2026-01-01' is a date"),
    "a list is a key": ("? [a, b]\n: 3\n" + GOOD, "not valid YAML"),
    "yes is a key": (GOOD + "optim: {yes: 1}", "the key 'yes' is a bool"),
    "a date that is none": (GOOD + "run: {dir: 2026-13-45}", "a value cannot be read"),
    "a null character in a path": (GOOD.replace("train: a", 'train: "a\\0b"'), "null character"),
    "a home folder that is none": (
        GOOD.replace("train: a", "train: ~nobody-of-this-name/x"),
        "no such home folder",
    ),
    "a section is a number": (GOOD + "optim: 3", "optim"),
    "a section is empty": (GOOD + "optim:", "optim"),
    "code": ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    "not text": ("data: \udcff", "not a text in UTF-8"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_strangers(tmp_path: Path, name: str) -> None:
    text, says = CONFIGS[name]
    (tmp_path / "x.yaml").write_bytes(text.encode(errors="surrogateescape"))
    begin = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        config_file.load(tmp_path / "x.yaml")
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000 and time.perf_counter() - begin < 10


def test_bases_of_bases_end(tmp_path: Path) -> None:
    for level in range(9):
        (tmp_path / f"{level}.yaml").write_text(f"base: [{', '.join([f'{level + 1}.yaml'] * 9)}]")
    (tmp_path / "9.yaml").write_text(GOOD)
    with pytest.raises(ValueError, match="more than 100 files are its bases"):
        config_file.load(tmp_path / "0.yaml")


@pytest.mark.parametrize("override", ["=3", ".=3", "a.=3", "data..train=3", "data=3", "data.train.x=3", "train"])
def test_overrides_of_strangers(tmp_path: Path, override: str) -> None:
    (tmp_path / "x.yaml").write_text(GOOD)
    with pytest.raises(ValueError):
        config_file.load(tmp_path / "x.yaml", [override])


def test_any_byte_of_a_config_may_be_wrong(digits: Digits, tmp_path: Path) -> None:
    """100 bytes flipped, one at a time: each is a config, with a value that can be read in it, or one line."""
    chosen = random.Random(11)
    whole = digits.file(tmp_path / "x.yaml").read_bytes()
    exact = yaml.safe_load(whole)
    for _ in range(100):
        place, bit = chosen.randrange(len(whole)), 1 << chosen.randrange(8)
        (tmp_path / "x.yaml").write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            found = config_file.load(tmp_path / "x.yaml")
        except ValueError as error:
            assert str(tmp_path / "x.yaml") in str(error) or str(tmp_path) in str(error)
        else:
            assert 0 < found.train.epochs < 1e9 and math.isfinite(found.optim.lr)
            there = yaml.safe_load((tmp_path / "x.yaml").read_bytes())
            assert set(there) <= set(exact), "a section that is not known was taken"


# ---- paths


def test_home_folder_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "over.yaml").write_text("base: ~/x.yaml\nrun: {dir: ~/runs/a}\n")
    (tmp_path / "x.yaml").write_text(GOOD.replace("train: a", "train: ~/a"))
    found = config_file.load(
        Path(tmp_path / "over.yaml"), ["data.val=$HOME/b", "teacher.checkpoint=[~/t.pth]", "teacher.model=[x]"]
    )
    assert (found.data.train, found.data.val, found.run.dir) == (
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "runs/a",
    )
    assert found.teacher.checkpoint == (tmp_path / "t.pth",)


# ---- locks

HOLD = """
import os, sys, time
from pathlib import Path
from pipelines.files import Lock
lock = Lock(Path(sys.argv[1]), "taken")
if os.fork() == 0:
    time.sleep(60)  # a worker outlives a process that is killed
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="taken"):
            Lock(path, "taken")
        holder.kill()
        holder.wait()
        lock = Lock(path, "taken")
        with pytest.raises(ValueError, match="taken twice"):
            Lock(path, "taken twice")
        with pytest.raises(ValueError, match="taken twice"):
            Lock(path, "taken twice")
    finally:
        os.killpg(holder.pid, 9)
    lock.close()
    lock.close()
    assert not path.exists()
    Lock(path, "taken").close()


def test_locks_follow_no_links_and_change_no_files(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fill.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="link or no plain file"):
        TeacherCache.lock_for_filling(tmp_path / "cache")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "fill.lock")
    with pytest.raises(ValueError, match="link or no plain file"):
        TeacherCache.lock_for_filling(tmp_path / "fifo")
    (tmp_path / "folder" / "fill.lock").mkdir(parents=True)
    with pytest.raises(ValueError, match="link or no plain file"):
        TeacherCache.lock_for_filling(tmp_path / "folder")
    assert (tmp_path / "precious").read_text() == "keep me"
