"""The two reductions over all pairs as differentiable functions.

    log_sum_exp    row_lse, col_lse over the negatives; the logit of the positives; their spread     (softmax family)
    softplus_sum   sum_j softplus(s_ij) over the negatives + softplus(-s_ii)                         (sigmoid family)

Every loss is arithmetic on the vectors that these return. A loss near convergence is a small difference of large numbers
unless it is written as softplus(negatives - positive): that is why negatives and positives come apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcl.engine import ops
from flashcl.engine.positives import Partner, SameLabel
from flashcl.engine.problem import LogSumExp, Problem, Sigmoid, Softmax


@dataclass(frozen=True)
class Pairs:
    """Which pairs count, and as what. Without partner and labels no pair is a positive."""

    program: str = "all"
    rows: tuple[Tensor, ...] = ()  # (N,) each
    cols: tuple[Tensor, ...] = ()  # (M,) each
    partner: Tensor | None = None  # (N,) int64: the one positive of each row, which the program drops
    labels: Tensor | None = None  # (N,) int64: rows of one label are positives; program "by_label", S symmetric
    group: str = ""  # of ranks that hold other rows and columns (ranks.py); "": none

    def positives(self) -> Partner | SameLabel | None:
        if self.labels is not None:
            return SameLabel.of(self.labels, self.group)
        return None if self.partner is None else Partner(self.partner)


@dataclass(frozen=True)
class Masses:
    """What log_sum_exp returns, each differentiable and float64: differences of large logits keep their digits.

    A loss is their arithmetic, rounded to the dtype of its result at the end.
    """

    row_neg: Tensor  # (N,) log sum_j exp(s_ij) over the negatives of row i; -inf without any
    col_neg: Tensor | None  # (M,) the same over columns; None if not asked for, and of a symmetric S: it is row_neg
    row_pos: Tensor | None  # (N,) log sum_j exp(s_ij) over the positives of row i; -inf without any
    row_gap: Tensor | None  # (N,) row_pos_i - mean of the positive logits, >= log |P(i)|; None with one positive a row


def log_sum_exp(
    x: Tensor,  # (N, D)
    y: Tensor | None,  # (M, D); None: S = logit_scale x x^T is symmetric, and half of it is computed
    logit_scale: Tensor,  # one element
    row_bias: Tensor | None,  # (N,)
    col_bias: Tensor | None,  # (M,)
    pairs: Pairs,
    *,
    need_cols: bool,
    backend: str,
) -> Masses:
    row, col, pos, gap = _LogSumExp.apply(
        x, y, *_statistic_dtype(x, logit_scale, row_bias, col_bias), pairs, need_cols, backend
    )
    has_cols = need_cols and y is not None
    return Masses(
        row,
        col if has_cols else None,
        pos if pairs.partner is not None or pairs.labels is not None else None,
        gap if pairs.labels is not None else None,
    )


def softplus_sum(
    x: Tensor,  # (N, D)
    y: Tensor,  # (M, D)
    logit_scale: Tensor,  # one element
    row_bias: Tensor | None,  # (N,)
    pairs: Pairs,
    *,
    per_row: bool,
    backend: str,
) -> Tensor:
    """(N,) float64 or, not per_row, their sum: then gradients are made in the forward sweep, and backward only scales them."""
    logit_scale, row_bias, _ = _statistic_dtype(x, logit_scale, row_bias, None)
    # Inside an autograd function no_grad does not show: without it the gradients would be made all the same.
    each = per_row or not torch.is_grad_enabled()
    loss = _SoftplusSum.apply(x, y, logit_scale, row_bias, pairs, each, backend)
    return loss if per_row else loss.sum()


def _statistic_dtype(x: Tensor, logit_scale: Tensor, *biases: Tensor | None) -> list[Tensor | None]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [logit_scale.to(x.device, dtype).reshape(1), *(None if b is None else b.to(dtype) for b in biases)]


def _problem(x, y, logit_scale, row_bias, col_bias, pairs: Pairs) -> Problem:
    return Problem.of(x, y, logit_scale, row_bias, col_bias, pairs.program, pairs.rows, pairs.cols)


def _first_order_only() -> None:
    # once_differentiable would silently drop a gradient penalty whose upstream gradient is a constant.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "flashcl computes first derivatives only (create_graph=True asks for more): "
            "use the dense loss of the same name in flashcl.reference"
        )


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, logit_scale, row_bias, col_bias, pairs: Pairs, need_cols: bool, backend: str):
        problem, positives = _problem(x, y, logit_scale, row_bias, col_bias, pairs), pairs.positives()
        mean = _mean_logits(problem, pairs, positives)  # (N,) float64, or None
        if pairs.labels is not None:
            problem = replace(problem, center=mean.to(problem.stat_dtype))
        s = ops.sweep(problem, need_cols=need_cols, keep=any(ctx.needs_input_grad), backend=backend, group=pairs.group)
        col_top, col_rest = (None, None) if s.col is None else (s.col.top, s.col.rest)
        ctx.save_for_backward(x, y, logit_scale, row_bias, col_bias, s.row.top, s.row.rest, col_top, col_rest, s.kept)
        ctx.pairs, ctx.backend = pairs, backend
        row, absent = s.row.value(), [s.row.top.new_empty(0) for _ in range(3)]
        col = absent[0] if s.col is None else s.col.value()[0]
        if positives is None:
            return row[0], col, *absent[1:]
        if pairs.labels is None:
            return row[0], col, mean, absent[1]
        # The mean logit by way of its deviation in the tiles: there its error is that of the logits in row_pos, and cancels.
        return row[0], col, row[1], row[1] - (problem.center + s.deviation / positives.count)

    @staticmethod
    def backward(ctx, d_row, d_col, d_pos, d_gap):
        _first_order_only()
        x, y, logit_scale, row_bias, col_bias, row_top, row_rest, col_top, col_rest, kept = ctx.saved_tensors
        problem, positives = _problem(x, y, logit_scale, row_bias, col_bias, ctx.pairs), ctx.pairs.positives()
        row, col = LogSumExp(row_top, row_rest), None if col_top is None else LogSumExp(col_top, col_rest)
        d_row, d_col, d_pos, d_gap = (d.to(problem.stat_dtype) for d in (d_row, d_col, d_pos, d_gap))
        about = _mean_product(problem, ctx.pairs.group) if ctx.needs_input_grad[2] else None
        if ctx.pairs.labels is None:
            c = Softmax(d_row[None], row, None if col is None else d_col[None], col, about=about)
        else:
            c = _softmax_with_labels(d_row, d_pos, d_gap, row, positives, about)
        g = _gradients(problem, c, positives, d_pos, ctx.needs_input_grad[:5], ctx.backend, ctx.pairs.group, kept)
        return _as(x, g.dx), _as(x, g.dy), g.d_scale, g.d_row_bias, g.d_col_bias, None, None, None


def _mean_logits(p: Problem, pairs: Pairs, positives: Partner | SameLabel | None) -> Tensor | None:
    """The mean logit of the positives of each row, (N,) float64."""
    if positives is None:
        return None
    mean = positives.mean_logits(p.x, p.y) * p.logit_scale
    if p.row_bias is not None:
        mean = mean + p.row_bias
    if p.col_bias is not None:
        mean = mean + p.col_bias[pairs.partner]
    return mean


def _softmax_with_labels(
    d_row: Tensor, d_pos: Tensor, d_gap: Tensor, row: LogSumExp, labels: SameLabel, about: Tensor | None
) -> Softmax:
    """Upstream gradients as coefficients of G, where the positives of a row have a softmax q_ij of their own.

        d_pos q_ij + d_gap (q_ij - 1/|P|)  =  (d_pos + d_gap) (q_ij - 1/|P|)  +  d_pos / |P|

    The first part, small when the positives are alike, goes through G; the second, equal for all of them, through
    SameLabel.add_gradients_ in full precision.
    """
    has_positive = labels.count > 0
    weight = torch.where(has_positive, d_pos + d_gap, 0.0)
    offset = torch.where(has_positive, weight / labels.count, 0.0)
    return Softmax(torch.stack([d_row, weight]), row, row_offset=offset, about=about)


def _mean_product(p: Problem, group: str) -> Tensor:
    """The mean of <x_i, y_j> over all pairs, of all ranks, (1,) statistic dtype."""
    sums = torch.stack([v.sum(0, dtype=p.stat_dtype) for v in (p.x, p.y)])  # (2, D)
    counts = torch.stack([torch.ones_like(v[:, :1], dtype=p.stat_dtype).sum(0) for v in (p.x, p.y)])  # (2, 1)
    total = ops.sum_over_ranks(torch.cat([sums, counts], 1), group)
    mean_x, mean_y = total[:, :-1] / total[:, -1:]
    return (mean_x * mean_y).sum(0, keepdim=True)


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, logit_scale, row_bias, pairs: Pairs, per_row: bool, backend: str):
        ctx.pairs, ctx.per_row, ctx.backend = pairs, per_row, backend
        problem, positives = _problem(x, y, logit_scale, row_bias, None, pairs), pairs.positives()
        pos = _mean_logits(problem, pairs, positives)
        of_positive = torch.nn.functional.softplus(-pos, threshold=50.0)
        d_pos = -torch.sigmoid(-pos).to(problem.stat_dtype)
        needs = (*ctx.needs_input_grad[:4], False)
        if per_row or not any(needs):
            ctx.save_for_backward(x, y, logit_scale, row_bias, d_pos)
            row = ops.sweep_softplus(problem, backend=backend, group=pairs.group) + of_positive
            return row if per_row else row.sum()
        g = _gradients(problem, Sigmoid(torch.ones_like(d_pos)), positives, d_pos, needs, backend, pairs.group)
        # Kept wide: they are rounded to the dtype of x and y once, after the upstream gradient has scaled them.
        ctx.save_for_backward(g.dx, g.dy, g.d_scale, g.d_row_bias)
        ctx.dtype = x.dtype
        return (g.row_sum + of_positive).sum()

    @staticmethod
    def backward(ctx, upstream):
        _first_order_only()
        if ctx.per_row:
            x, y, logit_scale, row_bias, d_pos = ctx.saved_tensors
            problem = _problem(x, y, logit_scale, row_bias, None, ctx.pairs)
            upstream = upstream.to(d_pos.dtype)
            needs = (*ctx.needs_input_grad[:4], False)
            c, d_pos, positives = Sigmoid(upstream), d_pos * upstream, ctx.pairs.positives()
            g = _gradients(problem, c, positives, d_pos, needs, ctx.backend, ctx.pairs.group)
            return _as(x, g.dx), _as(y, g.dy), g.d_scale, g.d_row_bias, None, None, None
        # The gradient of a column has come from the rows of all ranks already, each with an upstream gradient of 1.
        what = 'the upstream gradient of siglip (reduction="none" lets each rank have its own)'
        upstream = ops.same_on_all_ranks(upstream, what, ctx.pairs.group)
        dx, dy, d_scale, d_row_bias = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        dx, dy = (None if g is None else g.to(ctx.dtype) for g in (dx, dy))
        return dx, dy, d_scale, d_row_bias, None, None, None


@dataclass(frozen=True)
class _Gradients:
    dx: Tensor | None  # (N, D) statistic dtype
    dy: Tensor | None  # (M, D) statistic dtype
    d_scale: Tensor | None  # (1,)
    d_row_bias: Tensor | None  # (N,)
    d_col_bias: Tensor | None  # (M,)
    row_sum: Tensor | None  # (N,), with Sigmoid coefficients


def _gradients(
    p: Problem,
    c: Softmax | Sigmoid,
    positives: Partner | SameLabel | None,
    d_pos: Tensor,  # (N,) what reaches the mean positive logit of each row
    needs: tuple[bool, ...],  # x, y, logit_scale, row_bias, col_bias
    backend: str,
    group: str,
    kept: Tensor | None = None,
) -> _Gradients:
    need_x, need_y, need_scale, need_row_bias, need_col_bias = needs
    need_bias = need_row_bias or need_col_bias
    needed = dict(need_x=need_x, need_y=need_y, need_bias=need_bias, need_scale=need_scale)
    g = ops.grad(p, c, **needed, kept=kept, backend=backend, group=group)
    d_scale, d_row_bias, d_col_bias = g.d_scale, g.g_rows, g.g_cols
    # Negatives pull one way what positives pull the other: about their common mean little is left to cancel.
    about = c.about.double() if need_scale and isinstance(c, Softmax) else 0.0
    if positives is not None:
        positives.add_gradients_(g.dx, g.dx if p.triangular else g.dy, p.x, p.y, d_pos)
        if need_scale:
            d_scale = d_scale + (d_pos * (positives.mean_logits(p.x, p.y) - about)).sum()
        if need_row_bias:
            d_row_bias = d_row_bias + d_pos
        if need_col_bias:
            d_col_bias = d_col_bias.index_add(0, positives.index, d_pos)
    if need_scale and isinstance(c, Softmax):
        d_scale = d_scale + about * (c.total() + (0.0 if positives is None else d_pos.double().sum()))
    return _Gradients(
        g.dx.mul_(p.logit_scale) if need_x else None,
        g.dy.mul_(p.logit_scale) if g.dy is not None else None,
        d_scale.to(p.stat_dtype).reshape(1) if need_scale else None,
        d_row_bias if need_row_bias else None,
        d_col_bias if need_col_bias else None,
        g.row_sum,
    )


def _as(like: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
