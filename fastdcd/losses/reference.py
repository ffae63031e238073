"""DCD as the paper writes it: the readable reference. `fastdcd.losses.dcd` computes it faster and in less memory.

Shapes: N rows, D embedding dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DCD(NamedTuple):
    """A DCD loss and its two parts, all 0-dimensional."""

    loss: Tensor
    contrast: Tensor
    consist: Tensor


def upcast(tensor: Tensor) -> Tensor:
    """float32 or wider: losses are computed no narrower, whatever autocast does around them."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dcd(
    z_s: Tensor,
    z_t: Tensor,
    tau: Tensor,
    *,
    alpha: float = 0.5,
    b: Tensor | None = None,
    labels: Tensor | None = None,
    divisor: float | None = None,
) -> DCD:
    """DCD (arXiv 2407.11802, eq. 2 to 7) with its N x N similarity matrix written out.

    Args:
        z_s, z_t: unit-norm embeddings [N, D] of student and teacher.
        tau: 0-dimensional temperature, multiplies the similarities.
        alpha: weight of the consistency term.
        b: 0-dimensional bias added to the similarities; it cancels, its gradient is zero.
        labels: int64 [N]; if given, other rows of the same class are left out of both softmaxes.
        divisor: divide the sums over rows by this instead of N.

    Returns the loss = contrast + alpha * consist, and both parts.
    """
    rows = len(z_s)
    divisor = rows if divisor is None else divisor
    s_NN = tau * (upcast(z_s) @ upcast(z_t).T)
    if b is not None:
        s_NN = s_NN + b
    if labels is not None:
        same = (labels[:, None] == labels[None, :]) & ~torch.eye(rows, dtype=torch.bool, device=labels.device)
        # finite, so that 0 * log-ratio stays 0 where both probabilities vanish
        s_NN = s_NN.masked_fill(same, -1e4)
    log_p_NN = F.log_softmax(s_NN, dim=1)  # student i against all teachers
    log_q_NN = F.log_softmax(s_NN.T, dim=1)  # teacher i against all students
    contrast = -log_p_NN.diagonal().sum() / divisor
    consist = F.kl_div(log_p_NN, log_q_NN, reduction="sum", log_target=True) / divisor  # KL(Q || P)
    return DCD(contrast + alpha * consist, contrast, consist)


def normalize(x_ND: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows scaled to unit L2 norm, in float32 or wider; a (near) zero row stays near zero.

    eps enters under the root, so that the gradient of a zero row is at most 1/eps; F.normalize's clamp at
    1e-12 lets it reach 1e12.
    """
    x_ND = upcast(x_ND)
    return x_ND * torch.rsqrt(x_ND.square().sum(1, keepdim=True) + eps**2)
