"""The loss terms. Start here: one entry in TERMS, or one call of `register_loss`, adds a loss everywhere.

Its weight `loss.NAME` and its settings become config keys; metrics.jsonl, the profiler's stages and verdict, and the
reports know it by what its class declares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastdcd.config import Fraction, Loss, Positive, Weight
from fastdcd.losses import dcd as fused
from fastdcd.losses import logits, reference
from fastdcd.models import ModelOutput


class LossInputs(NamedTuple):
    """What a loss term may look at. Row i of everything belongs to the same image."""

    student: ModelOutput  # features [n, d_s], logits [n, classes]
    teacher: ModelOutput | None  # features [n, d_t], logits [n, classes], float32, no gradient
    labels: Tensor  # int64 [n]
    divisor: float  # rows of the batch over all processes / processes: DDP's mean is then the global mean


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """A term without settings of its own."""


class LossTerm(nn.Module):
    """One loss term. `forward` returns the value to minimise and named parts to log, all 0-dimensional.

    Class attributes, for a new term to set:
        title: what profiles and reports call it.
        default: its weight where the config gives none.
        Settings: frozen dataclass of its own config keys, which lie beside the weights in the section `loss`; every
            field has a default. Its __post_init__ may raise ValueError, "KEY: got ..., expected ...".
        logged: key in metrics.jsonl -> title and unit in reports, for each of the named parts.
        needs_teacher: whether it reads the teacher's outputs.
        needs_teacher_logits: whether it reads the teacher's logits: a teacher without classifier has none.
        trains_classifier: whether its gradient reaches the student's classifier. One such term must be on.
        pairwise: whether its work grows with the square of the batch.
    """

    title: ClassVar[str]
    default: ClassVar[float] = 0.0
    Settings: ClassVar[type] = NoSettings
    logged: ClassVar[Mapping[str, tuple[str, str]]] = {}
    needs_teacher: ClassVar[bool] = True
    needs_teacher_logits: ClassVar[bool] = True
    trains_classifier: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    def __init__(self, settings: Any, student_dim: int, teacher_dim: int) -> None:
        """`settings` is an instance of Settings; features have student_dim and teacher_dim numbers."""
        super().__init__()
        self.settings = settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step."""


class CrossEntropy(LossTerm):
    """Cross-entropy with the labels, with label smoothing."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        label_smoothing: Fraction = 0.0

    title = "cross-entropy"
    default = 1.0
    logged: ClassVar = {"ce": ("Cross-entropy", "nats")}
    needs_teacher = needs_teacher_logits = False
    trains_classifier = True
    settings: Settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        total = F.cross_entropy(
            reference.upcast(inputs.student.logits),  # [n, classes]
            inputs.labels,
            reduction="sum",
            label_smoothing=self.settings.label_smoothing,
        )
        loss = total / inputs.divisor
        return loss, {"ce": loss.detach()}


class KnowledgeDistillation(LossTerm):
    """T^2 KL(teacher || student) of softened logits (Hinton et al. 2015)."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        kd_temperature: Annotated[float, Field(gt=0)] = 4.0

    title = "KD"
    logged: ClassVar = {"kd": ("KD", "nats x T²")}
    trains_classifier = True
    settings: Settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        loss = logits.kd(
            inputs.student.logits,
            inputs.teacher.logits,
            self.settings.kd_temperature,
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

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        alpha: Weight = 0.5
        """Weight of the consistency term."""
        feat_dim: Positive = 128
        """Dimensions of the embedding."""
        tau_init: Annotated[float, Field(gt=0)] = math.e
        """The learnable temperature at the start (the paper's t = 1, tau = e)."""
        tau_max: Annotated[float, Field(gt=0, le=40)] = 10.0
        negatives: Literal["global", "local"] = "global"
        """The rows of all processes, or of each one's own."""
        mask_same_class: bool = False
        """Leave pairs of the same class out of the negatives (the paper keeps them)."""
        form: Literal["auto", "naive", "compiled", "tiled", "triton"] = "auto"
        """How it is computed; auto takes what was measured to be fastest."""

        def __post_init__(self) -> None:
            if self.tau_init > self.tau_max:
                raise ValueError(f"tau_init: got {self.tau_init}, expected at most tau_max = {self.tau_max}")

    title = "DCD"
    logged: ClassVar = {
        "dcd_contrast": ("DCD, contrast", "nats"),
        "dcd_consist": ("DCD, consistency", "nats"),
        "tau": ("Temperature tau", ""),
    }
    needs_teacher_logits = False
    pairwise = True
    settings: Settings

    def __init__(self, settings: Settings, student_dim: int, teacher_dim: int) -> None:
        super().__init__(settings, student_dim, teacher_dim)
        self.student_head = nn.Linear(student_dim, settings.feat_dim)
        self.teacher_head = nn.Linear(teacher_dim, settings.feat_dim)
        self.log_tau = nn.Parameter(torch.tensor(math.log(settings.tau_init)))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        settings = self.settings
        z_s = reference.normalize(self.student_head(reference.upcast(inputs.student.features)))  # [n, feat_dim]
        z_t = reference.normalize(self.teacher_head(inputs.teacher.features))  # [n, feat_dim]
        tau = self.log_tau.exp()
        result = fused.dcd(
            z_s,
            z_t,
            tau,
            alpha=settings.alpha,
            labels=inputs.labels if settings.mask_same_class else None,
            negatives=settings.negatives,
            divisor=inputs.divisor,
            form=settings.form,
        )
        # b takes part with weight zero, so that DDP finds a gradient for every parameter
        loss = result.loss + 0.0 * self.b
        return loss, {"dcd_contrast": result.contrast, "dcd_consist": result.consist, "tau": tau.detach()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep tau in [1/tau_max, tau_max] by moving t itself: a clamp inside the loss would kill its gradient
        at the bound for good."""
        bound = math.log(self.settings.tau_max)
        self.log_tau.clamp_(-bound, bound)


# Name of the weight in the config -> the term it switches on.
TERMS: dict[str, type[LossTerm]] = {
    "ce": CrossEntropy,
    "kd": KnowledgeDistillation,
    "dcd": DCD,
}


def register_loss(name: str, term: type[LossTerm]) -> None:
    """Add a loss term from outside, before a config is read: `loss.NAME` is its weight from then on.

    Raises ValueError if the name, or one of its settings or logged keys, already means something else.
    """
    if TERMS.get(name) is term:
        return
    if not name.isidentifier():
        raise ValueError(f"register_loss: got the name {name!r}, expected letters, digits and underscores")
    taken = {*TERMS, *(each.name for known in TERMS.values() for each in fields(known.Settings))}
    keys = [name, *(each.name for each in fields(term.Settings))]
    logged = {"loss", "lr", "kind", "epoch", "step", *(key for known in TERMS.values() for key in known.logged)}
    if clash := [key for key in keys if key in taken] + [key for key in term.logged if key in logged]:
        raise ValueError(f"register_loss: {name}: {clash[0]!r} is taken; choose another name")
    TERMS[name] = term


@functools.cache
def _section(terms: tuple[tuple[str, type[LossTerm]], ...]) -> type[Loss]:
    keys: list[tuple[str, Any, Any]] = [(name, Weight, term.default) for name, term in terms]
    for _, term in terms:
        hints = get_type_hints(term.Settings, include_extras=True)
        keys += [(each.name, hints[each.name], each.default) for each in fields(term.Settings)]
    made = make_dataclass("Loss", keys, bases=(Loss,), frozen=True, kw_only=True, namespace={"terms": dict(terms)})
    return made


def loss_section() -> type[Loss]:
    """The config section `loss`: the weight of every term and their settings, side by side."""
    return _section(tuple(TERMS.items()))
