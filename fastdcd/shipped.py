"""The configs that come with fastdcd: found by name, wherever fastdcd is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """configs/ of the checkout, or the copy inside the installed package."""
    checkout = _PACKAGE.parent / "configs"
    return checkout if checkout.is_dir() else _PACKAGE / "configs"


def find(path: Path) -> Path:
    """`path` if it exists, else the shipped file of that name: configs/digits/kd.yaml, digits/kd.yaml or digits/kd.

    Returns `path` unchanged if there is neither: whoever opens it says so.
    """
    return path if path.exists() else next((each for each in _candidates(path) if each.is_file()), path)


def _candidates(path: Path) -> Iterator[Path]:
    if path.is_absolute():
        return
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for name in (inside, inside.with_name(f"{inside.name}.yaml")):
        yield folder() / name


def names() -> list[str]:
    """Names of the shipped experiments, as `--config` takes them: digits/kd, cifar100/resnet8x4 ..."""
    root = folder()
    found = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(str(name) for name in found if name.parts[0] != "accelerate" and name.name != "base")
