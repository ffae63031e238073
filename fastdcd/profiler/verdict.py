"""What limits a run, in words, and what to do about it: a table of rules over a profile."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fastdcd.losses.terms import TERMS
from fastdcd.profiler.stages import LOSS
from pipelines.files import human_bytes

Profile = dict[str, Any]  # what measure.profile returns


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing to do.

    Attributes:
        text: in words.
        settings: config keys, as --set takes them.
        command: to run before, or instead; "" if none.
        gain: factor on images per second that it gives, from measured stages; None if that was not measured.
    """

    text: str
    settings: tuple[str, ...] = ()
    command: str = ""
    gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A limit: the share of the step it takes, from which share on it is one, and what to say and do.

    `weight` settles which of two limits of much the same share is named.
    """

    kind: str
    share: Callable[[Profile], float]
    threshold: float
    words: Callable[[Profile], str]
    advice: Callable[[Profile], list[Advice]]
    weight: float = 1.0


def verdict(profile: Profile) -> dict[str, Any]:
    """The limit of a profiled run: `kind`, `healthy`, `words`, `share`, `advice`, and `notes` on the side.

    Where the step does not wait for data, a faster student is advised last whatever the limit.
    """
    found = [(rule.share(profile), rule) for rule in RULES]
    limits = [(share, rule) for share, rule in found if share >= rule.threshold]
    if limits:
        share, rule = max(limits, key=lambda each: each[0] * each[1].weight)  # where most can be won
        kind, words, advice = rule.kind, rule.words(profile), rule.advice(profile)
    else:
        share = _share(profile, *STUDENT)
        kind, words, advice = "model-bound", _model_words(profile), []
    if _share(profile, "data_wait") < WAITING:
        advice = [*advice, *_student_advice(profile, compiled=not limits)]
    return {
        "kind": kind,
        "healthy": not limits,
        "share": share,
        "words": words,
        "advice": [asdict(each) for each in advice],
        "notes": list(_notes(profile)),
    }


# ---- reading a profile

STUDENT = ("student_forward", "backward", "optimizer")
WAITING = 0.1  # share of the step, from which on it is a wait


def _losses(profile: Profile) -> list[str]:
    """Stages of the loss terms."""
    return [name for name in profile["stages"] if name.startswith(LOSS) or name == "loss_backward"]


def _seconds(profile: Profile, *names: str) -> float:
    return float(sum(profile["stages"].get(name, {"mean": 0.0})["mean"] for name in names))


def _total(profile: Profile) -> float:
    return _seconds(profile, *profile["stages"])


def _share(profile: Profile, *names: str) -> float:
    return _seconds(profile, *names) / _total(profile)


def _gain(profile: Profile, saved: float) -> float:
    """Times the rate, if so many seconds of a step go."""
    total = _total(profile)
    return total / max(total - saved, total / 100)


# What a setting changes -> the stages that change with it.
CONCERNS = {
    "data.backend": ("data_wait",),
    "teacher.mode": ("teacher",),
    "teacher.precision": ("teacher",),
    "loss.form": ("loss.dcd", "loss_backward"),
    "train.precision": STUDENT,
    "student.channels_last": STUDENT,
    "data.batch_size": (*STUDENT, "other"),
}
WORTH = 1.05  # times the rate: less is not advised


def _saving(profile: Profile, setting: str) -> float:
    """Share of a step that a setting saves, as measured: of the stages it concerns, what the alternative saved of
    them; 0 if it was not measured."""
    measured = profile["alternatives"].get(setting)
    if measured is None:
        return 0.0
    stages = CONCERNS[setting.partition("=")[0]]
    return _share(profile, *stages) * (1 - measured["then"] / measured["now"])


def _measured(profile: Profile, setting: str, text: str, *more: str) -> list[Advice]:
    """The setting (and `more` that belong to it) as advice, if it is worth it."""
    gain = _gain(profile, _saving(profile, setting) * _total(profile))
    return [Advice(text=text, settings=(setting, *more), gain=gain)] if gain >= WORTH else []


def _without_data(profile: Profile) -> float:
    """Images per second if data cost nothing."""
    return float(profile["images_per_second"] * _gain(profile, _seconds(profile, "data_wait")))


# ---- data


def _data_share(stage: str) -> Callable[[Profile], float]:
    """The wait for data, if `stage` is most of the loader's work."""

    def share(profile: Profile) -> float:
        parts = {name: value for name, value in profile["loader_seconds_an_image"].items() if name != "loader"}
        if not parts:
            return 0.0
        most = max(parts, key=lambda name: parts[name])
        return _share(profile, "data_wait") if most == stage else 0.0

    return share


def _data_words(stage: str) -> Callable[[Profile], str]:
    def words(profile: Profile) -> str:
        parts = profile["loader_seconds_an_image"]
        return (
            f"data-bound: the loader delivers {profile['ceilings']['loader']:,.0f} images/s, without waiting for it "
            f"the step would take {_without_data(profile):,.0f}; {stage} is {parts[stage] / parts['loader']:.0%} of "
            f"the loader's time, and waiting for data {_share(profile, 'data_wait'):.0%} of the step"
        )

    return words


def _cores(profile: Profile) -> int:
    """Of one process."""
    return max((profile["about"]["cores"] or 1) // profile["about"]["processes"], 1)


def _cores_to_feed(profile: Profile) -> float | None:
    """How many cores' work it is to load what a process's step could take; None if it was not measured."""
    cost = profile.get("loader_cpu_seconds_an_image")
    return cost * _without_data(profile) / profile["about"]["processes"] if cost else None


def _more_workers(profile: Profile) -> list[Advice]:
    about, cores, needed = profile["about"], _cores(profile), _cores_to_feed(profile)
    if about["workers"] >= cores or about["backend"] == "resident":
        return []
    enough = f"; the step could take {needed:.1f} cores' work" if needed else ""
    # workers take the work off the step's own thread; how far that scales here is not known
    return [
        Advice(
            text=f"decode in {cores} workers instead of {about['workers']}: this machine has {about['cores']} cores"
            + enough,
            settings=(f"data.workers={cores}",),
        )
    ]


def _storage_advice(profile: Profile) -> list[Advice]:
    about = profile["about"]
    advice = []
    if about["backend"] == "torch":
        advice.append(_convert(profile, "one file that is read in large pieces, instead of a file an image"))
    else:
        advice.append(
            Advice(
                text="read neighbouring samples together (a local shuffle): large sequential reads",
                settings=("data.order=paged",),
            )
        )
    return [*advice, *_more_workers(profile)]


def _convert(profile: Profile, text: str) -> Advice:
    """Conversion to .beton, tried with some of the images."""
    about = profile["about"]
    classes = ["--classes", about["classes"]] if about["classes"] else []
    commands = [
        f"python tools/convert.py ffcv {shlex.join([about[part], about[part] + '.beton', '--max-size', '256', *classes])}"
        for part in ("train", "val")
    ]
    settings = ("data.backend=ffcv", *(f"data.{part}={about[part]}.beton" for part in ("train", "val")))
    saved = _saving(profile, settings[0]) * _total(profile)
    return Advice(
        text=f"convert the images once: {text}",
        command=" && ".join(commands),
        settings=settings,
        gain=_gain(profile, saved) if saved else None,
    )


def _decode_advice(profile: Profile) -> list[Advice]:
    advice = _more_workers(profile)
    if profile["about"]["backend"] == "torch":
        advice.append(_convert(profile, "smaller JPEGs of at most 256 pixels decode in a fraction of the time"))
    elif profile["about"]["backend"] == "ffcv":
        source = profile["about"]["train"]
        advice.append(
            Advice(
                text="convert again from the original images with a smaller --max-size, or with raw pixels",
                command=f"python tools/convert.py ffcv SRC {source} --max-size 256 --jpeg-share 0",
            )
        )
    elif profile["about"]["teacher_mode"] in ("cached", "fill") and profile["about"]["device"] != "cpu":
        advice.append(
            Advice(
                text="with cached features the GPU's JPEG engine must rest (docs/backends.md), and its kernels leave "
                "Huffman decoding to the CPU: about a core for 700 to 1,000 images/s; without so many cores, take ffcv "
                "with raw pixels, or smaller shards",
                command="python tools/convert.py shards SRC OUT --max-size 256",
            )
        )
    return advice


def _augment_advice(profile: Profile) -> list[Advice]:
    about = profile["about"]
    advice = _more_workers(profile)
    if about["teacher_mode"] == "online":
        advice.append(_cache(profile))
    if about["backend"] == "torch":
        advice.append(_convert(profile, "crops of smaller stored images are smaller"))
    return advice


# ---- the rest


def _copy_advice(profile: Profile) -> list[Advice]:
    advice = [
        Advice(
            text="copies should hide behind the step: decode on the GPU, so that only JPEG bytes travel",
            settings=("data.backend=dali",),
        )
    ]
    if profile["about"]["teacher_mode"] == "online":
        advice.append(_cache(profile))
    return advice


def _cache(profile: Profile) -> Advice:
    about = profile["about"]
    settings = ("teacher.mode=cached", f"cache.path={about['cache']}")
    given = [each for each in about["set"] if not each.startswith(("teacher.mode=", "cache.path="))]
    return Advice(
        text="cache the teacher's features once; later epochs and later students read them",
        command="python tools/cache_teacher.py fill --config "
        + shlex.join([about["config"], "--set", *given, *settings]),
        settings=settings,
        gain=_gain(profile, saved) if (saved := _saving(profile, settings[0]) * _total(profile)) else None,
    )


def _teacher_advice(profile: Profile) -> list[Advice]:
    lower = _measured(
        profile, "teacher.precision=bf16", "or let the teacher compute in bf16 (its features move a little)"
    )
    return [_cache(profile), *lower]


def _teacher_words(profile: Profile) -> str:
    return (
        f"teacher-bound: the teacher's forward pass is {_share(profile, 'teacher'):.0%} of the step, "
        f"the student's forward and backward {_share(profile, 'student_forward', 'backward'):.0%}"
    )


def _loss_advice(profile: Profile) -> list[Advice]:
    advice = _measured(
        profile, "loss.form=auto", "let the loss choose its form: tiles instead of whole similarity matrices"
    )
    if profile["about"]["processes"] > 1 and "loss.dcd" in profile["stages"]:
        advice.append(
            Advice(
                text="negatives of each process only: less work, another loss", settings=("loss.negatives=local",)
            )
        )
    rows = profile["images_per_step"]
    pairwise = [term.title for name, term in TERMS.items() if term.pairwise and LOSS + name in profile["stages"]]
    if pairwise:
        advice.append(
            Advice(
                text=f"{', '.join(pairwise)}: work that grows with the square of the batch: a smaller one (and its "
                "learning rate)",
                settings=(f"data.batch_size={max(rows // 2, 1)}",),
            )
        )
    return advice


def _loss_words(profile: Profile) -> str:
    each = ", ".join(
        f"{name.removeprefix(LOSS).replace('_', ' ')} {_share(profile, name):.0%}" for name in _losses(profile)
    )
    return f"loss-bound: the loss terms are {_share(profile, *_losses(profile)):.0%} of the step ({each})"


def _communication_advice(profile: Profile) -> list[Advice]:
    rows = profile["images_per_step"]
    return [
        Advice(
            text="a larger batch: as many gradients for more images (scale the learning rate)",
            settings=(f"data.batch_size={2 * rows}",),
            gain=2 * _total(profile) / (2 * _total(profile) - _seconds(profile, "all_reduce")),
        )
    ]


def _own(rank: dict[str, Any]) -> float:
    """What a process does before it first waits for another one, seconds per step."""
    names = ("data_wait", "copy", "cache_read", "teacher", "student_forward", "other")
    return float(sum(rank["stages"].get(name, 0.0) for name in names))


def _skew(profile: Profile) -> float:
    """The share of the step that the others wait for the slowest process."""
    own = sorted(map(_own, profile["ranks"]))
    return (own[-1] - own[0]) / _total(profile) if len(own) > 1 else 0.0


def _straggler_words(profile: Profile) -> str:
    ranks = sorted(profile["ranks"], key=_own)
    fast, slow = ranks[0]["stages"], ranks[-1]["stages"]
    stage = max(slow, key=lambda name: slow[name] - fast.get(name, 0.0) if name != "all_reduce" else 0.0)
    return (
        f"a slow process: rank {ranks[-1]['rank']} needs {1000 * _own(ranks[-1]):,.1f} ms a step for its own work and "
        f"rank {ranks[0]['rank']} {1000 * _own(ranks[0]):,.1f} ms, mostly in {stage}; all wait for the slowest"
    )


def _straggler_advice(profile: Profile) -> list[Advice]:
    gain = 1 / max(1 - _skew(profile), 0.01)
    return [
        Advice(text="look at that rank's machine: other jobs, storage, clocks", command="nvidia-smi", gain=gain)
    ]


def evaluation_share(profile: Profile) -> float:
    """Share of the time between two evaluations that evaluating takes."""
    steps = -(-profile["dataset"]["images"] // profile["images_per_step"])
    training = profile["about"]["eval_every"] * steps * profile["step"]["mean"]
    evaluating = float(profile["evaluation"]["seconds"])
    return evaluating / (evaluating + training)


def _evaluation_advice(profile: Profile) -> list[Advice]:
    every, share = profile["about"]["eval_every"], evaluation_share(profile)
    return [
        Advice(
            text="evaluate less often",
            settings=(f"eval.every={5 * every}",),
            gain=1 / (1 - share + share / 5),
        )
    ]


def _batch_setting(profile: Profile) -> str:
    return f"data.batch_size={2 * profile['images_per_step']}"


def _batch_words(profile: Profile) -> str:
    measured = profile["alternatives"][_batch_setting(profile)]
    return (
        f"too small a batch: twice as large a one costs the student {2 * measured['then'] / measured['now']:.2f} times "
        "the time; what it has to do anyway, whatever the batch, is most of the rest"
    )


RULES = (
    *(
        Rule(
            kind=kind,
            share=_data_share(stage),
            threshold=WAITING,
            words=_data_words(stage),
            advice=advice,
        )
        for kind, stage, advice in (
            ("storage-bound", "read", _storage_advice),
            ("decode-bound", "decode", _decode_advice),
            ("augment-bound", "augment", _augment_advice),
        )
    ),
    Rule(
        kind="copy-bound",
        share=lambda profile: _share(profile, "copy"),
        threshold=0.1,
        words=lambda profile: (
            f"copy-bound: bringing batches to the device is {_share(profile, 'copy'):.0%} of the step and hides "
            "behind nothing"
        ),
        advice=_copy_advice,
    ),
    Rule(
        kind="cache-bound",
        share=lambda profile: _share(profile, "cache_read"),
        threshold=0.15,
        words=lambda profile: (
            f"cache-bound: reading the teacher cache is {_share(profile, 'cache_read'):.0%} of the step"
        ),
        advice=lambda profile: [
            Advice(text="half the bytes a row; fill the cache again", settings=("cache.dtype=uint8",)),
        ],
    ),
    Rule(
        kind="teacher-bound",
        share=lambda profile: _share(profile, "teacher"),
        threshold=0.2,
        words=_teacher_words,
        advice=_teacher_advice,
    ),
    Rule(
        kind="loss-bound",
        share=lambda profile: _share(profile, *_losses(profile)),
        threshold=0.3,
        words=_loss_words,
        advice=_loss_advice,
    ),
    Rule(
        kind="straggler",
        share=_skew,
        threshold=0.1,
        words=_straggler_words,
        advice=_straggler_advice,
        weight=1.5,  # its own slow stage, and the others' wait for it, have the same share
    ),
    Rule(
        kind="communication-bound",
        share=lambda profile: _share(profile, "all_reduce"),
        threshold=0.2,
        words=lambda profile: (
            f"communication-bound: waiting for other processes' gradients is {_share(profile, 'all_reduce'):.0%} "
            "of the step"
        ),
        advice=_communication_advice,
    ),
    Rule(
        kind="evaluation-bound",
        share=evaluation_share,
        threshold=0.3,
        words=lambda profile: f"evaluation-bound: evaluating is {evaluation_share(profile):.0%} of a run's time",
        advice=_evaluation_advice,
    ),
    Rule(
        kind="small-batch",
        share=lambda profile: _saving(profile, _batch_setting(profile)),
        threshold=0.25,
        words=_batch_words,
        advice=lambda profile: _measured(
            profile, _batch_setting(profile), "fewer, larger steps (scale the learning rate)"
        ),
    ),
)


# ---- healthy


def _model_words(profile: Profile) -> str:
    own, ceiling = profile["images_per_second"], profile["ceilings"]["synthetic"]
    reached = f"of the {ceiling:,.0f} that are reached" if own < ceiling else "as many as"
    return (
        f"healthy: the student itself is the limit, {_share(profile, *STUDENT):.0%} of the step; {own:,.0f} images/s, "
        f"{reached} without any data"
    )


def _student_advice(profile: Profile, *, compiled: bool) -> list[Advice]:
    """A faster student: what was measured to be one, and torch.compile, which takes too long to try."""
    advice = _measured(profile, "train.precision=bf16", "let the student compute in bf16")
    for each in ("true", "false"):
        advice += _measured(profile, f"student.channels_last={each}", "another order of pixels in memory")
    if compiled and not profile["about"]["compile"]:
        advice.append(Advice(text="compile the student; not measured, try it", settings=("train.compile=true",)))
    return advice


def _notes(profile: Profile) -> Iterable[str]:
    """What limits nothing now, but is worth knowing."""
    about, memory = profile["about"], profile["memory"]
    teacher = _share(profile, "teacher")
    if about["teacher_mode"] == "online" and teacher < 0.1:
        yield f"the teacher is {teacher:.0%} of the step: a cache would save little, do not bother"
    if memory["device_total"] and memory["device_peak"] < 0.5 * memory["device_total"]:
        unused = human_bytes(memory["device_total"] - memory["device_peak"])
        yield f"{unused} of GPU memory are unused: room for a larger data.batch_size, or data.backend=resident"
    if (needed := _cores_to_feed(profile)) and about["backend"] != "resident":
        cores, rate = _cores(profile), 1 / profile["loader_cpu_seconds_an_image"]
        yield (
            f"loading costs a core per {rate:,.0f} images/s ({about['backend']}): without waiting, a process's step "
            f"could take {_without_data(profile) / about['processes']:,.0f}, the work of {needed:.1f} cores; it has {cores}"
            + (", so store smaller images or raw pixels (docs/backends.md)" if needed > cores else "")
        )
    cold = profile["cold"]["read_seconds_an_image"]
    steps_rate = profile["images_per_second"] / about["processes"]
    if cold and cold * steps_rate > 1:
        yield (
            f"a first epoch from cold storage is limited to {about['processes'] / cold:,.0f} images/s, "
            f"{cold * steps_rate:.1f} times slower than later ones"
        )
    if about["workers"] > (os.cpu_count() or 1):
        yield f"data.workers={about['workers']} is more than this machine's {os.cpu_count()} cores"
