"""The loss terms. Start here: one entry in TERMS adds a loss, everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcd.config import Loss
from fastdcd.losses import dcd as fused
from fastdcd.losses import logits, reference
from fastdcd.models import ModelOutput


class LossInputs(NamedTuple):
    """What a loss term may look at. Row i of everything belongs to the same image."""

    student: ModelOutput  # features [n, d_s], logits [n, classes]
    teacher: ModelOutput | None  # features [n, d_t], logits [n, classes], float32, no gradient
    labels: Tensor  # int64 [n]
    divisor: float  # rows of the batch over all processes / processes: DDP's mean is then the global mean


class LossTerm(nn.Module):
    """One loss term. `forward` returns the value to minimise and named parts to log, all 0-dimensional."""

    def __init__(self, config: Loss, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step."""


class CrossEntropy(LossTerm):
    """Cross-entropy with the labels, with label smoothing."""

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        total = F.cross_entropy(
            reference.upcast(inputs.student.logits),  # [n, classes]
            inputs.labels,
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        loss = total / inputs.divisor
        return loss, {"ce": loss.detach()}


class KnowledgeDistillation(LossTerm):
    """T^2 KL(teacher || student) of softened logits (Hinton et al. 2015)."""

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        loss = logits.kd(
            inputs.student.logits,
            inputs.teacher.logits,
            self.config.kd_temperature,
            divisor=inputs.divisor,
        )
        return loss, {"kd": loss.detach()}


class DCD(LossTerm):
    """Discriminative and consistent distillation (arXiv 2407.11802, eq. 2 to 7).

    Attributes:
        student_head, teacher_head: linear maps to the embedding, [feat_dim, d].
        log_tau: the learnable temperature's logarithm, the paper's t.
        b: the paper's additive bias. It cancels in both softmaxes, so its gradient is identically zero and
            it never moves; it is kept because the paper has it.
    """

    def __init__(self, config: Loss, student_dim: int, teacher_dim: int) -> None:
        super().__init__(config, student_dim, teacher_dim)
        self.student_head = nn.Linear(student_dim, config.feat_dim)
        self.teacher_head = nn.Linear(teacher_dim, config.feat_dim)
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.tau_init)))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        config = self.config
        z_s = reference.normalize(self.student_head(reference.upcast(inputs.student.features)))  # [n, feat_dim]
        z_t = reference.normalize(self.teacher_head(inputs.teacher.features))  # [n, feat_dim]
        tau = self.log_tau.exp()
        result = fused.dcd(
            z_s,
            z_t,
            tau,
            alpha=config.alpha,
            labels=inputs.labels if config.mask_same_class else None,
            negatives=config.negatives,
            divisor=inputs.divisor,
            form=config.form,
        )
        # b takes part with weight zero, so that DDP finds a gradient for every parameter
        loss = result.loss + 0.0 * self.b
        return loss, {"dcd_contrast": result.contrast, "dcd_consist": result.consist, "tau": tau.detach()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep tau in [1/tau_max, tau_max] by moving t itself: a clamp inside the loss would kill its gradient
        at the bound for good."""
        bound = math.log(self.config.tau_max)
        self.log_tau.clamp_(-bound, bound)


# Loss weight in the config -> the term it switches on.
TERMS: dict[str, Callable[[Loss, int, int], LossTerm]] = {
    "ce": CrossEntropy,
    "kd": KnowledgeDistillation,
    "dcd": DCD,
}
