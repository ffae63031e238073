"""Whether a teacher's features can be stored as a cache would store them, found out before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcd.cache.store import CODECS


def least_cosine(first: Tensor, second: Tensor) -> float:
    """The least cosine between rows of [n, d]; rows that are equal have 1, all-zero ones too. NaN if a row has one."""
    cosines = torch.nn.functional.cosine_similarity(first, second)
    return float(torch.where((first == second).all(1), 1.0, cosines).min())


def check_storable(features: Tensor, dtype: str) -> None:
    """Raises ValueError, with the range seen and the dtype to take, if features [n, d] do not survive being stored."""
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise ValueError(
            f"the teacher's features of {bad} of {len(features)} images are not finite; nothing was written. Look at "
            "teacher.checkpoint and teacher.mean/std, or set teacher.precision=fp32"
        )
    if _survive(features, dtype):
        return
    sizes = features.abs()
    others = [name for name in ("bf16", "fp32") if _survive(features, name)]
    raise ValueError(
        f"cache.dtype: {dtype} cannot hold the teacher's features: their magnitudes reach {float(sizes.max()):.3g} "
        f"(median {float(sizes.median()):.3g}), and rows come back changed; nothing was written. Set "
        f"cache.dtype={others[0] if others else 'fp32'}"
    )


def _survive(features: Tensor, dtype: str) -> bool:
    codec = CODECS[dtype]
    return least_cosine(features, codec.decode(codec.encode(features))) >= codec.cosine
