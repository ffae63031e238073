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

from fastdcd.config import Count, Fraction, Loss, Positive, Weight
from fastdcd.losses import dcd as fused
from fastdcd.losses import features, logits, reference
from fastdcd.models import ModelOutput
from pipelines.augment import Mixed


class LossInputs(NamedTuple):
    """What a loss term may look at. Row i of everything belongs to the same image."""

    student: ModelOutput  # features [n, d_s], logits [n, classes]
    teacher: ModelOutput | None  # features [n, d_t], logits [n, classes], float32, no gradient
    labels: Tensor  # int64 [n]
    divisor: float  # rows of the batch over all processes / processes: DDP's mean is then the global mean
    epoch: int = 0  # counted from 0, for terms that are warmed up
    mixed: Mixed | None = (
        None  # of mixup and cutmix: each row has a share of its label and the rest of its partner's
    )


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
    """Cross-entropy with the labels, with label smoothing; of mixed images, with both labels by their shares."""

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
        total = self._sum(inputs, inputs.labels, None)
        if inputs.mixed is not None:
            share = inputs.mixed.share
            total = self._sum(inputs, inputs.labels, share) + self._sum(
                inputs, inputs.mixed.partner_labels, 1 - share
            )
        loss = total / inputs.divisor
        return loss, {"ce": loss.detach()}

    def _sum(self, inputs: LossInputs, labels: Tensor, weight: Tensor | None) -> Tensor:
        """The sum over rows, each weighted if weights [n] are given."""
        student = reference.upcast(inputs.student.logits)  # [n, classes]
        smoothing = self.settings.label_smoothing
        if weight is None:
            return F.cross_entropy(student, labels, reduction="sum", label_smoothing=smoothing)
        return (weight * F.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)).sum()


class KnowledgeDistillation(LossTerm):
    """T^2 KL(teacher || student) of softened logits (Hinton et al. 2015)."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        kd_temperature: Annotated[float, Field(gt=0)] = 4.0
        kd_standardize: bool = False
        """Logit standardisation (arXiv 2403.01427): each row's logits as z-scores first. Its authors take
        kd_temperature 2, kd 9, ce 0.1."""

    title = "KD"
    logged: ClassVar = {"kd": ("KD", "nats x T²")}
    trains_classifier = True
    settings: Settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        student, teacher = inputs.student.logits, inputs.teacher.logits
        if self.settings.kd_standardize:
            student, teacher = logits.standardize(student), logits.standardize(teacher)
        loss = logits.kd(student, teacher, self.settings.kd_temperature, divisor=inputs.divisor)
        return loss, {"kd": loss.detach()}


class DecoupledKD(LossTerm):
    """Decoupled knowledge distillation (arXiv 2203.08679)."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        dkd_alpha: Weight = 1.0
        """Weight of target against all other classes."""
        dkd_beta: Weight = 8.0
        """Weight of the other classes among themselves (CIFAR 2 to 8 by pair, ImageNet 0.5)."""
        dkd_temperature: Annotated[float, Field(gt=0)] = 4.0
        """CIFAR 4, ImageNet 1."""
        dkd_warmup: Count = 20
        """Epochs over which its weight grows to loss.dkd; 0: none."""

    title = "DKD"
    logged: ClassVar = {"dkd": ("DKD", "nats x T²")}
    trains_classifier = True
    settings: Settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        if inputs.mixed is None:
            value = self._value(inputs, inputs.labels, None)
        else:
            share = inputs.mixed.share
            value = self._value(inputs, inputs.labels, share)
            value = value + self._value(inputs, inputs.mixed.partner_labels, 1 - share)
        warm = min((inputs.epoch + 1) / max(self.settings.dkd_warmup, 1), 1.0)
        return warm * value, {"dkd": value.detach()}

    def _value(self, inputs: LossInputs, labels: Tensor, weight: Tensor | None) -> Tensor:
        assert inputs.teacher is not None
        return logits.dkd(
            inputs.student.logits,
            inputs.teacher.logits,
            labels,
            alpha=self.settings.dkd_alpha,
            beta=self.settings.dkd_beta,
            temperature=self.settings.dkd_temperature,
            weight_N=weight,
            divisor=inputs.divisor,
        )


class DIST(LossTerm):
    """Correlations of softened probabilities, within rows and within classes (arXiv 2205.10536)."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        dist_beta: Weight = 2.0
        """Weight of correlations between the classes of a row (CIFAR 2, ImageNet 1)."""
        dist_gamma: Weight = 2.0
        """Weight of correlations between the rows of a class, over all processes (CIFAR 2, ImageNet 1)."""
        dist_temperature: Annotated[float, Field(gt=0)] = 4.0
        """CIFAR 4, ImageNet 1."""

    title = "DIST"
    logged: ClassVar = {"dist": ("DIST", "x T²")}
    trains_classifier = True
    settings: Settings

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        loss = logits.dist(
            inputs.student.logits,
            inputs.teacher.logits,
            beta=self.settings.dist_beta,
            gamma=self.settings.dist_gamma,
            temperature=self.settings.dist_temperature,
            divisor=inputs.divisor,
        )
        return loss, {"dist": loss.detach()}


class Feature(LossTerm):
    """The student's features, through a learned linear map, against the teacher's: the plain baseline (FitNets).

    Attributes:
        projection: linear map from the student's features to the teacher's width.
    """

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        feature_distance: Literal["cosine", "mse"] = "cosine"
        """1 - cosine similarity, or the mean squared difference."""

    title = "features"
    logged: ClassVar = {"feature": ("Feature distance", "")}
    needs_teacher_logits = False
    settings: Settings

    def __init__(self, settings: Settings, student_dim: int, teacher_dim: int) -> None:
        super().__init__(settings, student_dim, teacher_dim)
        self.projection = nn.Linear(student_dim, teacher_dim)

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.teacher is not None
        distance = {"cosine": features.cosine, "mse": features.mse}[self.settings.feature_distance]
        projected = self.projection(reference.upcast(inputs.student.features))  # [n, d_t]
        loss = distance(projected, inputs.teacher.features, divisor=inputs.divisor)
        return loss, {"feature": loss.detach()}


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
            labels=self._classes(inputs) if settings.mask_same_class else None,
            negatives=settings.negatives,
            divisor=inputs.divisor,
            pairs=inputs.mixed is not None,
            form=settings.form,
        )
        # b takes part with weight zero, so that DDP finds a gradient for every parameter
        loss = result.loss + 0.0 * self.b
        return loss, {"dcd_contrast": result.contrast, "dcd_consist": result.consist, "tau": tau.detach()}

    def _classes(self, inputs: LossInputs) -> Tensor:
        """The class [n] that each image shows most of."""
        if inputs.mixed is None:
            return inputs.labels
        return torch.where(inputs.mixed.share >= 0.5, inputs.labels, inputs.mixed.partner_labels)

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
    "dkd": DecoupledKD,
    "dist": DIST,
    "feature": Feature,
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
