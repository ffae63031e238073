"""The shipped experiments: two steps of each, commands in their headers, published settings of the CIFAR-100 pairs."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, forget_accelerate, metric_lines

from fastdcd import config_file, models, weights
from fastdcd.train import train

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


# Files that other configs are based on have no commands.
EXPERIMENTS = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "accelerate" and "--config " in path.read_text()
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for teachers with the weights of a seed."""
    return tmp_path_factory.mktemp("teachers")


def small(size: int | dict[int, int]) -> int | dict[int, int]:
    """Image sizes of ImageNet divided by four, those of CIFAR as they are."""
    if isinstance(size, dict):
        return {epoch: pixels // 4 for epoch, pixels in size.items()}
    return size // 4 if size > 100 else size


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def test_two_steps_of_every_experiment(path: Path, teachers: Path, tmp_path: Path) -> None:
    """As shipped, but on noise, in tiny batches, and with a teacher that was never trained."""
    given = config_file.load(path)
    overrides = [
        "data.backend=synthetic",
        "data.train=8x10",
        "data.val=8x10",
        "data.classes=null",
        "data.device=cpu",
    ]
    overrides += ["data.batch_size=4", f"student.image_size={small(given.student.image_size)}"]
    overrides += ["train.max_steps=2", "run.trackers=[]", f"run.dir={tmp_path / 'run'}"]
    overrides += ["train.precision=fp32"]  # bf16 is emulated on processors without it: a minute per step
    if given.teacher.model:
        ((name, _),) = given.teacher.members
        checkpoint = teachers / f"{name.replace(':', '-')}.safetensors"
        if not checkpoint.exists():
            weights.save(checkpoint, models.build(name, classes=10).original_state_dict())
        overrides += [
            f"teacher.checkpoint={checkpoint}",
            "teacher.checkpoint_by_order=false",
            "teacher.evaluate=false",
            "teacher.precision=fp32",
        ]
        overrides += [f"teacher.image_size={small(given.teacher_size)}", f"cache.path={tmp_path / 'cache'}"]
        overrides += ["teacher.mode=fill"] if given.teacher.mode == "cached" else []
    summary = train(config_file.load(path, overrides))
    forget_accelerate()
    assert summary["step"] == 2
    assert summary["teacher_images"] == (8 if given.teacher.model else 0)
    (line,) = [each for each in metric_lines(tmp_path / "run", "train") if each["step"] == 2]
    terms = {"kd": given.loss.kd, "dcd_contrast": given.loss.dcd, "dcd_consist": given.loss.dcd}
    assert all((name in line) == bool(weight) for name, weight in terms.items()) and line["skipped_steps"] == 0


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
        trained = config_file.load(CIFAR / "teachers" / f"{teacher}.yaml")
        assert trained.teacher.mode == "none" and trained.optim.lr == 0.05 and trained.run.dir
        for student in students:
            plain = config_file.load(CIFAR / f"{student}.yaml")
            assert plain.teacher.mode == "none"
            for method, (kd, dcd) in METHODS.items():
                taught = config_file.load(CIFAR / f"{teacher}_{student}_{method}.yaml")
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


@pytest.mark.parametrize("path", sorted((CONFIGS / "imagenet").glob("resnet*/*.yaml")), ids=lambda path: path.stem)
def test_an_imagenet_recipe_is_in_two_files(path: Path) -> None:
    (base,) = [path.parent / yaml.safe_load(path.read_text())["base"]]
    assert "base" not in yaml.safe_load(base.read_text())
    cfg = config_file.load(path)
    assert cfg.train.epochs == int(path.stem.removesuffix("_epochs")) and cfg.loss.kd == cfg.loss.dcd == 1


def test_the_fast_recipe_changes_neither_models_nor_losses() -> None:
    paths = [path for path in (CIFAR / "fast").glob("*.yaml") if path.name != "base.yaml"]
    assert len(paths) == 3 * (1 + len(METHODS))
    for path in paths:
        fast, long = config_file.load(path), config_file.load(CIFAR / path.name)
        assert (fast.student, fast.loss, fast.data.backend) == (long.student, long.loss, "resident")
        assert fast.teacher.model == long.teacher.model and fast.teacher.checkpoint == long.teacher.checkpoint
        assert fast.teacher.mode == ("fill" if long.teacher.model else "none")
        assert fast.train.epochs < long.train.epochs and fast.views.count <= fast.train.epochs
