"""The stages of a step, in its order: those every step has, and one for each registered loss term."""

from __future__ import annotations

from collections.abc import Iterable

from fastdcd.losses.terms import TERMS

LOSS = "loss."  # + the term's name
_BEFORE = {
    "data_wait": "wait for data",
    "copy": "copy to device",
    "cache_read": "teacher cache",
    "teacher": "teacher forward",
    "student_forward": "student forward",
}
_AFTER = {
    "loss_backward": "losses backward",
    "backward": "student backward",
    "all_reduce": "all-reduce",
    "optimizer": "optimizer",
    "other": "other",
}


def stages() -> dict[str, str]:
    """Key in a profile -> title, in the order of a step."""
    return {**_BEFORE, **{f"{LOSS}{name}": term.title for name, term in TERMS.items()}, **_AFTER}


def in_order(found: Iterable[str]) -> list[str]:
    """Stages in the order of a step; what is not known (a loss of a program that registered it) comes last."""
    known = list(stages())
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))
