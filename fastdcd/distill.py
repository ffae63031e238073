"""The module that is trained and that DDP wraps: student, loss terms, and what the terms learn.

Losses live inside and are called through `forward`: parameters used around DDP get no gradient sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcd import fused, losses
from fastdcd.config import Loss
from fastdcd.models import FeatureModel, ModelOutput


class LossInputs(NamedTuple):
    """What a loss term may look at. Row i of everything belongs to the same image."""

    student: ModelOutput  # features [n, d_s], logits [n, classes]
    teacher: ModelOutput | None  # features [n, d_t], logits [n, classes], float32, no gradient
    labels: Tensor  # int64 [n]
    divisor: float  # rows of the batch over all processes / processes: DDP's mean is then the global mean


class Term(nn.Module):
    """One loss term. `forward` returns the value to minimise and named parts to log, all 0-dimensional."""

    def __init__(self, config: Loss, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step."""


class CrossEntropy(Term):
    """Cross-entropy with the labels, with label smoothing."""

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        total = F.cross_entropy(
            losses.wide(inputs.student.logits),  # [n, classes]
            inputs.labels,
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        loss = total / inputs.divisor
        return loss, {"ce": loss.detach()}


class KnowledgeDistillation(Term):
    """T^2 KL(teacher || student) of softened logits (Hinton et al. 2015)."""

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        loss = losses.kd(
            inputs.student.logits,
            inputs.teacher.logits,
            self.config.kd_temperature,
            divisor=inputs.divisor,
        )
        return loss, {"kd": loss.detach()}


class DCD(Term):
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
        z_s = losses.normalize(self.student_head(losses.wide(inputs.student.features)))  # [n, feat_dim]
        z_t = losses.normalize(self.teacher_head(inputs.teacher.features))  # [n, feat_dim]
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
TERMS: dict[str, Callable[[Loss, int, int], Term]] = {"ce": CrossEntropy, "kd": KnowledgeDistillation, "dcd": DCD}


class DistillModule(nn.Module):
    """The student and the loss terms whose weight is above zero."""

    def __init__(self, student: FeatureModel, normalize: nn.Module, config: Loss, *, teacher_dim: int = 0) -> None:
        """`normalize` turns uint8 [n, 3, H, W] into the student's input; teacher_dim is d_t, 0 without one."""
        super().__init__()
        self.student, self.normalize = student, normalize
        self.weights = {name: getattr(config, name) for name in TERMS if getattr(config, name) > 0}
        self.terms = nn.ModuleDict(
            {name: TERMS[name](config, student.feature_dim, teacher_dim) for name in self.weights}
        )

    def forward(
        self, images: Tensor, labels: Tensor, teacher: ModelOutput | None, divisor: float
    ) -> dict[str, Tensor]:
        """The weighted loss and its parts for images uint8 [n, 3, H, W] and labels int64 [n].

        Returns "loss" (to call backward on) and the terms' named parts, detached, all 0-dimensional.
        """
        output = self._look(images)
        # the losses choose their own precision: bf16 over them costs up to 4 % of gradient error
        with torch.autocast(images.device.type, enabled=False):
            inputs = LossInputs(output, teacher, labels, divisor)
            total = images.new_zeros((), dtype=torch.float32)
            parts: dict[str, Tensor] = {}
            for name, term in self.terms.items():
                value, named = term(inputs)
                total = total + self.weights[name] * value
                parts.update(named)
        return {"loss": total, **parts}

    def _look(self, images: Tensor) -> ModelOutput:
        if len(images) or self.synchronised:
            output: ModelOutput = self.student(self.normalize(images))
            return output
        # This process has no share of the last batch. DDP still waits for its gradients, which are zero: a black
        # image is looked at, without touching BatchNorm statistics, and left out.
        self.student.eval()
        output = self.student(self.normalize(images.new_zeros(1, *images.shape[1:])))
        self.student.train()
        return ModelOutput(output.features[:0], output.logits[:0])

    @property
    def synchronised(self) -> bool:
        """Whether BatchNorm looks at all processes' rows, so that none may stay away."""
        return any(isinstance(each, nn.SyncBatchNorm) for each in self.student.modules())

    def predict(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images uint8 [n, 3, H, W], without any loss."""
        logits: Tensor = self.student(self.normalize(images)).logits
        return logits

    def after_step(self) -> None:
        """Let the terms bound what they learn, after an optimizer step."""
        for term in self.terms.values():
            term.after_step()  # type: ignore[operator]


def undecayed(module: nn.Module, *, decay_norms_and_biases: bool) -> set[str]:
    """Names of parameters that take no weight decay.

    Always the temperature, its bias and the heads' biases; with decay_norms_and_biases false also every
    normalisation weight and bias of the student (all parameters of fewer than two dimensions).
    """
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 and not (decay_norms_and_biases and name.startswith("student."))
    }
