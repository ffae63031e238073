"""A profile as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from fastdcd import html_report
from fastdcd.cli import human_time
from fastdcd.profiler.projection import says_something
from fastdcd.profiler.stages import stages
from fastdcd.profiler.verdict import evaluation_share
from pipelines.files import human_bytes


def page(profile: dict[str, Any]) -> str:
    """The page of a profile with its verdict and projection, as tools/profile_throughput.py writes them."""
    about = profile["about"]
    waits = profile["data_wait_seconds"]
    subtitle = (
        f"{about['config']}: {about['student']} at {about['image_size']} px"
        + (f", teacher {about['teacher']} ({about['teacher_mode']})" if about["teacher"] else "")
        + f", {about['backend']} with {about['workers']} workers, {about['processes']} x {about['device']}"
    )
    means = {name: values["mean"] for name, values in profile["stages"].items()}
    total = sum(means.values())
    wait = means.get("data_wait", 0.0) / total
    parts = [
        html_report.tiles(
            {
                "images per second": f"{profile['images_per_second']:,.0f}",
                "step": f"{1000 * profile['step']['mean']:.1f} ms",
                "waiting for data": f"{wait:.0%}",
                "without data (synthetic)": f"{profile['ceilings']['synthetic']:,.0f}/s",
            }
        ),
        _verdict(profile["verdict"]),
        html_report.card(
            "One step, stage by stage",
            html_report.waterfall(
                [
                    (_name(key), 1000 * each, f"{1000 * each:.2f} ms, {each / total:.0%}")
                    for key, each in means.items()
                ],
                key=_key(means),
            ),
            note="Mean of the steady steps. On a GPU a stage is the time between events on its own timeline; "
            "work that hides behind it does not show.",
            name="waterfall",
        ),
        html_report.grid(
            [
                html_report.card("Waiting for data", _waits(waits), note=_WAITS, name="waits"),
                html_report.card("Ceilings", _ceilings(profile), note=_CEILINGS, name="ceilings"),
                html_report.card("Memory", _memory(profile["memory"]), name="memory"),
                html_report.card(
                    "Beside the steps",
                    _beside(profile),
                    note=_BESIDE if profile["cold"]["read_seconds_an_image"] else "",
                    name="beside",
                ),
            ]
        ),
        html_report.card(
            "Processes", _ranks(profile["ranks"]), note=_RANKS if len(profile["ranks"]) > 1 else "", name="ranks"
        ),
    ]
    if says_something(profile):
        card = html_report.card(
            "Projection to ImageNet", _projection(profile), note=_PROJECTION, name="projection"
        )
        parts.append(card)
    return html_report.document("Where the time goes", subtitle, parts)


_WAITS = "How long each step waited for its batch; heights are square roots of counts."
_CEILINGS = (
    "Synthetic: no data at all. Replay: real batches kept in memory. Plain cross-entropy: the student without "
    "distillation, on synthetic data. Loader: batches made and thrown away."
)
_BESIDE = "The cold read is after the system was asked to forget the files; a first epoch may have to read so."
_RANKS = "All take as long: what one has less of its own work, it waits for the others (all-reduce)."
_PROJECTION = (
    "A model, not a measurement: this step on every device with a loader of its own, a ring all-reduce (on GPUs behind "
    "the backward pass as far as it fits), a copy of the gradients, and the wait for the slowest."
)


def _name(key: str) -> str:
    return stages().get(key, key)


def _key(found: Iterable[str]) -> list[str]:
    """Names of all stages: a stage's place among them is its colour, in every figure."""
    return [_name(key) for key in [*stages(), *(key for key in found if key not in stages())]]


def _verdict(found: dict[str, Any]) -> str:
    head, _, rest = found["words"].partition(":")
    lines = [f"<p><strong>{escape(head)}</strong>:{escape(rest)}.</p>"]
    for advice in found["advice"]:
        gain = f" <strong>{advice['gain']:.2f} times the rate</strong>" if advice["gain"] else ""
        settings = f"<code>--set {escape(' '.join(advice['settings']))}</code>" if advice["settings"] else ""
        command = f"<code>{escape(advice['command'])}</code><br>" if advice["command"] else ""
        lines.append(f"<p>→ {escape(advice['text'])}{gain}<br>{command}{settings}</p>")
    lines += [f'<p class="soft">{escape(note)}</p>' for note in found["notes"]]
    good = " good" if found["healthy"] else ""
    return f'<section class="card verdict{good}" id="verdict"><h2>Verdict</h2>{"".join(lines)}</section>'


def _waits(waits: list[float]) -> str:
    milliseconds = [1000 * each for each in waits]
    marks = dict(zip(("p50", "p95", "p99"), np.percentile(milliseconds, (50, 95, 99)).tolist(), strict=True))
    return html_report.histogram(milliseconds, marks, unit="ms")


def _ceilings(profile: dict[str, Any]) -> str:
    own = profile["images_per_second"]
    rows = [("this run", f"{own:,.0f}", "1.00")]
    rows += [
        (name.replace("_", " "), f"{rate:,.0f}", html_report.number(rate / own))
        for name, rate in profile["ceilings"].items()
    ]
    body = html_report.table(("", "images/s", "times"), rows)
    loading = profile["loader_seconds_an_image"]
    parts = [
        (name, value, f"{value / loading['loader']:.0%}") for name, value in loading.items() if name != "loader"
    ]
    if len(parts) > 1:
        body += '<p class="small" style="margin-top:14px">The loader\'s own time</p>' + html_report.stack(parts)
    return body


def _memory(memory: dict[str, Any]) -> str:
    names = ("student", "gradients", "optimizer", "teacher", "activations", "images")
    body = html_report.stack([(name, memory[name], human_bytes(memory[name])) for name in names if memory[name]])
    rows = [("peak of the process", human_bytes(memory["process_peak"]))]
    if memory["device_peak"] is not None:
        rows.append(
            (
                "peak on the device",
                f"{human_bytes(memory['device_peak'])} of {human_bytes(memory['device_total'])}",
            )
        )
    return body + html_report.table(("", ""), rows)


def _beside(profile: dict[str, Any]) -> str:
    cold, evaluation, processes = profile["cold"], profile["evaluation"], profile["about"]["processes"]
    rows = [
        ("opening the data", human_time(cold["open_seconds"])),
        ("first batch", human_time(cold["first_batch_seconds"])),
        ("first step", human_time(cold["first_step_seconds"])),
        ("an evaluation", f"{human_time(evaluation['seconds'])}, {evaluation_share(profile):.0%} of the run"),
    ]
    for name, seconds in (
        ("cold", cold["read_seconds_an_image"]),
        ("warm", profile["loader_seconds_an_image"].get("read")),
    ):
        if seconds:
            rows.append((f"storage read, {name}", f"{processes / seconds:,.0f} images/s"))
    return html_report.table(("", ""), rows)


def _ranks(ranks: list[dict[str, Any]]) -> str:
    names = list(ranks[0]["stages"])
    slowest = {name: max(rank["stages"].get(name, 0.0) for rank in ranks) for name in names}
    longest = sorted(names, key=lambda name: -slowest[name])[:6]
    shown = [name for name in names if name in longest]
    rows = [
        (
            f"rank {rank['rank']}",
            f"{1000 * rank['step']:.2f}",
            *(f"{1000 * rank['stages'].get(n, 0):.2f}" for n in shown),
        )
        for rank in ranks
    ]
    body = html_report.table(("", "step, ms", *map(_name, shown)), rows)
    if len(ranks) == 1:
        return body
    bars = [(f"rank {rank['rank']}", [1000 * rank["stages"].get(name, 0.0) for name in shown]) for rank in ranks]
    return html_report.stacks(bars, [_name(name) for name in shown], key=_key(names)) + body


def _projection(profile: dict[str, Any]) -> str:
    priced = any(row["cost"] is not None for row in profile["projection"])
    rows = [
        (
            f"{row['gpus']}",
            f"{row['images_per_second']:,.0f}",
            human_time(row["epoch_seconds"]),
            human_time(row["recipe_seconds"]),
            *([f"{row['cost']:,.2f}"] if priced else []),
        )
        for row in profile["projection"]
    ]
    epochs = profile["about"]["epochs"]
    head = ("devices", "images/s", "epoch", f"{epochs} epochs", *(["cost"] if priced else []))
    return html_report.table(head, rows)
