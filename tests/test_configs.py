"""The shipped experiments: commands in their headers, and the published settings of the CIFAR-100 pairs."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from fastdcd import config

CONFIGS = ROOT / "configs"
CIFAR = CONFIGS / "cifar100"
PAIRS = {
    "wrn-40-2": ("wrn-16-2", "wrn-40-1", "shufflenetv1"),
    "resnet56": ("resnet20",),
    "resnet110": ("resnet20", "resnet32"),
    "resnet32x4": ("resnet8x4", "shufflenetv1", "shufflenetv2"),
    "vgg13": ("vgg8", "mobilenetv2"),
    "resnet50": ("mobilenetv2", "vgg8"),
}
METHODS = {"kd": (1, 0), "dcd": (0, 1), "dcd_kd": (1, 1)}  # weights of KD and DCD


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_headers_name_commands_that_exist(path: Path) -> None:
    """Files of a header's commands exist, and the last command runs with the file it stands in."""
    lines = re.sub(r"\\\n#", " ", header(path)).splitlines()  # a command may go on after a backslash
    commands = [re.findall(r"--config(?:_file)? (\S+)", line) for line in lines]
    commands = [files for files in commands if files]
    assert all((ROOT / file).is_file() for files in commands for file in files), commands
    assert not commands or str(path.relative_to(ROOT)) in commands[-1]


def test_every_pair_and_method_has_a_config_with_the_published_settings() -> None:
    assert sum(map(len, PAIRS.values())) == 13
    for teacher, students in PAIRS.items():
        trained = config.load(CIFAR / "teachers" / f"{teacher}.yaml")
        assert trained.teacher.mode == "none" and trained.optim.lr == 0.05 and trained.run.dir
        for student in students:
            plain = config.load(CIFAR / f"{student}.yaml")
            assert plain.teacher.mode == "none"
            for method, (kd, dcd) in METHODS.items():
                taught = config.load(CIFAR / f"{teacher}_{student}_{method}.yaml")
                assert taught.student.model == plain.student.model
                assert student == taught.student.model.removeprefix("cifar:").lower()
                assert taught.teacher.model == trained.student.model
                assert taught.teacher.checkpoint == Path(*trained.run.dir.parts, "student.safetensors")
                assert (taught.loss.ce, taught.loss.kd, taught.loss.dcd) == (1, kd, dcd)
                for cfg in (plain, taught):
                    small = student.startswith(("mobilenet", "shufflenet"))
                    assert cfg.optim.lr == (0.01 if small else 0.05) and cfg.optim.weight_decay == 5e-4
                    assert cfg.train.epochs == 240 and cfg.data.batch_size == 64
                    assert (cfg.schedule.name, cfg.schedule.milestones) == ("step", (150, 180, 210))
                    assert (cfg.loss.alpha, cfg.loss.feat_dim, cfg.loss.kd_temperature) == (0.5, 128, 4)


def test_the_fast_recipe_changes_neither_models_nor_losses() -> None:
    paths = [path for path in (CIFAR / "fast").glob("*.yaml") if path.name != "base.yaml"]
    assert len(paths) == 3 * (1 + len(METHODS))
    for path in paths:
        fast, long = config.load(path), config.load(CIFAR / path.name)
        assert (fast.student, fast.loss, fast.data.backend) == (long.student, long.loss, "resident")
        assert fast.teacher.model == long.teacher.model and fast.teacher.checkpoint == long.teacher.checkpoint
        assert fast.teacher.mode == ("fill" if long.teacher.model else "none")
        assert fast.train.epochs < long.train.epochs and fast.views.count <= fast.train.epochs
