"""The package as pip installs it: a wheel in an environment without a checkout, and the fastdcd command."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel; what fastdcd depends on it borrows from this one."""
    folder = tmp_path_factory.mktemp("install")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True)
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(
        "\n".join(site.getsitepackages()) + "\n"
    )  # .pth files there are not read
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--force-reinstall", str(wheel)], check=True
    )
    return python


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.with_name("fastdcd")), *arguments]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=280)


def test_the_wheel_trains_from_its_own_configs_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import fastdcd, pipelines; print(fastdcd.__file__, pipelines.__file__)"
    found = subprocess.run([installed, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(str(installed.parents[1]) in each for each in found.stdout.split())
    quick = ["--set", "train.epochs=1", "train.max_steps=3"]
    script = (
        "from pathlib import Path; from fastdcd.tools.demo import write_digits; write_digits(Path('data/digits'))"
    )
    subprocess.run([installed, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    for part in ("train", "val"):
        done = run(
            installed, "convert", "resident", f"data/digits/{part}", f"data/digits-resident/{part}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    done = run(installed, "train", "--config", "digits/plain", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/digits/plain/summary.json").is_file()


def test_an_unknown_command_or_config_is_one_line_with_the_nearest_name(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "trian", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "fastdcd: error: no command 'trian'; did you mean train?\n")
    done = run(installed, "train", "--config", "digits/plane", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "fastdcd train: error: digits/plane: no such config file; did you mean digits/plain?\n"


def test_help_and_version_load_no_torch() -> None:
    check = (
        "import runpy, sys; sys.argv = ['fastdcd', sys.argv[1]]\n"
        "try: runpy.run_module('fastdcd', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)"
    )
    for option, expected in (("--help", "usage: fastdcd"), ("--version", "fastdcd 0.")):
        done = subprocess.run([sys.executable, "-c", check, option], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)


def test_every_package_of_the_checkout_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("fastdcd", "pipelines")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found | {"fastdcd.tools", "fastdcd.configs"}


def test_another_package_named_pipelines_is_named_at_start(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    (tmp_path / "fastdcd").symlink_to(ROOT / "fastdcd")
    done = subprocess.run([sys.executable, "-c", "import fastdcd"], cwd=tmp_path, capture_output=True, text=True)
    assert "fastdcd needs its own package `pipelines`" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "pipelines" / "__init__.py") in done.stderr.splitlines()[-1]
