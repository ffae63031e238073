"""README's commands, run as they are printed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, forget_accelerate, run_program
from PIL import Image


def commands(heading: str) -> list[list[str]]:
    """The shell commands of a section's indented block, a list of words each, without their comments."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    block = "\n".join(re.findall(r"^    (.*)$", section, re.M)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.timeout(600)  # seven programs
def test_from_a_folder_of_images_to_a_distilled_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command under "Train" on a few images: what one reads, another has written."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("dark", "bright")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = rng.integers(100 * number, 100 * number + 100, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.jpg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands("Train"):
        if words[0] == "pip":
            continue
        program = words[words.index("launch") + 1 :] if words[0] == "accelerate" else words[1:]
        result = run_program(*program)
        assert result.code == 0, (words, result.err)
        forget_accelerate()
        ran.append(program[0])
    assert ran.count("fastdcd/train.py") == 3 and {"tools/cache_teacher.py", "tools/report.py"} <= set(ran)
    for run in ("teacher", "plain", "student"):
        summary = json.loads(Path("runs", "own", run, "summary.json").read_text())
        assert summary["finished"] and summary["epoch"] == 30
    assert summary["teacher_images"] == 0 and summary["teacher_top1"] is not None, "the student read the cache"
    assert "runs" in Path("report.html").read_text()
