"""Start the reference's cifar/train_student.py, unchanged: python run_reference.py .../train_student.py ARGUMENTS...

Two things stand in its way, and are dealt with from outside:

- It reads CIFAR-100 through torchvision, which accepts no other files than the published ones, by their digests.
  It is given those of the files in ../../data, a part of the data set.
- Its documented command, --distill dcd, is none of the program's choices. The branch of --distill rrd builds a loss of
  the same arguments with the same two heads and calls it in the same way; bound to the authors' own DCDLoss it is
  what the documented command would run.
"""

from __future__ import annotations

import hashlib
import runpy
import sys
from pathlib import Path

from torchvision import datasets


def main() -> None:
    program = Path(sys.argv[1])
    arguments = sys.argv[2:]
    data = Path("../../data").resolve()
    Path("data").symlink_to(data)

    def digest(name: str) -> str:
        return hashlib.md5((data / "cifar-100-python" / name).read_bytes()).hexdigest()

    datasets.CIFAR100.train_list = [["train", digest("train")]]
    datasets.CIFAR100.test_list = [["test", digest("test")]]
    datasets.CIFAR100.meta = {**datasets.CIFAR100.meta, "md5": digest("meta")}
    sys.path[0] = str(program.parent)
    if "dcd" in arguments:
        import distillers  # type: ignore[import-not-found]  # the authors' package

        distillers.RRDLoss = distillers.DCDLoss
        arguments[arguments.index("dcd")] = "rrd"
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
