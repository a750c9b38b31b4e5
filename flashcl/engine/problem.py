"""What a backend is asked to compute: one block of the logit matrix, and which of its pairs count.

    s_ij = logit_scale * <x_i, y_j> + row_bias_i + col_bias_j          (N, M), never stored

A *pair program* then looks at O(N + M) vectors and gives every pair a class: dropped (its logit becomes -inf),
negative (class 0) or positive (class 1). Every backend holds the same programs under the same names:

    all         every pair is a negative
    different   rows = (id,), cols = (id,): pairs with equal ids are dropped, all others are negatives
    by_label    rows = (id, label), cols = (id, label): equal ids are dropped, other pairs with equal labels are positives

A backend is a module with the functions of `Backend`, below. It sees one block, whose place among all rows of all ranks is in
the ids alone. Statistics of several blocks merge by logaddexp, and `grad` takes the merged ones, so that one block is like the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashcl.dtypes import statistic_dtype

CLASSES = {"all": 1, "different": 1, "by_label": 2}  # program -> number of pair classes K


@dataclass(frozen=True)
class Problem:
    """One block of logits. Vectors are on the device of x; `stat_dtype` is float64 for float64 embeddings, else float32."""

    x: Tensor  # (N, D) float64, float32, bfloat16 or float16; any strides
    y: Tensor  # (M, D) like x; the very same tensor where triangular
    logit_scale: Tensor  # (1,) stat_dtype: read on the device, never on the host
    row_bias: Tensor | None = None  # (N,) stat_dtype, any stride (0 where one bias serves all rows)
    col_bias: Tensor | None = None  # (M,) stat_dtype, any stride
    program: str = "all"
    rows: tuple[Tensor, ...] = ()  # (N,) int32 vectors that the program reads
    cols: tuple[Tensor, ...] = ()  # (M,)
    center: Tensor | None = None  # (N,) stat_dtype, only with K = 2: about the mean positive logit of a row
    triangular: bool = False  # S = S^T: x is y, rows is cols, no biases; walk only the tiles on and above the diagonal
    col_center: Tensor | None = None  # (M,) the same of a column, with center; None where triangular: it is `center`

    @staticmethod
    def of(
        x: Tensor,
        y: Tensor | None,  # None: triangular
        logit_scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        program: str,
        rows: Sequence[Tensor],
        cols: Sequence[Tensor],
        center: Tensor | None = None,
    ) -> Problem:
        triangular = y is None
        y = x if triangular else y
        vectors = dict(rows=tuple(rows), cols=tuple(cols), center=center)
        return Problem(x, y, logit_scale, row_bias, col_bias, program, **vectors, triangular=triangular)

    @property
    def classes(self) -> int:
        return CLASSES[self.program]

    @property
    def stat_dtype(self) -> torch.dtype:
        return statistic_dtype(self.x)


@dataclass(frozen=True)
class LogSumExp:
    """log sum exp of many logits in two numbers: top is it, rounded, and rest what the rounding has lost.

    At |s| = 1e4 a float32 alone would be off by 5e-4, and with it every probability. s - top is exact where s is near,
    and exp(-rest) a factor near 1. Over no pair top is -inf, over +inf it is +inf; rest is 0 there.
    """

    parts: Tensor  # (K, 2, N) stat_dtype: top and rest of K classes

    @staticmethod
    def of(shift: Tensor, log_total: Tensor) -> LogSumExp:
        """shift + log_total, (K, N) of any size each, with the exact error of their sum (Knuth 1969, 4.2.2, theorem B)."""
        top = shift + log_total
        added = top - shift
        rest = (shift - (top - added)) + (log_total - added)
        return LogSumExp(torch.stack([top, rest.nan_to_num_(0.0)], 1))  # inf - inf

    @staticmethod
    def of_no_pair(p: Problem, n: int) -> LogSumExp:
        """Of n lines of p."""
        parts = torch.zeros(p.classes, 2, n, dtype=p.stat_dtype, device=p.x.device)
        parts[:, 0] = -torch.inf
        return LogSumExp(parts)

    @property
    def top(self) -> Tensor:
        """(K, N)"""
        return self.parts[:, 0]

    @property
    def rest(self) -> Tensor:
        """(K, N)"""
        return self.parts[:, 1]

    def value(self) -> Tensor:
        """(K, N) float64"""
        return self.parts.sum(1, dtype=torch.float64)

    def of_top(self, weight: Tensor) -> Tensor:
        """(K, N) stat_dtype: what exp(s - top) has to be multiplied by for weight (K, N) float64 times exp(s - lse).

        exp(-rest) is 1 - rest to the rounding of s itself: rest is at most half a unit in the last place of top.
        """
        return torch.addcmul(weight, weight, self.rest, value=-1, out=self.parts.new_empty(weight.shape))


@dataclass(frozen=True)
class Statistics:
    """The log-sum-exps of a block, as `sweep` returns them."""

    row: LogSumExp  # over the pairs of each row (K, N)
    col: LogSumExp | None  # of each column (K, M); None where not asked for, and of a triangular problem: it is `row`
    deviation: Tensor | None = None  # (N,) float64: sum_j (s_ij - center_i) over the positives, if there is a center
    col_deviation: Tensor | None = None  # (M,) float64, with col_center: sum_i (s_ij - col_center_j) over the positives
    kept: Tensor | None = None  # (kept_elements,) stat_dtype: what this backend would compute again in `grad`


@dataclass(frozen=True)
class Softmax:
    """The coefficients of G for log-sum-exp statistics. A row whose top is -inf has no pairs: its G is 0.

    G_ij = row_weight[k, i] exp(s_ij - row_top[k, i]) + col_weight[k, j] exp(s_ij - col_top[k, j])     k = class of (i, j)
           - (row_offset[i] + col_offset[j] where k = 1)

    top is the log-sum-exp but for its rest, which the weights have taken in (`LogSumExp.of_top`). The offset is what the
    positives of a row would receive were they all alike. It is taken off before G is rounded, because the two cancel near
    convergence. Where the problem is triangular the column coefficients are None: they are those of the rows.
    """

    row_weight: Tensor  # (K, N) stat_dtype
    row_top: Tensor  # (K, N)
    col_weight: Tensor | None = None  # (K, M); None also where no gradient comes through the columns
    col_top: Tensor | None = None  # (K, M)
    row_offset: Tensor | None = None  # (N,), only with K = 2
    col_offset: Tensor | None = None  # (M,)
    about: Tensor | None = None  # (1,) stat_dtype: the product that d_scale is taken about


@dataclass(frozen=True)
class Sigmoid:
    """The coefficients of G for the sum of softplus: G_ij = row_weight[i] sigmoid(s_ij). The problem is not triangular."""

    row_weight: Tensor  # (N,)


class Needs(NamedTuple):
    """Which gradients `grad` is asked for: in the order of the tensors of an autograd function."""

    x: bool = False  # of a triangular problem all of it
    y: bool = False
    scale: bool = False
    row_bias: bool = False
    col_bias: bool = False


@dataclass(frozen=True)
class Grads:
    """What `grad` returns. The factor logit_scale of dx and dy is left to the caller."""

    dx: Tensor | None  # (N, D) stat_dtype: sum_j G_ij y_j; of a triangular problem sum_j (G + G^T)_ij x_j
    dy: Tensor | None  # (M, D) stat_dtype: sum_i G_ij x_i; None of a triangular problem
    g_rows: Tensor | None = None  # (N,) stat_dtype: sum_j G_ij
    g_cols: Tensor | None = None  # (M,) stat_dtype: sum_i G_ij
    d_scale: Tensor | None = None  # () float64: sum_ij G_ij (<x_i, y_j> - about), of G before it is rounded to 16 bits
    row_sum: Tensor | None = None  # (N,) stat_dtype: sum_j row_weight[i] softplus(s_ij), with Sigmoid coefficients

    @staticmethod
    def empty(p: Problem, c: Softmax | Sigmoid, needs: Needs) -> Grads:
        """For blocks of which the first one of each line is written and the others are added; zeros if there is no block."""
        return Grads._of(torch.empty if len(p.x) and len(p.y) else torch.zeros, p, c, needs)

    @staticmethod
    def zeros(p: Problem, c: Softmax | Sigmoid, needs: Needs, cols: int | None = None) -> Grads:
        """For blocks to be added to. cols: how many g_cols has, if not one for each row of y."""
        return Grads._of(torch.zeros, p, c, needs, cols)

    @staticmethod
    def _of(make: Callable, p: Problem, c: Softmax | Sigmoid, needs: Needs, cols: int | None = None) -> Grads:
        (N, D), M = p.x.shape, p.y.shape[0]

        def new(wanted: bool, *shape: int, dtype: torch.dtype = p.stat_dtype) -> Tensor | None:
            return make(shape, dtype=dtype, device=p.x.device) if wanted else None

        return Grads(
            new(needs.x, N, D),
            new(needs.y and not p.triangular, M, D),
            new(needs.row_bias, N),
            new(needs.col_bias, M if cols is None else cols),
            new(needs.scale, dtype=torch.float64),
            new(isinstance(c, Sigmoid), N),
        )


class Backend(Protocol):
    """What a module of flashcl/backends provides."""

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve such tensors here, or None."""

    def kept_elements(self, problem: Problem) -> int:
        """How much a sweep leaves for the backward: bounded, whatever N and M; from the sizes alone."""

    def sweep(self, problem: Problem, *, need_cols: bool, keep: bool) -> Statistics:
        """Log-sum-exps of every class along the rows and, where needed, along the columns."""

    def sweep_softplus(self, problem: Problem) -> Tensor:
        """(N,) stat_dtype: sum_j softplus(s_ij)."""

    def grad(self, problem: Problem, coefficients: Softmax | Sigmoid, needs: Needs, *, kept: Tensor | None = None) -> Grads:
        """kept: what a sweep of the same problem left."""

    def partner_products(self, x: Tensor, y: Tensor, shift: int) -> Tensor:
        """(N,) float64: <x_i, y_j> with j = (i + shift) mod M."""

    def products_in_tiles(self, x: Tensor, y: Tensor, shift: int) -> tuple[slice, Tensor] | None:
        """Some rows i, n of them, and (n,) float64: <x_i, y_j> with j = i + shift < M, 0 <= shift < M, as they are in tiles.

        None where they are as often too large as too small: tensor cores cut off what a sum cannot hold, others round.
        """

    def finish(
        self, acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, out: Tensor
    ) -> None:
        """out_i = scale (acc_i + weight_i other_j), j = (i + shift) mod C.

        acc (R, D) stat_dtype, other (C, D) like x, weight (n,) stat_dtype: rows from n on, and all where there is none, are
        scale acc_i. out (R, D) may be acc.
        """
