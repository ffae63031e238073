"""The `fastdcd` command: fastdcd COMMAND ... runs the program of that name, the same code as the scripts.

Programs are imported when they are run: `fastdcd --help` loads neither torch nor Accelerate.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import fastdcd


class Program(NamedTuple):
    """A program behind a command: its module, whose `main` is run, and what it does."""

    module: str
    summary: str


# The modules of tools/ are packaged as fastdcd.tools.
PROGRAMS = {
    "init": Program("fastdcd.tools.init", "write a first config for your data, and say what to run next"),
    "train": Program("fastdcd.train", "train a student, with or without a teacher"),
    "convert": Program("fastdcd.tools.convert", "convert a dataset once into a format that loads fast"),
    "push": Program("fastdcd.tools.push", "copy a dataset or a cache to an object store"),
    "stage": Program("fastdcd.tools.stage", "copy a dataset or a cache from an object store to a local disk"),
    "cache": Program("fastdcd.tools.cache_teacher", "estimate, fill or verify a teacher cache"),
    "verify": Program("fastdcd.tools.verify", "compare all of a dataset or a cache with its checksums"),
    "profile": Program("fastdcd.tools.profile_throughput", "measure where a run's time goes and what to change"),
    "report": Program("fastdcd.tools.report", "draw one or several runs as a page"),
    "probe": Program("fastdcd.tools.linear_probe", "train a linear classifier on a network's frozen features"),
    "export": Program("fastdcd.tools.export", "export a student: timm-style folder, ONNX, torch.export, the Hub"),
    "parity": Program("fastdcd.tools.check_parity", "compare a loader's pixels with the reference, on your data"),
    "demo": Program("fastdcd.tools.demo", "distil a student on real digits: a table and a picture in minutes"),
}


def usage() -> str:
    """What `fastdcd --help` prints."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {program.summary}" for name, program in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: fastdcd COMMAND ...",
            "",
            "Distil an image classifier from a cached teacher.",
            "",
            *lines,
            "",
            "fastdcd COMMAND --help shows a command's options; fastdcd --version prints the version.",
            "Several processes: accelerate launch -m fastdcd train --config FILE",
        ]
    )


def main() -> int:
    """Run the program named by the first argument. Returns 0, or 2 for an unknown one; a program exits itself."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())  # noqa: T201
        return 0
    if name in ("-V", "--version"):
        print(f"fastdcd {fastdcd.__version__}")  # noqa: T201
        return 0
    if name not in PROGRAMS:
        import difflib

        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PROGRAMS)}"
        print(f"fastdcd: error: no command {name!r}; {hint}", file=sys.stderr)  # noqa: T201
        return 2
    sys.argv = [f"fastdcd {name}", *sys.argv[2:]]  # the name in usage and messages
    from fastdcd import cli

    cli.run(importlib.import_module(PROGRAMS[name].module).main)


if __name__ == "__main__":
    sys.exit(main())
