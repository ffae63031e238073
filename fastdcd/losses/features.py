"""Losses of features of one width, as pure functions: the plain baselines of feature distillation.

Shapes: N rows, D dimensions. Computed in float32 or wider.
"""

from __future__ import annotations

from torch import Tensor

from fastdcd.losses.reference import normalize, upcast


def mse(student_ND: Tensor, teacher_ND: Tensor, *, divisor: float | None = None) -> Tensor:
    """Mean squared difference over dimensions, averaged over rows (FitNets, arXiv 1412.6550, at the last layer)."""
    squared_ND = (upcast(student_ND) - upcast(teacher_ND)).square()
    return squared_ND.mean(1).sum() / (len(student_ND) if divisor is None else divisor)


def cosine(student_ND: Tensor, teacher_ND: Tensor, *, divisor: float | None = None) -> Tensor:
    """1 - cosine similarity, averaged over rows; half the squared distance of the rows scaled to unit norm."""
    squared_ND = (normalize(student_ND) - normalize(teacher_ND)).square()
    return squared_ND.sum() / 2 / (len(student_ND) if divisor is None else divisor)
