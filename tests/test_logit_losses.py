"""KD, DKD, DIST, standardised logits and feature losses against the papers' formulas, written out here in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdcd.losses import features, logits

ROWS, CLASSES = 31, 11
TARGET = torch.arange(ROWS) * 7 % CLASSES


def draw(kind: str, seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Student and teacher [N, C], float64: unlike each other, nearly alike, or very sure of themselves."""
    torch.manual_seed(seed)
    teacher, noise = torch.randn(2, rows, CLASSES, dtype=torch.float64).unbind()
    scale = {"random": 3.0, "converged": 3.0, "sure": 40.0}[kind]
    return (scale * teacher + 1e-2 * noise if kind == "converged" else scale * noise), scale * teacher


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] of positive distributions [N, K]."""
    return (p * (p.log() - q.log())).sum(1)


def softened(z: Tensor, temperature: float) -> Tensor:
    """Probabilities from their definition."""
    e = (z / temperature).exp()
    return e / e.sum(1, keepdim=True)


def hinton(student: Tensor, teacher: Tensor) -> Tensor:
    return 16 * kl(softened(teacher, 4), softened(student, 4)).mean()


def z_scores(z: Tensor) -> Tensor:
    mean = z.sum(1, keepdim=True) / CLASSES
    return (z - mean) / (((z - mean) ** 2).sum(1, keepdim=True) / (CLASSES - 1)).sqrt()


def standardised(student: Tensor, teacher: Tensor) -> Tensor:
    return 4 * kl(softened(z_scores(teacher), 2), softened(z_scores(student), 2)).mean()


def decoupled(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """arXiv 2203.08679, eq. 7, row by row."""
    rows = []
    for row, target in enumerate(TARGET.tolist()[: len(student)]):
        p, q = (softened(z[row : row + 1], temperature)[0] for z in (teacher, student))
        rest = torch.tensor([each for each in range(CLASSES) if each != target])
        pairs = [torch.stack([x[target], x[rest].sum()])[None] for x in (p, q)]
        others = [x[rest][None] / x[rest].sum() for x in (p, q)]
        rows.append(kl(*pairs) + 8.0 * kl(*others))
    return temperature**2 * torch.cat(rows).mean()


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.sum() / len(a), b - b.sum() / len(b)
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + 1e-8)


def correlations(student: Tensor, teacher: Tensor) -> Tensor:
    """arXiv 2205.10536, eq. 9 and 10, row by row and class by class."""
    q, p = softened(student, 4), softened(teacher, 4)
    inter = torch.stack([1 - pearson(a, b) for a, b in zip(q, p, strict=True)]).mean()
    intra = torch.stack([1 - pearson(a, b) for a, b in zip(q.T, p.T, strict=True)]).mean()
    return 16 * (2 * inter + 2 * intra)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([(a - b).pow(2).sum() / CLASSES for a, b in zip(student, teacher, strict=True)]).mean()


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    cosines = [(a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(student, teacher, strict=True)]
    return 1 - torch.stack(cosines).mean()


Loss = Callable[[Tensor, Tensor], Tensor]


def ours_standardised(student: Tensor, teacher: Tensor) -> Tensor:
    return logits.kd(logits.standardize(student), logits.standardize(teacher), 2.0)


def ours_dkd(student: Tensor, teacher: Tensor) -> Tensor:
    return logits.dkd(student, teacher, TARGET[: len(student)], alpha=1.0, beta=8.0, temperature=4.0)


def ours_dist(student: Tensor, teacher: Tensor) -> Tensor:
    return logits.dist(student, teacher, beta=2.0, gamma=2.0, temperature=4.0)


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "kd": (lambda s, t: logits.kd(s, t, 4.0), hinton),
    "standardised kd": (ours_standardised, standardised),
    "dkd": (ours_dkd, decoupled),
    "dist": (ours_dist, correlations),
    "mse": (features.mse, squared),
    "cosine": (features.cosine, angles),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def evaluate(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient by the student, in float64."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach().double(), gradient.double()


@pytest.mark.parametrize("kind", ["random", "converged"])
@each_loss
def test_a_loss_is_its_papers_in_float64(name: str, kind: str) -> None:
    ours, formula = LOSSES[name]
    for seed in range(5):
        pair = draw(kind, seed)
        (found, gradient), (exact, exact_gradient) = evaluate(ours, *pair), evaluate(formula, *pair)
        # the authors' epsilon of 1e-7 beside a deviation is 3e-8 of it
        tolerance = 1e-6 if name == "standardised kd" else 1e-12
        assert abs(float(found - exact)) <= tolerance * max(float(exact), 1.0)
        scale = float(exact_gradient.abs().max())
        assert float((gradient - exact_gradient).abs().max()) <= tolerance * max(scale, 1.0)


@each_loss
def test_gradients_in_float32_are_as_exact_as_the_formulas_own(name: str) -> None:
    """Within 3 times the error of the formula as it is written, computed in float32; mean of many draws."""
    ours, formula = LOSSES[name]
    errors = torch.zeros(2)
    for seed in range(20):
        for kind in ("random", "converged"):
            student, teacher = draw(kind, seed)
            student, teacher = student.float(), teacher.float()
            _, exact = evaluate(formula, student.double(), teacher.double())
            for number, loss in enumerate((ours, formula)):
                _, gradient = evaluate(loss, student, teacher)
                errors[number] += float((gradient - exact).abs().max() / exact.abs().max())
    # standardisation's epsilon, which the formula leaves out, is no rounding error
    assert errors[0] <= 3 * errors[1] + (40 * 1e-7 if name == "standardised kd" else 0), errors


@each_loss
def test_gradcheck(name: str) -> None:
    student, teacher = draw("random", rows=5)
    student, teacher = (student / 3).requires_grad_(), (teacher / 3).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name][0], (student, teacher))


@each_loss
def test_losses_are_computed_in_float32_whatever_they_are_given(name: str) -> None:
    ours, _ = LOSSES[name]
    student, teacher = (each.bfloat16() for each in draw("random"))
    low, full = ours(student, teacher), ours(student.float(), teacher.float())
    assert low.dtype == torch.float32 and low == full


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "standardised kd"])
def test_teachers_that_are_certain(name: str) -> None:
    """Probabilities that round to 0 and 1 give finite losses and gradients, also in float32."""
    student, teacher = draw("sure")
    for scale in (1.0, 10.0):
        value, gradient = evaluate(LOSSES[name][0], (scale * student).float(), (scale * teacher).float())
        assert value.isfinite() and gradient.isfinite().all() and value > 0


@each_loss
def test_rows_that_agree_cost_nothing_and_none_are_no_loss(name: str) -> None:
    ours, _ = LOSSES[name]
    _, teacher = draw("random")
    value, gradient = evaluate(ours, teacher, teacher)
    near = 1e-4 if name == "dist" else 1e-7  # its epsilon beside classes that hardly vary
    assert abs(float(value)) < near and float(gradient.abs().max()) < near
    if name == "dist":
        nothing = logits.dist(
            *(torch.zeros(0, CLASSES).requires_grad_() for _ in range(2)),
            beta=1,
            gamma=0,
            temperature=1,
            divisor=0.5,
        )
    elif name == "dkd":
        nothing = logits.dkd(
            *(torch.zeros(0, CLASSES),) * 2, TARGET[:0], alpha=1, beta=1, temperature=1, divisor=0.5
        )
    else:
        return
    assert float(nothing.detach()) == 0


def test_rows_and_classes_that_do_not_vary_have_no_gradient_in_dist() -> None:
    """A single row (every class's standard deviation is 0) and uniform logits: finite, not 0 / 0."""
    for student in (torch.randn(1, CLASSES), torch.zeros(3, CLASSES)):
        value, gradient = evaluate(ours_dist, student, torch.zeros(len(student), CLASSES))
        assert value.isfinite() and gradient.isfinite().all()


def test_standardised_losses_ignore_shift_and_scale_of_logits() -> None:
    student, teacher = draw("random")
    moved = ours_standardised(5 * student + 3, 0.2 * teacher - 1)
    assert float(moved) == pytest.approx(float(ours_standardised(student, teacher)), rel=1e-6)
    assert logits.standardize(torch.ones(2, 5)).eq(0).all()


def test_dkd_with_row_weights_is_the_mean_over_targets() -> None:
    """Two targets of a mixed image, by their shares: DKD of each, weighted."""
    student, teacher = draw("random")
    share = torch.linspace(0, 1, ROWS, dtype=torch.float64)
    settings: Any = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    found = logits.dkd(student, teacher, TARGET, weight_N=share, **settings)
    by_row = [
        float(s * logits.dkd(student[i : i + 1], teacher[i : i + 1], TARGET[i : i + 1], **settings))
        for i, s in enumerate(share)
    ]
    assert float(found) == pytest.approx(sum(by_row) / ROWS, rel=1e-12)
