"""The two reductions over all pairs as differentiable functions.

    log_sum_exp    row_lse, col_lse over the negatives; the logit of the positives; their spread     (softmax family)
    softplus_sum   sum_j softplus(s_ij) over the negatives + softplus(-s_ii)                         (sigmoid family)

Every loss is arithmetic on the vectors that these return. A loss near convergence is a small difference of large numbers
unless it is written as softplus(negatives - positive): that is why negatives and positives come apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcl.dtypes import statistic_dtype
from flashcl.engine import distributed, ops
from flashcl.engine.dispatch import Execution
from flashcl.engine.positives import Partner, SameLabel
from flashcl.engine.problem import Grads, LogSumExp, Needs, Problem, Sigmoid, Softmax


@dataclass(frozen=True)
class Pairs:
    """Which pairs count, and as what. Without partner and labels no pair is a positive; positives have no column bias."""

    program: str = "all"
    rows: tuple[Tensor, ...] = ()  # (N,) each
    cols: tuple[Tensor, ...] = ()  # (M,) each
    partner: int | None = None  # the one positive of row i is the column (i + partner) mod M, which the program drops
    labels: Tensor | None = None  # (N,) int64: rows of one label are positives; program "by_label", S symmetric

    def positives(self, how: Execution, found: Sequence[Tensor] = ()) -> Partner | SameLabel | None:
        """found: what the positives of the forward found out about labels."""
        if self.labels is not None:
            return SameLabel(how.group, *found) if found else SameLabel.of(self.labels, how.group)
        return None if self.partner is None else Partner(self.partner)


@dataclass(frozen=True)
class LogMasses:
    """What log_sum_exp returns, each differentiable and float64: differences of large logits keep their digits.

    Where there are positives, a loss must be of differences: row_neg - row_pos, col_neg - row_pos, row_gap.
    A loss is their arithmetic, rounded to the dtype of its result at the end.
    """

    row_neg: Tensor  # (N,) log sum_j exp(s_ij) over the negatives of row i; -inf without any
    col_neg: Tensor | None  # (M,) the same over columns; None if not asked for, and of a symmetric S: it is row_neg
    row_pos: Tensor | None  # (N,) log sum_j exp(s_ij) over the positives of row i; -inf without any
    row_gap: Tensor | None  # (N,) row_pos_i - mean of the positive logits, >= log |P(i)|; None with one positive a row
    alone: Tensor | None  # (N,) bool: rows without a positive; None with one positive a row


def log_sum_exp(
    x: Tensor,  # (N, D)
    y: Tensor | None,  # (M, D); None: S = logit_scale x x^T is symmetric, and half of it is computed
    logit_scale: Tensor,  # one element
    row_bias: Tensor | None,  # (N,)
    col_bias: Tensor | None,  # (M,)
    pairs: Pairs,
    how: Execution,
    *,
    need_cols: bool,
) -> LogMasses:
    y, col_bias = _unaliased(y, x), _unaliased(col_bias, row_bias)
    tensors = x, y, *_statistic_dtype(x, logit_scale, row_bias, col_bias)
    return LogMasses(*_LogSumExp.apply(*tensors, pairs, how, need_cols, _backward_follows(*tensors)))


def softplus_sum(
    x: Tensor,  # (N, D)
    y: Tensor,  # (M, D)
    logit_scale: Tensor,  # one element
    row_bias: Tensor | None,  # (N,)
    pairs: Pairs,
    how: Execution,
    *,
    per_row: bool,
) -> Tensor:
    """(N,) float64 or, not per_row, their sum: then gradients are made in the forward sweep, and backward only scales them."""
    y, (logit_scale, row_bias) = _unaliased(y, x), _statistic_dtype(x, logit_scale, row_bias)
    backward = _backward_follows(x, y, logit_scale, row_bias)
    loss = _SoftplusSum.apply(x, y, logit_scale, row_bias, pairs, how, per_row or not backward, backward)
    return loss if per_row or not loss.dim() else loss.sum()


def _backward_follows(*tensors: Tensor | None) -> bool:
    """Asked outside of an autograd function: inside, neither no_grad nor inference_mode shows."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def _unaliased(b: Tensor | None, a: Tensor | None) -> Tensor | None:
    """b, as a tensor of its own where it is a: torch.compile passes no tensor twice to an autograd function."""
    return b.view_as(b) if b is not None and b is a else b


def _rounded(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """The dtype of their gradients, and x and y rounded to `dtype`.

    Not by an operation of its own, which would round the gradients, too: those of unit vectors are wanted as they are, since
    normalizing projects out what is parallel to the vector, and a rounding error of that large part would remain.
    """
    y_dtype = x.dtype if y is None else y.dtype  # inside autocast not always that of x
    return torch.promote_types(x.dtype, y_dtype), x.to(dtype), None if y is None else y.to(dtype)


def _statistic_dtype(x: Tensor, logit_scale: Tensor, *biases: Tensor | None) -> list[Tensor | None]:
    dtype = statistic_dtype(x)
    return [logit_scale.to(x.device, dtype).reshape(1), *(None if b is None else b.to(dtype) for b in biases)]


def _problem(x, y, logit_scale, row_bias, col_bias, pairs: Pairs, positives: Partner | SameLabel | None) -> Problem:
    labels = (positives.number,) if isinstance(positives, SameLabel) else ()
    return Problem.of(x, y, logit_scale, row_bias, col_bias, pairs.program, pairs.rows + labels, pairs.cols + labels)


def _first_order_only() -> None:
    # once_differentiable would silently drop a gradient penalty whose upstream gradient is a constant.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "flashcl computes first derivatives only (create_graph=True asks for more): "
            "use the dense loss of the same name in flashcl.reference"
        )


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, logit_scale, row_bias, col_bias, pairs: Pairs, how: Execution, need_cols: bool, keep: bool):
        ctx.dtype, x, y = _rounded(x, y, how.dtype)
        positives = pairs.positives(how)
        problem = _problem(x, y, logit_scale, row_bias, col_bias, pairs, positives)
        products = mean = None
        if positives is not None:
            products = positives.products(problem, how.backend)  # (N,) float64
            mean = _logits(products, problem)
        if pairs.labels is not None:
            problem = replace(problem, center=mean.to(problem.stat_dtype))
        s = ops.sweep(problem, how, need_cols=need_cols, keep=keep)
        if positives is not None and keep and ctx.needs_input_grad[2]:  # products serve the gradient of the scale alone
            products = positives.in_tiles(problem, products, s.deviation, how.backend)

        col_parts = None if s.col is None else s.col.parts
        # What was found out is kept here and not in `pairs`: torch.compile would lose it (torch 2.7).
        found = () if positives is None else positives.found()
        ctx.save_for_backward(x, y, logit_scale, row_bias, col_bias, s.row.parts, col_parts, products, s.kept, *found)
        ctx.pairs, ctx.how = pairs, how
        ctx.set_materialize_grads(False)

        row = s.row.value()  # (K, N) float64
        if pairs.labels is None:
            return row[0], None if s.col is None else s.col.value()[0], mean, None, None
        # The mean logit by way of its deviation in the tiles: there its error is that of the logits in row_pos, and cancels.
        gap = row[1] - torch.addcmul(problem.center, s.deviation, positives.inverse)
        alone = positives.inverse == 0
        ctx.mark_non_differentiable(alone)
        return row[0], None, row[1], gap.masked_fill(problem.center == -torch.inf, torch.inf), alone

    @staticmethod
    def backward(ctx, d_row, d_col, d_pos, d_gap, _):
        _first_order_only()
        x, y, logit_scale, row_bias, col_bias, row_parts, col_parts, products, kept, *found = ctx.saved_tensors
        positives = ctx.pairs.positives(ctx.how, found)
        problem = _problem(x, y, logit_scale, row_bias, col_bias, ctx.pairs, positives)
        if ctx.how.group and col_parts is not None and d_col is None:  # another rank may use its columns
            d_col = torch.zeros_like(LogSumExp(col_parts).top[0], dtype=torch.float64)
        row, col = LogSumExp(row_parts), None if d_col is None else LogSumExp(col_parts)
        if d_row is None and col is not None:  # nothing has used the rows: as if they had no pairs, since 0 exp(NaN) is not 0
            row = LogSumExp.of_no_pair(problem, x.shape[0])
        d_row, d_pos = (_or_zeros(d, row) for d in (d_row, d_pos))

        about, d_scale_beside = None, 0.0
        if ctx.needs_input_grad[2]:
            about = _mean_product(problem, products, positives, ctx.how.group)
            if positives is None:
                d_scale_beside = about.double() * _sum_of_g((d_row, row), (d_col, col))
            else:
                d_scale_beside = torch.dot(d_pos, products - about)
        if ctx.pairs.labels is not None:
            c = _softmax_with_labels(d_row, d_pos, _or_zeros(d_gap, row), row, positives, about)
        else:
            of_cols = () if col is None else (col.of_top(d_col[None]), col.top)
            c = Softmax(row.of_top(d_row[None]), row.top, *of_cols, about=about)
        needs = Needs(*ctx.needs_input_grad[:5])
        g = _gradients(problem, c, positives, d_pos, needs, ctx.how, dtype=ctx.dtype, d_scale_beside=d_scale_beside, kept=kept)
        return g.dx, g.dy, g.d_scale, g.g_rows, g.g_cols, None, None, None, None


def _or_zeros(upstream: Tensor | None, row: LogSumExp) -> Tensor:
    return torch.zeros_like(row.top[0], dtype=torch.float64) if upstream is None else upstream


def _logits(products: Tensor, p: Problem) -> Tensor:
    """(N,) float64, of products (N,) of the rows with anything without a column bias."""
    logits = products * p.logit_scale
    return logits if p.row_bias is None else logits + p.row_bias


def _sum_of_g(*sides: tuple[Tensor | None, LogSumExp | None]) -> Tensor:
    """(), float64, of upstream gradients and log-sum-exps of rows and of columns: each softmax sums to 1, or has no pairs.

    About another product than 0, the tiles miss that times this in d(logit_scale). With positives it is 0 but for theirs: a loss
    is of differences between negatives and positives.
    """
    return sum(d.masked_fill(lse.top[0] == -torch.inf, 0.0).sum() for d, lse in sides if d is not None)


def _softmax_with_labels(
    d_row: Tensor, d_pos: Tensor, d_gap: Tensor, row: LogSumExp, labels: SameLabel, about: Tensor | None
) -> Softmax:
    """Upstream gradients as coefficients of G, where the positives of a row have a softmax q_ij of their own.

        d_pos q_ij + d_gap (q_ij - 1/|P|)  =  (d_pos + d_gap) (q_ij - 1/|P|)  +  d_pos / |P|

    The first part, small when the positives are alike, goes through G; the second, equal for all of them, through
    SameLabel.finish in full precision. Rows without positives receive 0 of both: their loss is filled, not computed.
    """
    weight = d_pos + d_gap
    weights = row.of_top(torch.stack([d_row, weight]))
    offset = torch.mul(weight, labels.inverse, out=torch.empty_like(weights[0]))  # rounds
    return Softmax(weights, row.top, row_offset=offset, about=about)


def _mean_product(p: Problem, products: Tensor | None, positives: Partner | SameLabel | None, group: str) -> Tensor:
    """The mean of <x_i, y_j>, of all ranks, (1,) statistic dtype: over the positives or, where there are none, over all pairs.

    d(logit_scale) = sum_ij G_ij (<x_i, y_j> - about) + about sum_ij G_ij: about this product, little is left to cancel.
    At convergence G is left of positives alone. Those of a row cancel but for the last bits of exp, if it errs to one side:
    these count by how far a product is from the mean.
    """
    if products is None:
        return _mean_over_all_pairs(p, group)
    if isinstance(positives, Partner) and not group:  # every row has one: a single launch
        return products.mean(0, keepdim=True, dtype=p.stat_dtype)
    some = positives.inverse != 0 if isinstance(positives, SameLabel) else torch.ones_like(products, dtype=torch.bool)
    total, count = distributed.sum_over_ranks(torch.stack([products.masked_fill(~some, 0.0).sum(), some.sum()]), group)
    return (total / count.clamp(min=1)).to(p.stat_dtype).reshape(1)


def _mean_over_all_pairs(p: Problem, group: str) -> Tensor:
    lines = [p.x] if p.triangular else [p.x, p.y]
    sums = torch.stack([v.sum(0, dtype=p.stat_dtype) for v in lines])  # (1 or 2, D)
    counts = [v.shape[0] for v in lines]
    if group:
        counts = torch.stack([torch.ones_like(v[:, :1], dtype=p.stat_dtype).sum(0) for v in lines])  # (1 or 2, 1)
        both = distributed.sum_over_ranks(torch.cat([sums, counts], 1), group)
        sums, counts = both[:, :-1], both[:, -1]
    return torch.dot(sums[0] / counts[0], sums[-1] / counts[-1]).reshape(1)  # of the means: the sums' may overflow


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, logit_scale, row_bias, pairs: Pairs, how: Execution, per_row: bool, keep: bool):
        ctx.pairs, ctx.how, ctx.per_row = pairs, how, per_row
        ctx.dtype, x, y = _rounded(x, y, how.dtype)
        positives = pairs.positives(how)
        problem = _problem(x, y, logit_scale, row_bias, None, pairs, positives)
        products = positives.products(problem, how.backend)
        log_p = torch.nn.functional.logsigmoid(_logits(products, problem))  # the loss of a positive is -log_p
        d_pos = torch.expm1(log_p)
        tile_ratio = positives.tile_ratio(problem, products, how.backend)
        if per_row:
            ctx.save_for_backward(x, y, logit_scale, row_bias, products, d_pos, tile_ratio)
            return ops.sweep_softplus(problem, how, tile_scale=_tile_scale(problem, tile_ratio), keep=keep) - log_p
        c, needs = Sigmoid(torch.ones_like(d_pos, dtype=problem.stat_dtype)), Needs(*ctx.needs_input_grad[:4])
        # Kept wide: they are rounded to the dtype of x and y once, after the upstream gradient has scaled them.
        g = _gradients(
            problem, c, positives, d_pos, needs, how,
            dtype=problem.stat_dtype, d_scale_beside=torch.dot(d_pos, products), tile_ratio=tile_ratio,
        )  # fmt: skip
        ctx.save_for_backward(g.dx, g.dy, g.d_scale, g.g_rows)
        return (g.row_sum - log_p).sum()

    @staticmethod
    def backward(ctx, upstream):
        _first_order_only()
        if ctx.per_row:
            x, y, logit_scale, row_bias, products, d_pos, tile_ratio = ctx.saved_tensors
            positives = ctx.pairs.positives(ctx.how)
            problem = _problem(x, y, logit_scale, row_bias, None, ctx.pairs, positives)
            c, d_pos = Sigmoid(upstream.to(problem.stat_dtype)), d_pos * upstream
            g = _gradients(
                problem, c, positives, d_pos, Needs(*ctx.needs_input_grad[:4]), ctx.how,
                dtype=ctx.dtype, d_scale_beside=torch.dot(d_pos, products), tile_ratio=tile_ratio,
            )  # fmt: skip
            return g.dx, g.dy, g.d_scale, g.g_rows, None, None, None, None
        # The gradient of a column has come from the rows of all ranks already, each with an upstream gradient of 1.
        what = 'the upstream gradient of siglip (reduction="none" lets each rank have its own)'
        upstream = distributed.agree_on(upstream, what, ctx.how.group)
        *matrices, d_scale, d_row_bias = ctx.saved_tensors
        # Scaled and rounded at once: what is saved is wide, and another wide copy of it would be the largest memory of a step.
        dx, dy = (None if g is None else torch.mul(g, upstream, out=torch.empty_like(g, dtype=ctx.dtype)) for g in matrices)
        d_scale, d_row_bias = (None if g is None else g * upstream for g in (d_scale, d_row_bias))
        return dx, dy, d_scale, d_row_bias, None, None, None, None


def _gradients(
    p: Problem,
    c: Softmax | Sigmoid,
    positives: Partner | SameLabel | None,
    d_pos: Tensor,  # (N,) float64: what reaches the mean positive logit of each row
    needs: Needs,
    how: Execution,
    *,
    dtype: torch.dtype,  # of dx and dy
    d_scale_beside: Tensor | float,  # what the gradient of logit_scale has beside that of the tiles
    kept: Tensor | None = None,
    tile_ratio: Tensor | None = None,  # (1,) float64: of the products of tiles, if it is to be made up for
) -> Grads:
    """The gradients of the tiles and of the positives beside them: as leaves receive them, d_scale (1,) statistic dtype."""
    g = ops.grad(p, c, needs, how, tile_scale=_tile_scale(p, tile_ratio), kept=kept)
    # Held by nothing else: a wide gradient is given back before the other one is rounded.
    dx, dy, d_row_bias, g = g.dx, g.dy, g.g_rows, replace(g, dx=None, dy=None)
    if positives is None:

        def scaled(d: Tensor | None) -> Tensor | None:
            return None if d is None else ops.finish(d, None, None, 0, p.logit_scale, dtype, backend=how.backend)

        dx = scaled(dx)
        dy = scaled(dy)
    else:
        d_pos = d_pos.to(p.stat_dtype)
        dx, _ = positives.finish(p, dx, None, d_pos, dtype, how.backend)
        if dy is not None:  # else a triangular problem would roll its weights twice
            _, dy = positives.finish(p, None, dy, d_pos, dtype, how.backend)
        d_row_bias = d_row_bias + d_pos if needs.row_bias else None
    d_scale = None
    if needs.scale:
        of_tiles = g.d_scale.reshape(1) if tile_ratio is None else g.d_scale / tile_ratio
        d_scale = torch.add(of_tiles, d_scale_beside, out=torch.empty_like(p.logit_scale))  # rounds
    return replace(g, dx=dx, dy=dy, g_rows=d_row_bias, d_scale=d_scale)


def _tile_scale(p: Problem, tile_ratio: Tensor | None) -> Tensor | None:
    """The scale of p, larger by what is missing in the products of tiles."""
    return None if tile_ratio is None else torch.div(p.logit_scale, tile_ratio, out=torch.empty_like(p.logit_scale))
