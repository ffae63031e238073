"""The Dockerfiles, which are not built here: what they install is what the project is tested with."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
ONLY_TESTS_NEED = {"iproute2", "chromium"}  # tools/system_packages.sh says what for


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """Instruction and arguments of each line, continued lines joined, a list a stage."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if line[:1] != "#"))
    found: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, rest))
    return found


def packages(stage: list[tuple[str, str]]) -> set[str]:
    """Debian's packages that a stage installs."""
    (run,) = [rest for instruction, rest in stage if instruction == "RUN" and "apt-get install" in rest]
    assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run and "apt-get update" in run
    words = run.split("--no-install-recommends")[1].split("&&")[0].split()
    return set(words)


def extras(path: Path) -> set[str]:
    (install,) = re.findall(r"'\.\[(.*?)\]'", path.read_text())
    return set(install.split(","))


def requirements(names: set[str]) -> set[str]:
    """Everything that the package needs with these extras, extras of extras included."""
    found: set[str] = set()
    lines = [
        *PROJECT["dependencies"],
        *(each for name in names for each in PROJECT["optional-dependencies"][name]),
    ]
    for line in lines:
        wanted = Requirement(line)
        if wanted.name == PROJECT["name"]:
            found |= requirements(wanted.extras)
        else:
            found.add(canonicalize_name(wanted.name))
    return found


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]
    loaders = {"ffcv", "dali", "parquet", "imagenet", "remote"}
    every = set(re.findall(r"\[(.*)\]", PROJECT["optional-dependencies"]["all"][0])[0].split(","))
    assert loaders == every and "all" in extras(FILES[1]) and every - {"dali"} <= extras(FILES[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_an_image_holds_is_what_is_tested(path: Path) -> None:
    build, final = stages(path)
    bases = {stage[0][1].partition(" AS ")[0] for stage in (build, final)}
    (base,) = bases
    version, release = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-([a-z]+)", base).groups()  # type: ignore[union-attr]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    minor = version.rpartition(".")[0]
    assert f"Programming Language :: Python :: {minor}" in PROJECT["classifiers"]
    assert f'"{minor}"' in (ROOT / ".github/workflows/ci.yml").read_text()
    script = (ROOT / "tools/system_packages.sh").read_text()
    (listed,) = re.findall(r"for package in (.*); do", script)
    assert packages(build) == set(listed.split()) - ONLY_TESTS_NEED
    assert {"libturbojpeg0", "g++"} <= packages(final) and not any("-dev" in name for name in packages(final))

    pinned = {
        canonicalize_name(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    missing = requirements(extras(path)) - pinned - {"setuptools"}
    assert not missing, "not pinned in constraints.txt"
    for instruction, rest in build + final:
        if "pip install" in rest:
            assert "--no-cache-dir" in rest and "-c constraints.txt" in rest
        if instruction == "COPY" and "--from" not in rest:
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            ignored = (ROOT / ".dockerignore").read_text().splitlines()
            assert all(f"!{source}" in ignored for source in sources)
    copied = " ".join(rest for instruction, rest in build if instruction == "COPY")
    assert all(name in copied.split() for name in ("pyproject.toml", "fastdcd", "pipelines", "tools", "configs"))
    users = [rest for instruction, rest in final if instruction == "USER"]
    assert users == ["fastdcd"] and ("ENTRYPOINT", '["fastdcd"]') in final
    assert "fastdcd" in PROJECT.get("scripts", {})
    assert all(each[:2] == ("ENV", "PATH=/opt/venv/bin:$PATH") or each[0] != "ENV" for each in build)
    assert release == "bookworm", "the names of OpenCV's packages change with Debian's release"


def test_the_final_images_have_every_library_that_is_linked_to() -> None:
    """On the release that the images are made of: asked of the loader and of Debian's package lists."""
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").is_file() else ""
    if "VERSION_CODENAME=bookworm" not in release or not shutil.which("dpkg-query") or not find_spec("ffcv"):
        pytest.skip("this is no Debian 12 with FFCV")
    site = Path(sysconfig.get_path("platlib"))
    needed = set()
    for library in (*site.glob("ffcv/_libffcv*.so"), *site.glob("cv2/cv2*.so")):
        read = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        direct = re.findall(r"\(NEEDED\).*\[(.*)\]", read)
        needed |= {name for name in direct if not (site / "opencv_python.libs" / name).exists()}
    owners = set()
    for name in needed:
        found = subprocess.run(["dpkg-query", "-S", f"*/{name}"], capture_output=True, text=True).stdout
        owners |= {line.partition(":")[0] for line in found.splitlines()}
    assert {"libopencv-core406", "libturbojpeg0"} <= owners
    everywhere = {"libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libxcb1"}  # libxcb1 comes with libgl1
    for path in FILES:
        assert owners - everywhere <= packages(stages(path)[-1])
