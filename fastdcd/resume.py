"""Going on with a run under a config that is not, key for key, the checkpoint's.

One rule decides: a change may be made if the steps that are done would have been the same under it. Then what
follows is exactly what the new config would have given from the start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from fastdcd import experiment
from fastdcd.checkpoint import Progress, Saved
from fastdcd.config import Config
from fastdcd.schedule import learning_rate
from pipelines.views import describe

_MOST_RATES = 20_000  # of the steps done, those whose learning rates are compared


@dataclass(frozen=True, kw_only=True)
class _Past:
    """What was done under the checkpoint's config."""

    there: Config
    now: Config
    progress: Progress
    steps_per_epoch: int

    @property
    def epochs(self) -> range:
        """The epochs that were begun."""
        return range(self.progress.epoch + (self.progress.step_in_epoch > 0))

    def same(self, value: Callable[[Config], object]) -> bool:
        return value(self.there) == value(self.now)


def _rates(past: _Past) -> bool:
    steps = past.progress.step
    some = range(0, steps, max(1, steps // _MOST_RATES))

    def rates(cfg: Config) -> list[float]:
        return [
            learning_rate(
                step,
                past.steps_per_epoch,
                epochs=cfg.train.epochs,
                schedule=cfg.schedule,
                peak=cfg.optim.lr,
            )
            for step in (*some, *range(max(steps - 1, 0), steps))
        ]

    return past.same(rates)


def _views(past: _Past) -> bool:
    return past.same(lambda config: [epoch % config.view_count for epoch in past.epochs])


def _boxes(past: _Past) -> bool:
    return past.same(lambda config: describe(experiment.view_family(config)))


def _student_sizes(past: _Past) -> bool:
    return past.same(lambda config: [config.student_size(epoch) for epoch in past.epochs])


def _teacher(past: _Past) -> bool:
    """Its weights and preprocessing are compared as they are, with the data."""
    return True


def _free(past: _Past) -> bool:
    return True


# Key, or section -> whether the past is the same under both configs. What is not here may not change.
RULES: dict[str, Callable[[_Past], bool]] = {
    "train.epochs": lambda past: _rates(past) and _views(past),
    **dict.fromkeys(["optim.lr", "schedule"], _rates),
    "views.count": _views,
    **dict.fromkeys([f"views.{key}" for key in ("scale", "ratio", "padding", "crop_ratio")], _boxes),
    "student.image_size": _student_sizes,
    **dict.fromkeys(["teacher.model", "teacher.checkpoint", "teacher.checkpoint_by_order"], _teacher),
    **dict.fromkeys(["teacher.image_size", "teacher.mean", "teacher.std", "teacher.precision"], _teacher),
    "cache.dtype": lambda past: past.now.teacher.mode not in ("fill", "cached"),
    # what is read, by another name or in another way: pixels and labels are compared as they are
    **dict.fromkeys(["data.train", "data.backend", "data.classes", "data.hw_decoder_load"], _free),
    # speed, memory, and what is measured and written; at most another rounding
    **dict.fromkeys(["data.val", "data.workers", "data.device", "data.on_decode_error", "eval", "run.dir"], _free),
    **dict.fromkeys(
        ["run.trackers", "cache", "plugins", "loss.form", "student.channels_last", "student.checkpoint"], _free
    ),
    **dict.fromkeys(["teacher.compile", "teacher.evaluate", "train.compile", "train.max_steps"], _free),
    **dict.fromkeys(["train.checkpoint_every", "train.keep_checkpoints", "train.log_every"], _free),
    **dict.fromkeys(["train.max_skipped", "train.timeout", "train.resume"], _free),
}
# Changes that nobody needs to be told of: they are another run's by nature.
UNSAID = ("run.dir", "train.resume", "train.max_steps", "data.train")


def compare(saved: Saved, cfg: Config, origin: Mapping[str, str], *, steps_per_epoch: int) -> list[str]:
    """The config changes under which a run continues, for printing; none of them changes the steps that are done.

    Args:
        saved: what the checkpoint says it was made with.
        config: the config now.
        origin: what the data, the views and the teacher are now (`experiment.origin`).
        steps_per_epoch: of the data now.

    Raises ValueError, in one line with both values, for a change under which the run cannot continue exactly.
    """
    if saved.config is None:
        _check_steps(saved, steps_per_epoch)
        return ["the checkpoint is of another version of fastdcd: the config it was made with is not compared"]
    past = _Past(there=saved.config, now=cfg, progress=saved.progress, steps_per_epoch=steps_per_epoch)
    changed = list(_changes(saved.config, cfg))
    refused = [f"{key} {there} there, {now} now" for key, there, now in changed if not _rule(key)(past)]
    refused += [
        f"{_name(key, cfg)} {saved.origin[key]} there, {now} now"
        for key, now in origin.items()
        if saved.origin.get(key, now) != now
    ]
    if refused:
        raise ValueError(
            f"{saved.path}: the steps that are done would have been others under this config ({'; '.join(refused)}); "
            "resume with what is there, or start over with --set run.dir=..."
        )
    _check_steps(saved, steps_per_epoch)
    return [f"{key}: {there} before, {now} from here on" for key, there, now in changed if key not in UNSAID]


def _check_steps(saved: Saved, steps_per_epoch: int) -> None:
    if saved.progress.step_in_epoch > steps_per_epoch:
        raise ValueError(
            f"{saved.path}: step {saved.progress.step_in_epoch} of an epoch, and an epoch has {steps_per_epoch} steps "
            "now: data.batch_size or data.train is another one; resume with those it was made with"
        )


def _rule(key: str) -> Callable[[_Past], bool]:
    return RULES.get(key) or RULES.get(key.partition(".")[0]) or (lambda past: False)


def _name(fact: str, cfg: Config) -> str:
    """The config's key for a fact."""
    if fact == "data.index":
        return f"the digest of names, labels and sizes in data.train ({cfg.data.train})"
    return fact.replace("loader.", "data.backend: ")


def _changes(there: Config, now: Config) -> Iterator[tuple[str, str, str]]:
    """Keys whose values differ, with both."""
    before, after = _flat(there), _flat(now)
    for key, value in after.items():
        if before.get(key) != value:
            yield key, _short(before.get(key)), _short(value)


def _flat(cfg: Config) -> dict[str, Any]:
    tree = json.loads(TypeAdapter(type(cfg)).dump_json(cfg))
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
