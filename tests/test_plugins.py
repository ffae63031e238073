"""Losses and loaders registered from outside the package: known to config, metrics, profile and reports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOTH, Digits, metric_lines, run_program

from fastdcd import config_file, experiment
from fastdcd.losses.terms import TERMS, CrossEntropy, LossTerm, register_loss
from fastdcd.profiler.verdict import verdict
from pipelines.base import BACKENDS
from pipelines.plan import evaluation_plan

LOSS = '''
from dataclasses import dataclass
from typing import ClassVar

from fastdcd.losses.terms import LossTerm, register_loss


class Toy(LossTerm):
    """Squared distance of mean logits: no good, but a loss."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        toy_scale: float = 2.0

    title = "Toy distance"
    logged: ClassVar = {"toy": ("Toy distance of means", "toys")}

    def forward(self, inputs):
        means = (each.logits.sum() / inputs.divisor for each in (inputs.student, inputs.teacher))
        value = self.settings.toy_scale * (next(means) - next(means)).square()
        return value, {"toy": value.detach()}


register_loss("toy", Toy)
'''


LOADER = '''
from dataclasses import dataclass, replace

from pipelines.base import register_loader
from pipelines.loaders.resident_loader import ResidentLoader


class Toy(ResidentLoader):
    """Images that stay in memory, darker."""

    backend = "toy"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        toy_divisor: int = 1

        def __post_init__(self):
            if self.toy_divisor < 1:
                raise ValueError(f"toy_divisor: got {self.toy_divisor}, expected at least 1")

    @classmethod
    def open(cls, path, options):
        loader = super().open(path, options)
        loader.divisor = cls.own_options(options).toy_divisor
        return loader

    @property
    def fingerprint(self):
        return {"backend": "toy", "divisor": str(self.divisor)}

    def _execute(self, rank_plan):
        for batch in super()._execute(rank_plan):
            yield replace(batch, images=tuple(each // self.divisor for each in batch.images))


register_loader("toy", Toy)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    before = dict(TERMS), dict(BACKENDS)
    path = tmp_path / "toy.py"
    path.write_text(LOSS + LOADER)
    yield path
    for registry, known in zip((TERMS, BACKENDS), before, strict=True):
        registry.clear()  # type: ignore[attr-defined]
        registry.update(known)  # type: ignore[attr-defined]


def test_loss_and_loader_from_outside_are_in_metrics_profile_and_report(
    digits: Digits, tmp_path: Path, plugin: Path
) -> None:
    sections: dict[str, Any] = {
        "data": {"backend": "toy", "toy_divisor": 4},
        "loss": {**BOTH, "toy": 1.0, "toy_scale": 3.0},
        "teacher": {"mode": "online"},
        "train": {"epochs": 1},
    }
    file = digits.file(tmp_path / "toy.yaml", **sections)
    file.write_text(f"plugins: [{plugin}]\n" + file.read_text())
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 0, ran.err
    first, *_ = metric_lines(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(
        first["ce"] + first["kd"] + first["dcd_contrast"] + 0.5 * first["dcd_consist"] + first["toy"], rel=1e-5
    )
    resolved = config_file.load(tmp_path / "run" / "config.yaml")
    assert (resolved.loss.toy, resolved.loss.toy_scale, resolved.data.toy_divisor) == (1.0, 3.0, 4)
    with experiment.open_set(resolved.data, resolved.data.train, torch.device("cpu"), "data.train") as loader:
        assert loader.fingerprint == {"backend": "toy", "divisor": "4"}
        plan = evaluation_plan(loader.index, crop_ratio=1.0, batch_size=len(loader.index))
        (batch,) = loader.epoch(plan.for_rank((8,)))
        assert batch.at(8).max() <= 255 // 4

    arguments = ["--seconds", 0.5, "--quick", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    ran = run_program("tools/profile_throughput.py", "--config", file, *arguments)
    assert ran.code == 0, ran.err
    profile = json.loads((tmp_path / "a.json").read_text())
    assert profile["about"]["backend"] == "toy" and profile["ceilings"]["loader"] > 0
    names = list(profile["stages"])
    assert names.index("loss.dcd") + 1 == names.index("loss.toy") == names.index("loss_backward") - 1
    assert profile["stages"]["loss.toy"]["mean"] > 0
    assert "Toy distance" in (tmp_path / "a.html").read_text()
    profile["stages"]["loss.toy"]["mean"] *= 1000
    found = verdict(profile)
    assert found["kind"] == "loss-bound" and ", toy " in found["words"]

    ran = run_program("tools/report.py", tmp_path / "run", "--html", tmp_path / "report.html")
    assert ran.code == 0, ran.err
    assert "Toy distance of means" in (tmp_path / "report.html").read_text()


def test_options_of_a_loader_are_known_only_once_it_is_registered(digits: Digits, plugin: Path) -> None:
    tree = digits.tree(data={"backend": "torch", "toy_divisor": 2})
    with pytest.raises(ValueError, match=r"data\.toy_divisor: no such key; known: train, val, .*hw_decoder_load"):
        config_file.parse(tree, "test")
    tree["plugins"] = [str(plugin)]
    assert config_file.parse(tree, "test").data.toy_divisor == 2, "as of a run that another loader resumes"
    for value, message in (
        (0, "toy_divisor: got 0, expected at least 1"),
        ("2", r"data\.toy_divisor: got '2'; input should be a valid integer"),
    ):
        with pytest.raises(ValueError, match=message):
            config_file.parse({**tree, "data": {**tree["data"], "toy_divisor": value}}, "test")
    tree["data"]["toy_diviser"] = tree["data"].pop("toy_divisor")
    with pytest.raises(ValueError, match=r"data\.toy_diviser: no such key; did you mean data\.toy_divisor\?"):
        config_file.parse(tree, "test")


def test_keys_of_a_loss_are_known_only_once_it_is_registered(digits: Digits, tmp_path: Path, plugin: Path) -> None:
    tree = digits.tree(loss={"toy": 1.0, "kd": 1.0}, teacher={"mode": "online"})
    with pytest.raises(ValueError, match=r"loss\.toy: no such key; known: ce, kd, dcd, "):
        config_file.parse(tree, "test")
    tree["plugins"] = [str(plugin)]
    assert config_file.parse(tree, "test").loss.toy_scale == 2.0
    tree["loss"]["toy_scal"] = 1.0
    with pytest.raises(ValueError, match=r"loss\.toy_scal: no such key; did you mean loss\.toy_scale\?"):
        config_file.parse(tree, "test")
    tree["loss"].pop("toy_scal")
    tree["teacher"]["mode"] = "none"
    with pytest.raises(ValueError, match=r"loss\.kd and loss\.toy are above 0"):
        config_file.parse(tree, "test")


@pytest.mark.parametrize("key", ["kd", "tau_max", "lr", "dcd_contrast"])
def test_a_loss_takes_no_name_that_means_something_else(key: str, plugin: Path) -> None:
    class Other(LossTerm):
        title = "other"
        logged = {key: ("Other", "")}  # noqa: RUF012

    with pytest.raises(ValueError, match=f"'{key}' is taken"):
        register_loss(key if key in ("kd", "tau_max") else "other", Other)
    register_loss("ce", CrossEntropy)  # the same once more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plugins: no such file"),
        ("import nothing_of_this_name", "fails on import: ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(
    digits: Digits, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "plugin.py"
    if text:
        path.write_text(text)
    for plugins, expected in (([str(path)], message), (str(path), "expected a list of Python files")):
        with pytest.raises(ValueError, match=expected):
            config_file.parse({**digits.tree(), "plugins": plugins}, "test")
