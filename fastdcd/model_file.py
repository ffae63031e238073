"""Networks from a user's own file, and the nearest of known names."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def build(path: Path, function: str, classes: int) -> nn.Module:
    """The network that a function (or class) of a file returns.

    It is called with num_classes=classes if it takes that, else without arguments. While it loads, modules that lie
    beside the file can be imported, as when the file is run.

    Raises ValueError if the file or the function fails, or gives no network.
    """
    if not path.is_file():
        raise ValueError(f"model: no such file: {path}")
    with _importable(path.absolute().parent):
        module = _run(path)
        if not callable(getattr(module, function, None)):
            functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
            raise ValueError(f"model: {path} has no function {function!r}{near(function, functions)}")
        call = getattr(module, function)
        arguments = {"num_classes": classes} if _takes(call, "num_classes") else {}
        try:
            network = call(**arguments)
        except Exception as error:
            given = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise ValueError(
                f"model: {path}:{function}({given}) fails: {type(error).__name__}: {_first_line(error)}"
            ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model: {path}:{function} gives {type(network).__name__}, expected a torch.nn.Module")
    if classes and not arguments and not _ends_in(network, classes):
        raise ValueError(
            f"model: {path}:{function}() takes no num_classes and gives no network with a final nn.Linear of {classes} "
            "outputs; wrap it in a file of your own: "
            f"`from {path.stem} import {function}` and `def net(num_classes): return {function}(...)`"
        )
    return network


def _run(path: Path) -> ModuleType:
    name = f"fastdcd_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"model: {path} fails on import: {type(error).__name__}: {_first_line(error)}") from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules of `folder` can be imported, and are forgotten afterwards: another file's `utils` is another one."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            if top not in before and ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
                del sys.modules[name]


def _takes(call: Callable[..., Any], argument: str) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(each.name == argument or each.kind is each.VAR_KEYWORD for each in parameters)


def _ends_in(network: nn.Module, classes: int) -> bool:
    return any(isinstance(each, nn.Linear) and each.out_features == classes for each in network.modules())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def near(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """The end of a message about an unknown name: what may have been meant, or nothing."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + each for each in found)}?" if found else ""
