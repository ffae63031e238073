"""The losses against float64 autograd of the paper's formulas, written out here once more."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, absent
from torch import Tensor

from fastdcd.losses import dcd, reference, tiled
from fastdcd.losses.terms import DCD, LossInputs
from fastdcd.models import ModelOutput

ALPHA = 0.5
SIZES = [1, 2, 3, 7, 16, 33, 64, 127, 200, 255, 300]
CLOSED = ["tiled", "triton"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last of them odd, in rows and columns."""
    monkeypatch.setitem(tiled.TILE, "cpu", 48)


@pytest.fixture(autouse=True)
def single_rows_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DCD of a single row")
        yield


def need_triton(form: str) -> str:
    """The device for a form. Without a GPU, Triton is tested by its interpreter, in a process of its own."""
    if form == "triton":
        if torch.cuda.is_available():
            return "cuda"
        if not os.environ.get("TRITON_INTERPRET"):
            pytest.skip("runs in test_triton_in_its_interpreter")
    return "cpu"


def paper(z_s: Tensor, z_t: Tensor, tau: Tensor, labels: Tensor | None = None, b: float = 0.0) -> Tensor:
    """DCD by explicit sums over exponentials: eq. 2 to 7, sharing nothing with fastdcd.losses."""
    s = tau * (z_s @ z_t.T) + b
    e = torch.exp(s - s.detach().max())
    if labels is not None:
        e = e * ((labels[:, None] != labels) | torch.eye(len(s), dtype=torch.bool))
    p = e / e.sum(1, keepdim=True)
    q = (e / e.sum(0, keepdim=True)).T
    tiny = torch.finfo(q.dtype).tiny
    ratio = torch.where(q > 0, q.clamp_min(tiny).log() - p.clamp_min(tiny).log(), 0.0)
    return (-p.diagonal().log() + ALPHA * (q * ratio).sum(1)).mean()


def embeddings(n: int, kind: str, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows, float64: independent, or a student that has nearly become its teacher."""
    torch.manual_seed(1000 * n + seed)
    z_t = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
    noise = torch.randn(n, d, dtype=torch.float64)
    return F.normalize(noise if kind == "random" else z_t + 1e-3 * noise, dim=1), z_t


Values = list[Tensor]


def evaluate(loss: Callable[..., Tensor], *inputs: Tensor, **others: Tensor | None) -> Values:
    """A loss and its gradients by all inputs, float64 on the CPU."""
    inputs = tuple(each.detach().clone().requires_grad_() for each in inputs)
    value = loss(*inputs, **others)
    value.backward()
    return [each.detach().double().cpu() for each in (value, *(each.grad for each in inputs))]  # type: ignore[union-attr]


def error(found: Values, exact: Values) -> list[float]:
    return [float((a - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("form", ["naive", "tiled"])
def test_dcd_is_the_papers_in_float64(form: str, kind: str, masked: bool) -> None:
    for n in SIZES:
        z_s, z_t = embeddings(n, kind)
        tau = torch.tensor(10.0, dtype=torch.float64)
        labels = torch.arange(n) // 3 if masked else None
        exact = evaluate(paper, z_s, z_t, tau, labels=labels)
        found = evaluate(lambda *z: dcd.dcd(*z, labels=labels, form=form).loss, z_s, z_t, tau)  # noqa: B023
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("tau", [2.718, 10.0, 40.0])
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_tiled_is_as_exact_as_naive_in_float32(kind: str, tau: float) -> None:
    """Within 3 times the naive loss's own error: each of loss, d z_s, d z_t and d tau, mean of many draws a size."""
    for n in SIZES:
        errors = {form: torch.zeros(4) for form in ("naive", "tiled")}
        draws = 8 if n > 8 else 100  # a few rows have a few roundings, which may all be lucky ones
        for seed in range(draws):
            z_s, z_t = (z.float() for z in embeddings(n, kind, seed=seed))
            exact = evaluate(paper, z_s.double(), z_t.double(), torch.tensor(tau).double())
            for form in errors:
                found = evaluate(lambda *z: dcd.dcd(*z, form=form).loss, z_s, z_t, torch.tensor(tau))  # noqa: B023
                pairs = zip(found, exact, strict=True)
                errors[form] += torch.tensor([float((a - b).abs().max()) for a, b in pairs]) / draws
        if n == 1:
            assert not errors["tiled"].any()
        assert (errors["tiled"] <= 3 * errors["naive"] + 1e-9).all(), (n, errors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 5, 33, 70])
def test_triton(n: int, masked: bool) -> None:
    """Within 3 times the error of the naive loss over bfloat16 products, odd shapes."""
    device = need_triton("triton")
    z_s, z_t = (z.bfloat16().double() for z in embeddings(n, "random"))
    tau = torch.tensor(5.0)
    labels = torch.arange(n) // 3 if masked else None
    on_device = labels.to(device) if labels is not None else None
    exact = evaluate(paper, z_s, z_t, tau.double(), labels=labels)

    def triton(*z: Tensor) -> Tensor:
        return dcd.dcd(*z, form="triton", alpha=ALPHA, labels=on_device).loss

    found = evaluate(triton, *(each.float().to(device) for each in (z_s, z_t, tau)))
    naive = evaluate(paper, *(each.bfloat16() for each in (z_s, z_t, tau)), labels=labels)
    if n == 1:
        assert all(each.abs().max() < 1e-6 for each in found)
        return
    for ours, budget in zip(error(found, exact), error(naive, exact), strict=True):
        assert ours <= 3 * budget + 1e-3


def test_triton_rows_of_one_process() -> None:
    """A process's rows among those of others, some of which are not there: as by tiles, to bfloat16's precision."""
    device = need_triton("triton")
    from fastdcd.losses import triton_kernels

    z_s, z_t = (z.bfloat16().float().to(device) for z in embeddings(70, "random"))
    groups = torch.arange(70, device=device) // 2
    groups[30:35] = -1
    rows = tiled.Rows(z_s=z_s, z_t=z_t, first=35, count=21, tau=torch.tensor(5.0, device=device), groups=groups)
    everyone = tiled.sums(tiled.Rows(z_s=z_s, z_t=z_t, first=0, count=70, tau=rows.tau, groups=groups))
    for ours, theirs in zip(triton_kernels.sums(rows), tiled.sums(rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(
        triton_kernels.gradients(rows, everyone, ALPHA), tiled.gradients(rows, everyone, ALPHA), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()))


def test_triton_in_its_interpreter() -> None:
    """The kernels' arithmetic on the CPU, odd shapes and masks; a GPU runs test_triton itself."""
    if torch.cuda.is_available():
        pytest.skip("test_triton ran on the GPU")
    try:
        import triton  # noqa: F401
    except ImportError:
        absent("triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "tests" / "test_losses.py"),
        "-k",
        "test_triton and not its",
    ]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "9 passed" in ran.stdout, ran.stdout


def test_gradcheck() -> None:
    z_s, z_t = embeddings(9, "random", d=4)
    tau = torch.tensor(3.0, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (z_s, z_t, tau)]
    for labels in (None, torch.arange(9) // 2):
        assert torch.autograd.gradcheck(lambda *z: dcd.dcd(*z, form="tiled", labels=labels).loss, inputs)  # noqa: B023


def test_compiled_is_naive() -> None:
    z_s, z_t = (z.float() for z in embeddings(37, "random"))
    tau = torch.tensor(5.0)
    exact = evaluate(lambda *z: dcd.dcd(*z, form="naive").loss, z_s, z_t, tau)
    found = evaluate(lambda *z: dcd.dcd(*z, form="compiled").loss, z_s, z_t, tau)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parts_add_up_and_carry_no_gradient() -> None:
    z_s, z_t = (z.requires_grad_() for z in embeddings(20, "random"))
    tau = torch.tensor(4.0, dtype=torch.float64)
    for form in ("naive", "tiled"):
        loss, contrast, consist = dcd.dcd(z_s, z_t, tau, alpha=0.3, form=form, divisor=7.0)
        assert not contrast.requires_grad and not consist.requires_grad and loss.requires_grad
        torch.testing.assert_close(loss.detach(), contrast + 0.3 * consist)
        torch.testing.assert_close(loss, reference.dcd(z_s, z_t, tau, alpha=0.3).loss * 20 / 7)


def test_memory_is_linear_in_rows() -> None:
    """No tensor of N x N elements is made, forward or backward."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, Tensor):
                    largest = max(largest, each.untyped_storage().nbytes())
            return result

    z_s, z_t = (z.float().requires_grad_() for z in embeddings(1000, "random"))
    with Largest():
        dcd.dcd(z_s, z_t, torch.tensor(5.0), form="tiled").loss.backward()
    assert 0 < largest <= 1000 * 48 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_a_known_form_at_every_size(device: str) -> None:
    for rows in (1, 64, 256, 1024, 4096, 8192, 65536, 10**7):
        assert dcd.fastest(device, rows) in {*dcd.WHOLE, *dcd.ENGINES}
    assert dcd.fastest("cpu", 64) == "naive" and dcd.fastest("cpu", 8192) == "tiled"


def test_forms_that_are_not_there() -> None:
    z_s, z_t = embeddings(4, "random")
    with pytest.raises(ValueError, match=r"got 'fast', expected auto, naive"):
        dcd.dcd(z_s, z_t, torch.tensor(1.0), form="fast")
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        with pytest.raises(ValueError, match="triton runs on a GPU"):
            dcd.dcd(z_s, z_t, torch.tensor(1.0), form="triton")


def test_a_single_row_is_zero_and_says_so() -> None:
    z_s, z_t = embeddings(1, "random")
    for form in ("naive", "tiled"):
        with pytest.warns(UserWarning, match="single row"):
            found = evaluate(lambda *z: dcd.dcd(*z, form=form).loss, z_s, z_t, torch.tensor(5.0))  # noqa: B023
        assert all(each.abs().max() == 0 for each in found)


@pytest.mark.parametrize("form", ["auto", "naive", "tiled"])
def test_no_rows_are_no_loss(form: str) -> None:
    """A process without a share of the batch still goes through the backward pass, and adds nothing."""
    found = evaluate(
        lambda *z: dcd.dcd(*z, form=form, divisor=0.5).loss,
        torch.zeros(0, 4),
        torch.zeros(0, 4),
        torch.tensor(5.0),
    )
    assert float(found[0]) == 0 and float(found[3]) == 0 and found[1].shape == (0, 4)


def test_a_bias_changes_nothing() -> None:
    z_s, z_t = embeddings(12, "random")
    b = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = reference.dcd(z_s, z_t, torch.tensor(5.0), b=b).loss
    loss.backward()
    assert b.grad is not None and abs(float(b.grad)) < 1e-15
    torch.testing.assert_close(loss.detach(), reference.dcd(z_s, z_t, torch.tensor(5.0)).loss)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["naive", "tiled"])
def test_gradients_of_both_heads(form: Any, masked: bool) -> None:
    """The whole term against the paper's formula over the same heads, float64."""
    torch.manual_seed(0)
    term = DCD(DCD.Settings(feat_dim=16, form=form, mask_same_class=masked), 10, 20)
    student, teacher = torch.randn(61, 10), torch.randn(61, 20)
    labels = torch.arange(61) % 30
    loss, _ = term(LossInputs(ModelOutput(student, student), ModelOutput(teacher, teacher), labels, 61.0))
    loss.backward()
    assert term.b.grad == 0

    def whole(
        student_weight: Tensor, student_bias: Tensor, teacher_weight: Tensor, teacher_bias: Tensor, t: Tensor
    ) -> Tensor:
        z_s = F.normalize(F.linear(student.double(), student_weight, student_bias), dim=1)
        z_t = F.normalize(F.linear(teacher.double(), teacher_weight, teacher_bias), dim=1)
        return paper(z_s, z_t, t.exp(), labels if masked else None)

    parameters = [*term.student_head.parameters(), *term.teacher_head.parameters(), term.log_tau]
    exact = evaluate(whole, *(each.detach().double() for each in parameters))
    assert float(loss.detach()) == pytest.approx(float(exact[0]), rel=1e-6)
    found = [loss, *(each.grad for each in parameters)]
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-6)


def test_a_zero_row_has_a_bounded_gradient() -> None:
    features = torch.zeros(4, 8, requires_grad=True)
    reference.normalize(features).sum().backward()
    assert features.grad is not None and features.grad.abs().max() <= 1.001e6


def test_temperature_comes_back_from_its_bounds() -> None:
    """Matching pairs drive tau to its upper bound, hostile ones to the lower; it leaves either when data changes."""
    torch.manual_seed(0)
    term = DCD(DCD.Settings(feat_dim=8, tau_max=10.0), 8, 8)
    features = torch.randn(32, 8)
    with torch.no_grad():  # heads that keep what they are given
        for head in (term.student_head, term.teacher_head):
            head.weight.copy_(torch.eye(8))
            head.bias.zero_()
    optimizer = torch.optim.SGD([term.log_tau], lr=0.3)

    def steps(student: Tensor, count: int) -> list[float]:
        taus = []
        for _ in range(count):
            optimizer.zero_grad()
            inputs = LossInputs(
                ModelOutput(student, student), ModelOutput(features, features), torch.zeros(32), 32.0
            )
            term(inputs)[0].backward()
            optimizer.step()
            term.after_step()
            taus.append(float(term.log_tau.detach().exp()))
        return taus

    up = steps(features, 100)
    assert up[0] > 2.718 and up[-1] == pytest.approx(10.0) and max(up) <= 10.0001
    down = steps(-features, 100)
    assert down[0] < 10 and down[-1] == pytest.approx(0.1) and min(down) >= 0.0999
    again = steps(features, 200)
    assert again[0] > 0.1 and again[-1] == pytest.approx(10.0)
