"""DCD with its gradient in closed form, over the rows of one process or of all, in its fastest form.

With S = tau z_s z_t^T, P its row softmax, Q[i, j] = softmax over k of S[k, i] at k = j (`reference.dcd` writes
both out), and rows of unit norm, so that exp(tau (s - 1)) needs no running maximum (float32: tau <= 40):

    R_i = sum_j exp(tau (s_ij - 1))    C_i = sum_j exp(tau (s_ji - 1))    T_i = sum_j Q_ij tau (s_ji - s_ij)
    contrast_i = log R_i - tau (s_ii - 1)            consist_i = T_i + log R_i - log C_i
    G_ij = (1 + alpha) P_ij - [i = j] - alpha Q_ij + alpha Q_ji (tau (s_ij - s_ji) - T_j)
    dz_s = tau G z_t            dz_t = tau G^T z_s            dtau = sum_i z_s,i . dz_s,i / tau

Over processes, the forward pass gathers the embeddings, then R, C and T. Each process computes the rows of
G and of G^T that are its own, so the backward pass needs no communication.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdcd.losses import reference
from fastdcd.losses.tiled import Rows, Sums

# Forms with a backward pass of their own: modules with sums(rows) and gradients(rows, sums, alpha).
ENGINES = {"tiled": "fastdcd.losses.tiled", "triton": "fastdcd.losses.triton_kernels"}

# More need more shared memory and registers than a block of threads has (fastdcd.losses.triton_kernels).
TRITON_DIMENSIONS = 256

# Device -> (rows up to which a form is taken, form), measured by benchmarks/fused_loss.py.
FASTEST: dict[str, list[tuple[float, str]]] = {
    "cpu": [(384, "naive"), (math.inf, "tiled")],
    "cuda": [(2048, "naive"), (16384, "tiled"), (math.inf, "triton")],  # not yet measured
}


def dcd(
    z_s: Tensor,
    z_t: Tensor,
    tau: Tensor,
    *,
    alpha: float = 0.5,
    labels: Tensor | None = None,
    negatives: str = "local",
    divisor: float | None = None,
    pairs: bool = False,
    form: str = "auto",
) -> reference.DCD:
    """DCD (arXiv 2407.11802) of this process's rows: `reference.dcd`, faster, and against all processes' rows.

    Args:
        z_s, z_t: unit-norm embeddings [n, D] of student and teacher; n may differ between processes, or be 0.
        tau: 0-dimensional temperature, at most 40.
        alpha: weight of the consistency term.
        labels: int64 [n], not negative; if given, rows of the same class are no negatives of each other.
        negatives: "global", the rows of all processes (which must all call this), or "local", this one's.
        divisor: divide the sums over rows by this instead of n. Give rows of all processes / processes, as
            `LossInputs` has it: the mean over processes, which DDP takes, is then the mean over all rows.
            No process may have more rows than this number rounded up.
        pairs: processes share rows by pairs: none has more than that number rounded up to an even one.
        form: auto, naive, compiled, tiled or triton.

    Returns the loss = contrast + alpha * consist, and both parts detached, for logging. The gradient of the
    loss is this process's part of the gradient of all processes' losses, times the number of processes.

    Raises ValueError for a form that is not available.
    """
    processes = dist.get_world_size() if negatives == "global" and dist.is_initialized() else 1
    divisor = len(z_s) if divisor is None else divisor
    share = 2 if pairs else 1
    capacity = len(z_s) if processes == 1 else share * math.ceil(divisor / share - 1e-6)
    if processes * capacity == 1:
        warnings.warn("DCD of a single row is 0: it has no negatives to tell it from", stacklevel=2)
    chosen = fastest(z_s.device.type, processes * capacity, z_s.shape[1]) if form == "auto" else form
    if chosen in WHOLE and (processes > 1 or not len(z_s)):
        if form != "auto" and processes > 1:
            raise ValueError(
                f"loss.form: {form} knows the rows of one process only, and there are {processes}; use auto, tiled "
                "or triton, or loss.negatives=local"
            )
        chosen = "tiled"
    if chosen in WHOLE:
        loss, contrast, consist = WHOLE[chosen](z_s, z_t, tau, alpha=alpha, labels=labels, divisor=divisor)
        return reference.DCD(loss, contrast.detach(), consist.detach())
    z_s, z_t = reference.upcast(z_s), reference.upcast(z_t)
    place = _Place(processes, capacity, uneven=processes > 1 and divisor != capacity)
    return reference.DCD(*_Fused.apply(z_s, z_t, tau, labels, alpha, divisor, place, _engine(chosen)))


def fastest(device: str, rows: int, dimensions: int = 128) -> str:
    """The form that was measured to be fastest for so many rows, of those that take so many dimensions."""
    form = next(form for most, form in FASTEST.get(device, FASTEST["cuda"]) if rows <= most)
    return "tiled" if form == "triton" and dimensions > TRITON_DIMENSIONS else form


def _engine(form: str) -> ModuleType:
    if form not in ENGINES:
        raise ValueError(f"loss.form: got {form!r}, expected auto, {', '.join([*WHOLE, *ENGINES])}")
    try:
        return importlib.import_module(ENGINES[form])
    except ImportError as error:
        raise ValueError(
            f"loss.form: {form} needs a package that is missing ({error}); use auto or tiled"
        ) from None


@functools.cache
def _compiled() -> Callable[..., reference.DCD]:
    return torch.compile(reference.dcd, dynamic=True)


# Forms that write the N x N matrix of one process's rows out and leave the gradient to autograd.
WHOLE: dict[str, Callable[..., reference.DCD]] = {
    "naive": reference.dcd,
    "compiled": lambda *args, **kwargs: _compiled()(*args, **kwargs),
}


class _Place:
    """Where this process's rows lie among those of all: `capacity` places for each process, in rank order.

    Sizes are not exchanged (that would make the host wait); shorter batches are filled up instead.
    """

    def __init__(self, processes: int, capacity: int, *, uneven: bool) -> None:
        self.processes, self.capacity, self.uneven = processes, capacity, uneven
        self.first = dist.get_rank() * capacity if processes > 1 else 0

    def gather(self, own: Tensor, fill: float) -> Tensor:
        """Rows [n, ...] of each process -> [processes * capacity, ...], filled up with `fill`."""
        if self.processes == 1:
            return own
        assert len(own) <= self.capacity, f"{len(own)} rows where divisor says at most {self.capacity}"
        missing = self.capacity - len(own)
        if missing:
            own = torch.cat([own, own.new_full((missing, *own.shape[1:]), fill)])
        everyone = own.new_empty(self.processes * self.capacity, *own.shape[1:])
        dist.all_gather_into_tensor(everyone, own.contiguous())
        return everyone

    def groups(self, labels: Tensor | None, own: Tensor) -> Tensor | None:
        """`Rows.groups`: classes, or every row a group of its own, or None where no pair is excluded."""
        if labels is None and not self.uneven:
            return None
        if labels is None:
            labels = torch.arange(self.first, self.first + len(own), device=own.device)
        return self.gather(labels, -1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_s: Tensor,
        z_t: Tensor,
        tau: Tensor,
        labels: Tensor | None,
        alpha: float,
        divisor: float,
        place: _Place,
        engine: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dimensions = z_s.shape[1]
        everyone = place.gather(torch.cat([z_s, z_t], 1), 0.0) if place.processes > 1 else None
        rows = Rows(
            z_s=z_s if everyone is None else everyone[:, :dimensions],
            z_t=z_t if everyone is None else everyone[:, dimensions:],
            first=place.first,
            count=len(z_s),
            tau=tau.to(z_s.dtype),
            groups=place.groups(labels, z_s),
        )
        own: Sums = engine.sums(rows)
        of_all = Sums(*place.gather(torch.stack(own, 1), 1.0).unbind(1)) if place.processes > 1 else own
        ctx.rows, ctx.of_all, ctx.alpha, ctx.divisor, ctx.engine = rows, of_all, alpha, divisor, engine
        # in float64, it is only a number a row; log1p: near convergence the others' sum is the whole loss
        R_others, C_others, T, matched = (each.double() for each in own)
        contrast = ((R_others / matched).log1p().sum() / divisor).to(z_s.dtype)
        log_ratio = ((R_others + matched) / (C_others + matched)).log()
        consist = ((T + log_ratio).sum() / divisor).to(z_s.dtype)
        ctx.mark_non_differentiable(contrast, consist)
        return contrast + alpha * consist, contrast, consist

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale = ctx.rows, d_loss / ctx.divisor
        d_s, d_t = ctx.engine.gradients(rows, ctx.of_all, ctx.alpha)
        d_tau = (rows.z_s[rows.own] * d_s).sum() / rows.tau
        return d_s * scale, d_t * scale, (d_tau * scale).to(ctx.rows.tau.dtype), None, None, None, None, None
