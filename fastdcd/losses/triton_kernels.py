"""The sums and gradients of DCD as two Triton kernels, for tens of thousands of rows on a GPU.

Inputs are rounded to bfloat16, sums are float32. A program owns a block of rows, and streams a share of all
rows past it; the shares' partial results are then added, in a fixed order. The interface is that of
`fastdcd.losses.tiled`. With TRITON_INTERPRET=1 the kernels run on the CPU, slowly, for tests.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastdcd.losses.dcd import TRITON_DIMENSIONS
from fastdcd.losses.tiled import Rows, Sums


class Blocks(NamedTuple):
    """How a kernel is cut up: rows that a program owns, rows that pass it at a time, warps, stages of its loads."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of_sums(dimensions: int) -> Blocks:
    """For rows of so many dimensions."""
    return Blocks(64, 32, 4, 2)


def blocks_of_gradients(dimensions: int) -> Blocks:
    """Those that spill no register from sm_80 to sm_100 (tests/test_gpu.py compiles them); not yet timed on a GPU."""
    return Blocks(64, 32, 8, 2) if dimensions <= 128 else Blocks(32, 32, 8, 2)


@triton.jit
def _load(base, index, valid, dim, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `index` of an array [..., dim], filled up with zeros to D columns."""
    column = tl.arange(0, D)
    mask = valid[:, None] & (column < dim)[None, :]
    rows = tl.load(base + index[:, None] * dim + column[None, :], mask=mask, other=0.0)
    # the interpreter's dot is wrong for bfloat16
    return rows.to(tl.float32) if UPCAST else rows


@triton.jit
def _similar(rows, columns, tau):
    """tau (s - 1) of each of `rows` with each of `columns`."""
    return (tl.dot(rows, tl.trans(columns), input_precision="ieee") - 1.0) * tau


@triton.jit
def _kept(groups, i, j, own, other, GROUPS: tl.constexpr):
    """Which pairs take part, j = i apart; i and j are places among all rows."""
    kept = own[:, None] & other[None, :] & (i[:, None] != j[None, :])
    if GROUPS:
        group_i = tl.load(groups + i, mask=own, other=-1)
        group_j = tl.load(groups + j, mask=other, other=-1)
        same = group_i[:, None] == group_j[None, :]
        kept = kept & (group_j >= 0)[None, :] & ~same
    return kept


@triton.jit
def _sums(
    z_s,
    z_t,
    groups,
    tau_at,
    out,  # [shares, 4, count]: R_others, C_others, T * C, matched
    first,
    count,
    total,
    dim,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    share = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, i = row < count, first + row
    tau = tl.load(tau_at)
    s_i, t_i = _load(z_s, i, own, dim, D, UPCAST), _load(z_t, i, own, dim, D, UPCAST)
    R = tl.zeros([ROWS], tl.float32)
    C = tl.zeros([ROWS], tl.float32)
    T = tl.zeros([ROWS], tl.float32)
    matched = tl.zeros([ROWS], tl.float32)
    for start in range(share * COLUMNS, total, tl.num_programs(1) * COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = j < total
        S_ij = _similar(s_i, _load(z_t, j, other, dim, D, UPCAST), tau)
        S_ji = _similar(t_i, _load(z_s, j, other, dim, D, UPCAST), tau)
        kept = _kept(groups, i, j, own, other, GROUPS)
        exp_ij = tl.where(kept, tl.exp(S_ij), 0.0)
        exp_ji = tl.where(kept, tl.exp(S_ji), 0.0)
        R += tl.sum(exp_ij, 1)
        C += tl.sum(exp_ji, 1)
        T += tl.sum(exp_ji * (S_ji - S_ij), 1)
        matched += tl.sum(tl.where(i[:, None] == j[None, :], tl.exp(S_ij), 0.0), 1)
    out += share * 4 * count + row
    tl.store(out, R, mask=own)
    tl.store(out + count, C, mask=own)
    tl.store(out + 2 * count, T, mask=own)
    tl.store(out + 3 * count, matched, mask=own)


@triton.jit
def _gradients(
    z_s,
    z_t,
    groups,
    tau_at,
    R,
    C,
    T,
    diagonal,
    d_s,  # [shares, count, dim], as is d_t
    d_t,
    first,
    count,
    total,
    dim,
    alpha,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    share = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, i = row < count, first + row
    tau = tl.load(tau_at)
    s_i, t_i = _load(z_s, i, own, dim, D, UPCAST), _load(z_t, i, own, dim, D, UPCAST)
    R_i = tl.load(R + i, mask=own, other=1.0)[:, None]
    C_i = tl.load(C + i, mask=own, other=1.0)[:, None]
    T_i = tl.load(T + i, mask=own, other=0.0)[:, None]
    G_ii = tl.load(diagonal + i, mask=own, other=0.0)[:, None]
    sum_s = tl.zeros([ROWS, D], tl.float32)
    sum_t = tl.zeros([ROWS, D], tl.float32)
    for start in range(share * COLUMNS, total, tl.num_programs(1) * COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = j < total
        s_j, t_j = _load(z_s, j, other, dim, D, UPCAST), _load(z_t, j, other, dim, D, UPCAST)
        R_j = tl.load(R + j, mask=other, other=1.0)[None, :]
        C_j = tl.load(C + j, mask=other, other=1.0)[None, :]
        T_j = tl.load(T + j, mask=other, other=0.0)[None, :]
        S_ij, S_ji = _similar(s_i, t_j, tau), _similar(t_i, s_j, tau)
        kept = _kept(groups, i, j, own, other, GROUPS)
        exp_ij = tl.where(kept, tl.exp(S_ij), 0.0)
        exp_ji = tl.where(kept, tl.exp(S_ji), 0.0)
        difference = S_ij - S_ji
        G_ij = exp_ij * ((1.0 + alpha) / R_i + alpha / C_j * (difference - T_j)) - alpha * exp_ji / C_i
        G_ji = exp_ji * ((1.0 + alpha) / R_j - alpha / C_i * (difference + T_i)) - alpha * exp_ij / C_j
        G_ij = tl.where(i[:, None] == j[None, :], G_ii, G_ij)
        G_ji = tl.where(i[:, None] == j[None, :], G_ii, G_ji)
        sum_s = tl.dot(G_ij.to(t_j.dtype), t_j, sum_s, input_precision="ieee")
        sum_t = tl.dot(G_ji.to(s_j.dtype), s_j, sum_t, input_precision="ieee")
    column = tl.arange(0, D)
    place = (share * count + row)[:, None] * dim + column[None, :]
    mask = own[:, None] & (column < dim)[None, :]
    tl.store(d_s + place, sum_s, mask=mask)
    tl.store(d_t + place, sum_t, mask=mask)


def sums(rows: Rows) -> Sums:
    """`Sums` of this process's rows, float32."""
    blocks = blocks_of_sums(rows.z_s.shape[1])
    shares = _shares(rows, blocks)
    parts = rows.z_s.new_empty(shares, 4, rows.count, dtype=torch.float32)
    _launch(_sums, rows, blocks, shares, parts)
    R, C, T, matched = parts.sum(0)
    return Sums(R, C, T / (C + matched), matched)


def gradients(rows: Rows, of_all: Sums, alpha: float) -> tuple[Tensor, Tensor]:
    """d(sum of all processes' row losses) / d(z_s, z_t) of this process's rows, [n, D] each, float32."""
    blocks = blocks_of_gradients(rows.z_s.shape[1])
    shares = _shares(rows, blocks)
    d_s, d_t = rows.z_s.new_empty(2, shares, rows.count, rows.z_s.shape[1], dtype=torch.float32)
    of_all = Sums(*(each.float() for each in of_all))
    known = (of_all.R, of_all.C, of_all.T.contiguous(), of_all.G_diagonal(alpha))
    _launch(_gradients, rows, blocks, shares, *known, d_s, d_t, alpha=alpha)
    return d_s.sum(0) * rows.tau, d_t.sum(0) * rows.tau


def _launch(kernel: Any, rows: Rows, blocks: Blocks, shares: int, *outputs: Tensor, **scalars: float) -> None:
    if not rows.count:
        return
    if not (rows.z_s.is_cuda or knobs.runtime.interpret):
        raise ValueError("loss.form: triton runs on a GPU, and data.device is cpu; use auto or tiled")
    dim = rows.z_s.shape[1]
    if dim > TRITON_DIMENSIONS:
        raise ValueError(
            f"loss.form: triton takes loss.feat_dim up to {TRITON_DIMENSIONS}, got {dim}; use auto or tiled"
        )
    kernel[triton.cdiv(rows.count, blocks.rows), shares](
        rows.z_s.bfloat16().contiguous(),
        rows.z_t.bfloat16().contiguous(),
        rows.groups,
        rows.tau.float(),
        *outputs,
        first=rows.first,
        count=rows.count,
        total=len(rows.z_s),
        dim=dim,
        **scalars,
        D=max(16, triton.next_power_of_2(dim)),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        GROUPS=rows.groups is not None,
        UPCAST=knobs.runtime.interpret,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _shares(rows: Rows, cut: Blocks) -> int:
    """Programs that share a block of rows, so that few rows still fill the device."""
    blocks = triton.cdiv(max(rows.count, 1), cut.rows)
    processors = torch.cuda.get_device_properties(rows.z_s.device).multi_processor_count if rows.z_s.is_cuda else 4
    return max(1, min(8, processors // blocks))
