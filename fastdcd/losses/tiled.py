"""The sums and gradients of DCD, a tile of similarities at a time: O(N D) memory on any device.

Shapes: n rows of this process, M of all processes, D dimensions. Equations: `fastdcd.losses.dcd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of a tile. On the CPU a tile and its temporaries fit in a core's cache (128 and 512
# measured slower); on a GPU it must be large enough to fill the device (not yet measured).
TILE = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Embeddings of all processes and where this process's rows lie among them.

    Attributes:
        z_s, z_t: unit-norm embeddings [M, D] of student and teacher, float32 or float64.
        first, count: this process's rows are first .. first + count.
        tau: 0-dimensional temperature, of the same dtype.
        groups: int64 [M] or None: pairs of one group are no negatives of each other, and rows of a
            negative group are not there at all (they fill up other processes' shorter batches).
    """

    z_s: Tensor
    z_t: Tensor
    first: int
    count: int
    tau: Tensor
    groups: Tensor | None = None

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + self.count)


class Sums(NamedTuple):
    """What DCD knows of each row i, [rows] each. Sums over others leave out j = i: near convergence they are
    all that is left of the loss, and would drown beside the row's own term.

    Attributes:
        R_others: sum over j != i of exp(tau (s_ij - 1)).
        C_others: sum over j != i of exp(tau (s_ji - 1)).
        T: sum_j Q_ij tau (s_ji - s_ij).
        matched: exp(tau (s_ii - 1)).
    """

    R_others: Tensor
    C_others: Tensor
    T: Tensor
    matched: Tensor

    @property
    def R(self) -> Tensor:
        """sum_j exp(tau (s_ij - 1))."""
        return self.R_others + self.matched

    @property
    def C(self) -> Tensor:
        """sum_j exp(tau (s_ji - 1))."""
        return self.C_others + self.matched

    def G_diagonal(self, alpha: float) -> Tensor:
        """G_ii = (P_ii - 1) + alpha (P_ii - Q_ii - Q_ii T_i)."""
        P_less_1, Q_less_1 = -self.R_others / self.R, -self.C_others / self.C
        return P_less_1 + alpha * (P_less_1 - Q_less_1 - self.matched / self.C * self.T)


def sums(rows: Rows) -> Sums:
    """`Sums` of this process's rows."""
    R, C, T, matched = rows.z_s.new_zeros(4, len(rows.z_s))
    for i, j in _tiles(rows):
        tile = _Tile(rows, i, j)
        R[i] += tile.exp_ij.sum(1)
        C[i] += tile.exp_ji.sum(1)
        T[i] -= (tile.exp_ji * tile.difference).sum(1)
        if tile.matched is not None:
            matched[i] = tile.matched
        elif _is_own(rows, j):
            R[j] += tile.exp_ji.sum(0)
            C[j] += tile.exp_ij.sum(0)
            T[j] += (tile.exp_ij * tile.difference).sum(0)
    own = rows.own
    return Sums(R[own], C[own], T[own] / (C + matched)[own], matched[own])


def gradients(rows: Rows, of_all: Sums, alpha: float) -> tuple[Tensor, Tensor]:
    """d(sum of all processes' row losses) / d(z_s, z_t) of this process's rows, [n, D] each.

    `of_all` holds the sums of all M rows.
    """
    R, C, T, diagonal = of_all.R, of_all.C, of_all.T, of_all.G_diagonal(alpha)
    d_s, d_t = torch.zeros_like(rows.z_s[rows.own]), torch.zeros_like(rows.z_t[rows.own])
    for i, j in _tiles(rows):
        tile = _Tile(rows, i, j)
        # d(loss) / d(tau s_ij) and / d(tau s_ji), both [rows of i, rows of j]
        G_ij = (tile.difference - T[j]).mul_(alpha / C[j]).add_(((1 + alpha) / R[i])[:, None])
        G_ij.mul_(tile.exp_ij).addcmul_(tile.exp_ji, (1 / C[i])[:, None], value=-alpha)
        if tile.matched is not None:
            G_ij.diagonal().copy_(diagonal[i])
            G_ji = G_ij.T
        else:
            G_ji = (tile.difference + T[i, None]).mul_((-alpha / C[i])[:, None]).add_((1 + alpha) / R[j])
            G_ji.mul_(tile.exp_ji).addcmul_(tile.exp_ij, 1 / C[j], value=-alpha)
        mine = slice(i.start - rows.first, i.stop - rows.first)
        d_s[mine].addmm_(G_ij, rows.z_t[j])
        d_t[mine].addmm_(G_ji, rows.z_s[j])
        if tile.matched is None and _is_own(rows, j):
            mine = slice(j.start - rows.first, j.stop - rows.first)
            d_s[mine].addmm_(G_ji.T, rows.z_t[i])
            d_t[mine].addmm_(G_ij.T, rows.z_s[i])
    return d_s.mul_(rows.tau), d_t.mul_(rows.tau)


class _Tile:
    """Similarities of rows i with rows j, both ways round, all [rows of i, rows of j].

    Attributes:
        exp_ij, exp_ji: exp(tau (s_ij - 1)), exp(tau (s_ji - 1)); 0 for pairs that are left out, and for j = i.
        difference: tau (s_ij - s_ji).
        matched: exp(tau (s_ii - 1)) if i and j are the same rows, else None.
    """

    def __init__(self, rows: Rows, i: slice, j: slice) -> None:
        # subtract and scale after the product: near convergence s - 1 is exact, and alike both ways round
        S_ij = (rows.z_s[i] @ rows.z_t[j].T).sub_(1).mul_(rows.tau)
        S_ji = S_ij.T if i == j else (rows.z_t[i] @ rows.z_s[j].T).sub_(1).mul_(rows.tau)
        self.difference = S_ij - S_ji
        self.exp_ij = S_ij.exp_()
        self.exp_ji = S_ij.T if i == j else S_ji.exp_()
        self.matched = None
        if i == j:
            self.matched = self.exp_ij.diagonal().clone()
            self.exp_ij.fill_diagonal_(0)
        if rows.groups is not None:
            excluded = (rows.groups[i, None] == rows.groups[j]) | (rows.groups[j] < 0)
            self.exp_ij.masked_fill_(excluded, 0)
            self.exp_ji.masked_fill_(excluded, 0)


def _is_own(rows: Rows, j: slice) -> bool:
    """Whether rows j are this process's own: a tile then serves both its rows and its columns."""
    return rows.first <= j.start < rows.first + rows.count


def _tiles(rows: Rows) -> list[tuple[slice, slice]]:
    """Pairs of row and column ranges that visit every (own row, any row) pair, own pairs once for both ways."""
    size = TILE.get(rows.z_s.device.type, TILE["cuda"])
    end = rows.first + rows.count
    own = _ranges(rows.first, end, size)
    others = _ranges(0, rows.first, size) + _ranges(end, len(rows.z_s), size)
    return [(i, j) for number, i in enumerate(own) for j in own[number:] + others]


def _ranges(first: int, last: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]
