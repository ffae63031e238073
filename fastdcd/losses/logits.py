"""Losses of logits as pure functions: KD, DKD and DIST, and the standardisation of logits.

Shapes: N rows, C classes. Logits of any dtype; everything is computed in float32 or wider. Gradients flow to the
teacher's logits too, if they have any. `divisor` replaces N in means over rows (`LossInputs.divisor`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

from fastdcd.losses.reference import upcast

# Below this, a logit's share of a softmax is 0 in float32 and in float64; finite, so that 0 times it is 0.
_EXCLUDED = -1e4


def kd(student_NC: Tensor, teacher_NC: Tensor, temperature: float, *, divisor: float | None = None) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, averaged over rows (Hinton, Vinyals, Dean 2015)."""
    log_student_NC = F.log_softmax(upcast(student_NC) / temperature, dim=1)
    log_teacher_NC = F.log_softmax(upcast(teacher_NC) / temperature, dim=1)
    total = F.kl_div(log_student_NC, log_teacher_NC, reduction="sum", log_target=True)
    return total * temperature**2 / (len(student_NC) if divisor is None else divisor)


def standardize(logits_NC: Tensor) -> Tensor:
    """Each row's z-scores: (z - mean) / standard deviation, with C - 1 degrees of freedom.

    Logit standardisation (arXiv 2403.01427, eq. 12): the student need not match the teacher's scale of logits.
    """
    logits_NC = upcast(logits_NC)
    deviation_N1, mean_N1 = torch.std_mean(logits_NC, dim=1, keepdim=True)
    return (logits_NC - mean_N1) / (deviation_N1 + 1e-7)  # the authors' epsilon


def dkd(
    student_NC: Tensor,
    teacher_NC: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    weight_N: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """Decoupled knowledge distillation (arXiv 2203.08679, eq. 7): T^2 (alpha TCKD + beta NCKD), averaged over rows.

    TCKD is the KL divergence between (target, not target), NCKD that between the distributions over the other
    classes. Both are computed from log-probabilities: a target of probability 1 is no special case.

    Args:
        student_NC, teacher_NC: logits.
        target_N: int64, the class of each row.
        weight_N: weight of each row in the mean, for rows with several targets; 1 if not given.
    """
    student_NC, teacher_NC = upcast(student_NC) / temperature, upcast(teacher_NC) / temperature
    target_N1 = target_N[:, None]
    s_target_N1, s_rest_NC, log_student_NC = _decoupled(student_NC, target_N1)
    t_target_N1, t_rest_NC, log_teacher_NC = _decoupled(teacher_NC, target_N1)
    pair_N2 = torch.cat([t_target_N1, t_rest_NC], 1)
    tckd_N = (pair_N2.exp() * (pair_N2 - torch.cat([s_target_N1, s_rest_NC], 1))).sum(1)
    nckd_N = (log_teacher_NC.exp() * (log_teacher_NC - log_student_NC)).sum(1)
    total_N = alpha * tckd_N + beta * nckd_N
    if weight_N is not None:
        total_N = total_N * weight_N
    return total_N.sum() * temperature**2 / (len(student_NC) if divisor is None else divisor)


def _decoupled(logits_NC: Tensor, target_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target [N, 1], of all others together [N, 1], and of each other among themselves."""
    others_NC = logits_NC.scatter(1, target_N1, _EXCLUDED)
    of_others_N1 = others_NC.logsumexp(1, keepdim=True)
    target = logits_NC.gather(1, target_N1)
    # log sigmoid of their difference: exact where 1 - p would round to 0
    return F.logsigmoid(target - of_others_N1), F.logsigmoid(of_others_N1 - target), others_NC - of_others_N1


def dist(
    student_NC: Tensor,
    teacher_NC: Tensor,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    divisor: float | None = None,
) -> Tensor:
    """DIST (arXiv 2205.10536, eq. 9 and 10): T^2 (beta inter + gamma intra) of softened probabilities.

    inter is 1 - Pearson correlation between the classes of a row, averaged over rows; intra is 1 - correlation between
    the rows of a class, averaged over classes. Over processes a class's correlation takes the rows of all of
    them, which must all call this. It is a function of sums over rows, so those are exchanged and not the
    rows: 5 C + 1 numbers instead of N C. As with DCD, the gradient is this process's part times the number of processes.
    """
    student_NC = (upcast(student_NC) / temperature).softmax(1)
    teacher_NC = (upcast(teacher_NC) / temperature).softmax(1)
    inter_N = _correlation(
        *_moments(
            student_NC - student_NC.mean(1, keepdim=True), teacher_NC - teacher_NC.mean(1, keepdim=True), dim=1
        )
    )
    inter = (1 - inter_N).sum() / (len(student_NC) if divisor is None else divisor)
    # The derivative by a column's mean is 0, since deviations from it sum to 0: it needs no gradient.
    with torch.no_grad():
        ones_N1 = student_NC.new_ones(len(student_NC), 1)
        sums = _over_processes(torch.cat([student_NC, teacher_NC, ones_N1], 1).sum(0))
        mean_s_C, mean_t_C = (sums[:-1] / sums[-1].clamp(min=1)).chunk(2)
    own_3C = _moments(student_NC - mean_s_C, teacher_NC - mean_t_C, dim=0)
    intra_C = _correlation(*_SumOverProcesses.apply(own_3C))
    return temperature**2 * (beta * inter + gamma * (1 - intra_C).mean())


def _moments(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Sums of a b, a a and b b over a dimension of matrices: [3, the other dimension]."""
    return torch.stack([(a * b).sum(dim), (a * a).sum(dim), (b * b).sum(dim)])


def _correlation(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    """Pearson correlations from sums of products of deviations; 0, without a gradient, where nothing varies."""
    tiny = torch.finfo(aa.dtype).tiny
    return ab / (aa.clamp(min=tiny).sqrt() * bb.clamp(min=tiny).sqrt() + 1e-8)  # the authors' epsilon


def _over_processes(sums: Tensor) -> Tensor:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes of a tensor whose function is computed, alike, on each of them.

    The gradient by a process's own part is then the gradient by the sum, which each has: no communication. It
    is multiplied by the number of processes, over which DDP takes the mean.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _over_processes(own.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (distributed.get_world_size() if distributed.is_initialized() else 1)
