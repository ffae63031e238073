"""DCD, dispatched to its fastest form."""

from __future__ import annotations

from torch import Tensor

from fastdcd import losses


def dcd(
    z_s: Tensor,
    z_t: Tensor,
    tau: Tensor,
    *,
    alpha: float = 0.5,
    labels: Tensor | None = None,
    negatives: str = "local",
    divisor: float | None = None,
    form: str = "auto",
) -> losses.DCD:
    """DCD of local rows [N, D]; its parts are detached, for logging."""
    loss, contrast, consist = losses.dcd(z_s, z_t, tau, alpha=alpha, labels=labels, divisor=divisor)
    return losses.DCD(loss, contrast.detach(), consist.detach())
