"""The programs as users start them: by path, from anywhere, through Accelerate's launcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOTH, ROOT, Digits, run_program

PROGRAMS = sorted(path.relative_to(ROOT) for path in (ROOT / "tools").glob("[!_]*.py"))


def test_accelerate_launch_from_another_folder(digits: Digits, tmp_path: Path) -> None:
    file = digits.file(tmp_path / "x.yaml", loss=BOTH, teacher={"mode": "online"}, train={"epochs": 1})
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    program = [
        str(ROOT / "fastdcd" / "train.py"),
        "--config",
        "x.yaml",
        "--set",
        "run.dir=here",
        "train.max_steps=3",
    ]
    done = subprocess.run([*launcher, *program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "here" / "summary.json").read_text())["step"] == 3
    assert file.is_file()


@pytest.mark.parametrize("program", ["fastdcd/train.py", *map(str, PROGRAMS)])
def test_help_has_an_example(program: str) -> None:
    if program.endswith(("demo.py", ".sh")):
        pytest.skip("takes no arguments")
    ran = run_program(program, "--help")
    assert ran.code == 0 and "example" in ran.out


@pytest.mark.parametrize("program", ["fastdcd/train.py", *map(str, PROGRAMS)])
def test_no_program_shadows_a_library(program: str) -> None:
    """Run by path, a program's folder comes first in sys.path: a name like queue.py there would break torch."""
    from importlib.metadata import packages_distributions

    names = {path.stem for path in (ROOT / program).parent.glob("*.py")}
    names |= {path.name for path in (ROOT / program).parent.iterdir() if path.is_dir()}
    taken = names & (sys.stdlib_module_names | packages_distributions().keys() - {"fastdcd", "pipelines"})
    assert not taken


def test_rooms_import_each_other_in_one_direction() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert "fastdcd" not in imports(path), path
    for room in ("pipelines", "fastdcd"):
        for path in (ROOT / room).rglob("*.py"):
            assert not {"tools", "benchmarks", "tests"} & imports(path), path


def imports(path: Path) -> set[str]:
    import ast

    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_loop_names_no_backend_and_no_method() -> None:
    from fastdcd.losses.terms import TERMS
    from pipelines.base import BACKENDS

    text = (ROOT / "fastdcd" / "train.py").read_text()
    assert len(text.splitlines()) < 200
    words = {word.lower() for word in text.replace("_", " ").replace(".", " ").split()}
    assert not words & ({*BACKENDS, *TERMS} - {"torch"})
