# ruff: noqa: E402
"""Runs the real trainer on a null GPU, and writes what its steps launched, copied and waited for.

    LD_PRELOAD=NULL_GPU.so python tests/null_gpu/rehearse.py RUNS.json OUT.json

RUNS.json: name -> config, as nested dictionaries. Several runs share a process: importing torch takes longer than they do.
"""

import collections
import ctypes
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn.parallel import distributed

from fastdcd import config_file, run_folder, teacher_modes
from fastdcd.cache.view_file import CacheView
from fastdcd.step import TrainStep
from fastdcd.train import train

NULL = ctypes.CDLL(os.environ["LD_PRELOAD"])
NULL.null_gpu_name.restype, NULL.null_gpu_counted.restype = ctypes.c_char_p, ctypes.c_long
KINDS = [NULL.null_gpu_name(kind).decode() for kind in range(NULL.null_gpu_kinds())]
WAITS = {"wait_stream", "wait_device", "wait_event", "copy_blocking"}
PAGEABLE = {"copy_to_gpu_pageable", "copy_to_host_pageable"}
WARM = 3  # steps until nothing is new


class Watch:
    """What happens in a run, by the kind of step it happens in: warm-up, steady, or the end of an epoch and outside."""

    def __init__(self) -> None:
        self.phase = "outside"
        self.found: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
        self.steady_steps: list[dict[str, int]] = []
        self.lines = 0  # steady steps that are followed by a line of metrics
        self.reserved: list[int] = []  # bytes, when an epoch has ended
        self.steady_bytes = 0  # to the GPU, from anywhere
        self.elsewhere: collections.Counter[str] = collections.Counter()
        self._before: dict[str, int] | None = None

    def event(self, kind: int, size: int) -> None:
        name = KINDS[kind]
        if NULL.null_gpu_current() != DEVICE.index:
            self.elsewhere[f"{name} at {place()}"] += 1
        if self.phase == "steady" and name.startswith("copy_to_gpu"):
            self.steady_bytes += size
        if name in WAITS or name in PAGEABLE:
            main = threading.current_thread() is threading.main_thread()
            self.found[self.phase, name, "main" if main else "beside", place()] += 1

    def step(self, number: int, steps_per_epoch: int, log_every: int) -> None:
        """Step `number` begins; the one before has ended with whatever the loop did after it."""
        counts = {kind: NULL.null_gpu_counted(place, DEVICE.index) for place, kind in enumerate(KINDS)}
        if self.phase == "steady":
            assert self._before is not None
            self.steady_steps.append({kind: counts[kind] - self._before[kind] for kind in KINDS})
        self._before = counts
        last = number % steps_per_epoch == steps_per_epoch - 1
        if number % steps_per_epoch == 0 and number:
            self.reserved.append(torch.cuda.memory_reserved())
        self.phase = "outside" if last else "steady" if number >= WARM else "warm"
        self.lines += self.phase == "steady" and (number + 1) % log_every == 0


def place() -> str:
    """The innermost line of the product that is being run, else the innermost of all."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [
        frame
        for frame in frames
        if frame.filename.startswith(f"{ROOT}/") and "site-packages" not in frame.filename
    ]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def rehearse(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    """One run; what was found in it."""
    global WATCH
    cfg, WATCH = config_file.parse(tree, name), Watch()
    for state in (AcceleratorState, GradientState):  # another precision needs a new start
        state._reset_state(*([True] if state is AcceleratorState else []))
    error = None
    try:
        train(cfg)
    except BaseException:
        error = traceback.format_exc()
    watch, WATCH = WATCH, None
    return {
        "error": error,
        "steps": len(watch.steady_steps),
        "lines": watch.lines,
        "launches": sorted(
            sum(each[k] for k in ("launch", "gemm", "convolution", "batch_norm")) for each in watch.steady_steps
        ),
        "reserved": watch.reserved,
        "bytes_to_gpu": watch.steady_bytes,
        "elsewhere": dict(watch.elsewhere),
        "found": [[*key, count] for key, count in watch.found.items()],
    }


WATCH: Watch | None = None
DEVICE: torch.device
BUSY = threading.local()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_long)
def observe(kind: int, size: int) -> None:
    if WATCH is not None and not getattr(BUSY, "yes", False):
        BUSY.yes = True
        try:
            WATCH.event(kind, size)
        finally:
            BUSY.yes = False


def main() -> None:
    global DEVICE
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(DEVICE)
    torch.zeros(1, device=DEVICE)
    take = TrainStep.__call__

    def counted(self: TrainStep, *arguments: Any, **named: Any) -> None:
        if WATCH is not None:
            WATCH.step(named["number"], self._steps_per_epoch, self._cfg.train.log_every)
        take(self, *arguments, **named)

    TrainStep.__call__ = counted  # type: ignore[method-assign]
    TrainStep.check = lambda *_: None  # type: ignore[method-assign]  # it looks at a value
    # what follows looks at values, and here nothing computes them
    teacher_modes.check_range = lambda *_: None
    store: Any = CacheView._store
    CacheView._store = lambda view, ids, rows: store(view, ids, rows.zero_())  # type: ignore[method-assign,assignment]
    # compares values of all ranks, and here there are none
    distributed._verify_param_shape_across_processes = lambda *_, **__: True
    # objects that travel between ranks never arrive: each rank answers for itself
    run_folder.on_first = lambda accelerator, call: call()
    NULL.null_gpu_observe(observe)
    found = {name: rehearse(name, tree) for name, tree in json.loads(Path(sys.argv[1]).read_text()).items()}
    NULL.null_gpu_observe(ctypes.cast(0, type(observe)))
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
    sys.stdout.flush()
    os._exit(0)  # libraries that believe in their GPU would end it, and crash


if __name__ == "__main__":
    main()
