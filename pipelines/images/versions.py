"""Versions of the libraries that decode: another version may show other pixels."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path


def installed(*names: str) -> dict[str, str]:
    """Version by name of packages, matched by the beginning of their names: nvidia-nvjpeg is also nvidia-nvjpeg-cu12.

    What is not installed is left out. A build (`+cu130`) is no part of the version.
    """
    found: dict[str, str] = {}
    for distribution in distributions():
        package = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        for name in names:
            if re.fullmatch(re.escape(name) + r"(-cu(da)?\d+)?", package):
                found.setdefault(name, distribution.version.partition("+")[0])
    return dict(sorted(found.items()))


def loaded_turbojpeg() -> str:
    """Version of the TurboJPEG library in this process, "unknown" if it does not say; it must be loaded."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")
        if "libturbojpeg" in path[2]:
            said = re.search(rb"libjpeg-turbo version ([0-9.]+)", Path(f"/{path[2]}").read_bytes())
            return said[1].decode() if said else "unknown"
    return "unknown"
