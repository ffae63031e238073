"""A profile as text for a terminal, and two profiles side by side."""

from __future__ import annotations

from typing import Any

from fastdcd.cli import human_time
from fastdcd.profiler.projection import says_something
from fastdcd.profiler.verdict import evaluation_share

Profile = dict[str, Any]
STARTS = 0.09  # what two starts on shared cores can differ by, which neither can see: docs/log.md


def table(profile: Profile) -> str:
    """Stages, ceilings, verdict and projection."""
    about, found = profile["about"], profile["verdict"]
    total = sum(values["mean"] for values in profile["stages"].values())
    lines = [
        f"{about['student']} at {about['image_size']} px, {profile['images_per_step']} images per step on "
        f"{about['processes']} x {about['device']}, {about['backend']} with {about['workers']} workers: "
        f"{profile['images_per_second']:,.0f} images/s, {1000 * profile['step']['mean']:.2f} ms a step",
        "",
        f"{'stage':<17}{'ms':>9}{'share':>8}  {'quartiles, ms':<19}{'alone, ms':>10}",
    ]
    for name, values in profile["stages"].items():
        alone = profile["alone"].get(name)
        quartiles = f"{1000 * values['quartile_25']:.2f} to {1000 * values['quartile_75']:.2f}"
        lines.append(
            f"{name:<17}{1000 * values['mean']:>9.2f}{values['mean'] / total:>8.1%}  {quartiles:<19}"
            + (f"{1000 * alone['mean']:>10.2f}" if alone else "")
        )
    lines += ["", f"{'ceiling':<22}{'images/s':>10}"]
    lines += [f"{name.replace('_', ' '):<22}{rate:>10,.0f}" for name, rate in profile["ceilings"].items()]
    parts = {name: value for name, value in profile["loader_seconds_an_image"].items() if name != "loader"}
    if parts:
        whole = sum(parts.values())
        lines += [
            "",
            "loader's time: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()),
        ]
    cold, evaluation = profile["cold"], profile["evaluation"]
    lines += [
        "",
        f"cold start: {human_time(cold['open_seconds'])} to open the data, first batch after "
        f"{human_time(cold['first_batch_seconds'])}, first step after another {human_time(cold['first_step_seconds'])}",
        f"evaluation: {human_time(evaluation['seconds'])}, {evaluation_share(profile):.0%} of the run",
    ]
    lines += ["", f"verdict: {found['words']}"]
    for advice in found["advice"]:
        gain = f" ({advice['gain']:.2f} times the rate)" if advice["gain"] else ""
        lines.append(f"  - {advice['text']}{gain}")
        lines += [f"      {advice['command']}"] if advice["command"] else []
        lines += [f"      --set {' '.join(advice['settings'])}"] if advice["settings"] else []
    lines += [f"  note: {note}" for note in found["notes"]]
    if not says_something(profile):
        return "\n".join(lines)
    lines += ["", f"PROJECTION to ImageNet, {about['epochs']} epochs (a model: see docs/profile.md)"]
    lines.append(f"{'devices':>8}{'images/s':>12}{'epoch':>12}{'recipe':>12}{'cost':>10}")
    for row in profile["projection"]:
        cost = f"{row['cost']:,.2f}" if row["cost"] is not None else "--price"
        lines.append(
            f"{row['gpus']:>8}{row['images_per_second']:>12,.0f}{human_time(row['epoch_seconds']):>12}"
            f"{human_time(row['recipe_seconds']):>12}{cost:>10}"
        )
    return "\n".join(lines)


def compare(first: Profile, second: Profile) -> str:
    """Two profiles stage by stage; a difference counts if their quartiles do not overlap."""
    lines = [f"{'stage':<17}{'A, ms':>10}{'B, ms':>10}{'B / A':>8}  difference"]
    rows = [("step", first["step"], second["step"])]
    names = [*first["stages"], *(name for name in second["stages"] if name not in first["stages"])]
    rows += [(name, first["stages"].get(name), second["stages"].get(name)) for name in names]
    for name, a, b in rows:
        cells = [f"{1000 * each['median']:>10.2f}" if each else f"{'-':>10}" for each in (a, b)]
        if a and b:
            ratio = f"{b['median'] / a['median']:>8.2f}" if a["median"] > 0 else f"{'-':>8}"
            words = "beyond the spread" if apart(a, b) else "within the spread"
        else:
            ratio, words = f"{'-':>8}", "only in one"
        lines.append(f"{name:<17}{cells[0]}{cells[1]}{ratio}  {words}")
    return "\n".join(lines)


def apart(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two spreads (medians with quartiles) do not overlap, and differ by more than two starts of the same
    program do."""
    between = abs(a["median"] - b["median"]) > STARTS * max(a["median"], b["median"])
    return between and not overlap(a, b)


def overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether the quartiles of two spreads do."""
    return a["quartile_25"] <= b["quartile_75"] and b["quartile_25"] <= a["quartile_75"]
