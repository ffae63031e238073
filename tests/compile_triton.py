"""Compile both Triton kernels of the loss for GPUs that are not here; says what they take.

Apart from test_gpu.py, which runs it in a process of its own: the interpreter of kernels is switched on by a variable
that is read when they are defined.

    python tests/compile_triton.py DIMENSIONS CAPABILITY ...
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdcd.losses import triton_kernels
from fastdcd.losses.triton_kernels import Blocks

ROWS, COUNTS = ("z_s", "z_t"), ("count", "total", "dim")


def compile_for(kernel: Any, blocks: Blocks, dimensions: int, capability: int) -> str:
    constants = {
        "groups": None,
        "D": dimensions,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "GROUPS": False,
        "UPCAST": False,
    }
    types = {name: "*bf16" if name in ROWS else "i32" if name in COUNTS else "*fp32" for name in kernel.arg_names}
    types |= {"first": "i32", "alpha": "fp32", **dict.fromkeys(constants, "constexpr")}
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in places},
        constexprs={(places[name],): value for name, value in constants.items()},
        # as at a launch with even numbers of rows: what lies behind pointers is aligned, and counts are multiples of 16
        attrs={
            (place,): [["tt.divisibility", 16]]
            for name, place in places.items()
            if types[name].startswith("*") or name in COUNTS
        },
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", used.stdout + used.stderr)[0]
    products = next(
        kind
        for kind in ("tcgen05", "wgmma", "mma.sync")
        if f"{kind}.mma" in made.asm["ptx"] or f"{kind}.aligned" in made.asm["ptx"]
    )
    return f"shared {made.metadata.shared} registers {registers} spilled {stack} products {products}"


for each in sys.argv[2:]:
    wanted = int(sys.argv[1])
    for kernel, blocks in [
        (triton_kernels._sums, triton_kernels.blocks_of_sums(wanted)),
        (triton_kernels._gradients, triton_kernels.blocks_of_gradients(wanted)),
    ]:
        print(kernel.__name__, f"sm_{each}", compile_for(kernel, blocks, wanted, int(each)), flush=True)
