"""Who may import whom: the walls of docs/design, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import pipelines

PACKAGES = ("pipelines", "fastdcd", "tools", "benchmarks")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def statements(node: ast.AST, *, at_import: bool) -> Iterator[ast.stmt]:
    """All statements below a node; with `at_import` only those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child, at_import=at_import)


@cache
def imports(name: str, at_import: bool = False) -> frozenset[str]:
    """The modules of this checkout that a module imports, and those that a registry of it names."""
    found = set()
    tree = ast.parse(FILES[name].read_text())
    for statement in statements(tree, at_import=at_import):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert not statement.level, f"{name}: relative import"
            module = statement.module or ""
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in statement.names}
    return frozenset(each for each in found if each in FILES and each != name)


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


RULES = {
    "pipelines stands alone": (("pipelines",), ("fastdcd", "tools", "benchmarks")),
    "nobody imports programs": (("pipelines", "fastdcd"), ("tools", "benchmarks")),
    "tools do not import each other": (("tools",), ("tools", "benchmarks")),
    "what trains converts nothing": (
        ("fastdcd", "pipelines.loaders", "pipelines.formats"),
        ("pipelines.conversion",),
    ),
    "formats know no loader": (("pipelines.formats", "pipelines.conversion"), ("pipelines.loaders",)),
    "losses know neither loaders nor teachers": (
        ("fastdcd.losses",),
        ("pipelines.base", "pipelines.loaders", "pipelines.formats", "fastdcd.cache", "fastdcd.teacher"),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_walls(rule: str) -> None:
    importers, forbidden = RULES[rule]
    seen = {
        name: [each for each in imports(name) if below(each, *forbidden)]
        for name in FILES
        if below(name, *importers)
    }
    assert len(seen) > 3
    assert {name: found for name, found in seen.items() if found} == {}


def test_top_level_modules_of_pipelines_convert_nothing() -> None:
    top = [name for name in FILES if name.count(".") == 1 and below(name, "pipelines")]
    assert not [name for name in top if any(below(each, "pipelines.conversion") for each in imports(name))]


def test_no_loader_imports_another() -> None:
    """A loader's second file, its kernel or pipeline, begins with its name."""
    for name in FILES:
        if below(name, "pipelines.loaders") and name != "pipelines.loaders":
            own = name.rsplit(".", 1)[1].removesuffix("_loader")
            for other in imports(name):
                is_loader = below(other, "pipelines.loaders") and other != "pipelines.loaders"
                assert not is_loader or other.rsplit(".", 1)[1].startswith(own), f"{name} imports {other}"


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports(name, at_import=True):
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_what_pipelines_exports(tmp_path: Path) -> None:
    """The example in its docstring, on its public names alone."""
    for number in range(6):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(path)
    with pipelines.open_loader("torch", tmp_path, pipelines.LoaderOptions(workers=0)) as loader:
        ids = pipelines.order(6, seed=0, epoch=0)
        plan = pipelines.EpochPlan(
            index=loader.index, family=pipelines.PadCrop(), view_seed=0, view=0, order=ids, batch_size=4
        )
        batches = list(loader.epoch(plan.for_rank((8,))))
    assert [batch.images[0].shape for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert np.concatenate([batch.ids for batch in batches]).tolist() == ids.tolist()
    for name in pipelines.__all__:
        assert getattr(pipelines, name).__name__ == name
        assert name in dir(pipelines)
    with pytest.raises(AttributeError):
        _ = pipelines.nothing_of_the_kind


def test_importing_pipelines_loads_nothing_heavy() -> None:
    code = "import sys, pipelines; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"


def test_pipelines_is_small_at_its_top_level() -> None:
    rooms = {path.stem for path in (ROOT / "pipelines").iterdir() if path.name[0] not in "._"} - {"py"}
    assert len(rooms) <= 13, sorted(rooms)
