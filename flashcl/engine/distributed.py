"""The operations of a backend over all ranks of a group: rows of this rank against the columns of every rank.

Each logit is computed once in the world, forward and backward. What a rank passes and gets back are its own lines:

    sweep    log-sum-exps of its rows over all columns, of its columns over all rows
    grad     given the coefficients of its rows and of its columns, the gradients of its rows and of its columns

Statistics of columns merge by an all-reduce of O(N) numbers. A triangular problem is one line set against itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from flashcl.engine.exchange import Block, Share, everything, exchange, half
from flashcl.engine.problem import Backend, Grads, LogSumExp, Needs, Problem, Sigmoid, Softmax, Statistics
from flashcl.engine.ranks import Ranks, exactly


@dataclass(frozen=True)
class _World:
    """A problem of which each rank holds some lines."""

    ranks: Ranks
    p: Problem  # of this rank, with ids that are unique in the world
    rows_of_ranks: list[int]
    cols_of_ranks: list[int]
    cols: tuple[Tensor, ...]  # (M of all ranks,) vectors of the program
    col_bias: Tensor | None
    col_center: Tensor | None

    @staticmethod
    def meet(what: str, p: Problem, group: str, tile_scale: Tensor | None = None, **same) -> _World:
        """tile_scale: what the tiles of this rank take for logit_scale; None: the same."""
        same |= {
            "D": p.x.shape[1],
            "dtype": str(p.x.dtype),
            "program": p.program,
            "x and y the same": p.triangular,
            "row_bias given": p.row_bias is not None,
            "col_bias given": p.col_bias is not None,
            "logit_scale": exactly(p.logit_scale),
        }
        ranks = Ranks.meet(group, p.x.device, what, same, (len(p.x), len(p.y)))
        rows_of_ranks, cols_of_ranks = map(list, zip(*ranks.counts))
        if not sum(rows_of_ranks) or not sum(cols_of_ranks):
            raise ValueError(f"no rank of the group has rows: counts are {ranks.counts}")
        p = _with_ids_of_the_world(p, ranks)
        p = p if tile_scale is None else replace(p, logit_scale=tile_scale)

        def of_all(v):
            return None if v is None else ranks.all_lines(v, cols_of_ranks)

        cols = tuple(map(of_all, p.cols))
        return _World(ranks, p, rows_of_ranks, cols_of_ranks, cols, of_all(p.col_bias), of_all(p.center))

    def share(self) -> Share:
        return half(self.rows_of_ranks) if self.p.triangular else everything(self.rows_of_ranks, self.cols_of_ranks)

    def at(self, block: Block) -> list[slice]:
        """Where the pieces of a block lie among the columns of the world."""
        starts = [0, *accumulate(self.cols_of_ranks)]
        return [slice(starts[q] + at.start, starts[q] + at.stop) for q, at in block.pieces]

    def own_cols(self) -> slice:
        """Of the columns of the world."""
        start = sum(self.cols_of_ranks[: self.ranks.rank])
        return slice(start, start + self.cols_of_ranks[self.ranks.rank])

    def own(self, block: Block) -> bool:
        return block.pieces[0].rank == self.ranks.rank

    def problem(self, block: Block) -> Problem:
        if self.own(block):
            return self.p
        p, rows, at = self.p, block.rows, self.at(block)
        return replace(
            p,
            x=p.x[rows],
            y=block.y,
            row_bias=_take(p.row_bias, [rows]),
            col_bias=_take(self.col_bias, at),
            rows=tuple(v[rows] for v in p.rows),
            cols=tuple(_take(v, at) for v in self.cols),
            center=_take(p.center, [rows]),
            col_center=_take(self.col_center, at),
            triangular=False,
        )


def _with_ids_of_the_world(p: Problem, ranks: Ranks) -> Problem:
    """Lines of different ranks never have equal ids; lines of one rank that had equal ids keep them."""
    if not p.rows:
        return p
    first = sum(max(counts) for counts in ranks.counts[: ranks.rank])
    rows, cols = ((v[0] + first, *v[1:]) for v in (p.rows, p.cols))
    return replace(p, rows=rows, cols=cols)


def _take(v: Tensor | None, at: list[slice]) -> Tensor | None:
    """The elements of v (..., n) in several slices, one after the other."""
    return None if v is None else v[..., at[0]] if len(at) == 1 else torch.cat([v[..., i] for i in at], -1)


def _put(v: Tensor, at: list[slice], values: Tensor) -> None:
    for i, part in zip(at, values.split([i.stop - i.start for i in at], -1)):
        v[..., i] = part


# ---- sweep ---------------------------------------------------------------------------------------------------------------


def sweep(backend: Backend, p: Problem, group: str, *, need_cols: bool, keep: bool) -> Statistics:
    world = _World.meet("the statistics of a loss", p, group, symmetric=need_cols, **{"any gradient wanted": keep})
    p, need_cols = world.p, need_cols or world.p.triangular
    row, col = (LogSumExp.of_no_pair(p, n) for n in (len(p.x), sum(world.cols_of_ranks)))
    deviation, col_deviation = (None if p.center is None else torch.zeros(n, dtype=torch.float64, device=p.x.device)
                                for n in (len(p.x), sum(world.cols_of_ranks)))  # fmt: skip
    for block in exchange(world.ranks, p.y, world.cols_of_ranks, world.share()).walk():
        if not len(block.y) or block.rows.start == block.rows.stop:
            continue
        s, at = backend.sweep(world.problem(block), need_cols=need_cols, keep=False), world.at(block)
        _merge_(row, block.rows, s.row)
        if s.col is not None:
            _put(col.parts, at, s.col.parts)
        if deviation is not None:
            deviation[block.rows] += s.deviation
            if s.col_deviation is not None:
                _put(col_deviation, at, s.col_deviation)
    if p.triangular:
        _put(col.parts, [world.own_cols()], row.parts)
        row, deviation = _over_ranks(world, col), _deviation_over_ranks(world, deviation, col_deviation)
        return Statistics(row, None, deviation)
    return Statistics(row, _over_ranks(world, col) if need_cols else None, deviation)


def _merge_(total: LogSumExp, at: slice, part: LogSumExp) -> None:
    """total[:, at] becomes the log-sum-exp of itself and part."""
    parts = torch.stack([total.parts[..., at], part.parts])  # (2, K, 2, n)
    tops, rests = parts.unbind(2)
    top = tops.amax(0)
    total.parts[..., at] = LogSumExp.of(top, _relative(tops, rests, top).sum(0).log().to(top.dtype)).parts


def _relative(top: Tensor, rest: Tensor, to: Tensor) -> Tensor:
    """exp(top + rest - to), float64: 0 of no pair, and inf - inf is 0 here."""
    relative = torch.where(top == to, 1.0, torch.exp((top - to).double())) * rest.double().exp()
    return relative.masked_fill(top == -torch.inf, 0.0)


def _over_ranks(world: _World, part: LogSumExp) -> LogSumExp:
    """Log-sum-exps (K, M of all ranks) of the pairs of this rank become those of the lines of this rank over all pairs."""
    # max ignores NaN on some devices; a sum never does.
    top = world.ranks.max_(part.top.nan_to_num(-torch.inf, torch.inf, -torch.inf))
    total = world.ranks.sum_(_relative(part.top, part.rest, top))
    own = world.own_cols()
    top, total = top[:, own], total[:, own]
    return LogSumExp.of(torch.where(total.isnan(), torch.nan, top), total.log().to(top.dtype))


def _deviation_over_ranks(world: _World, own: Tensor | None, others: Tensor | None) -> Tensor | None:
    if own is None:
        return None
    others[world.own_cols()] += own
    return world.ranks.sum_(others)[world.own_cols()]


def sweep_softplus(backend: Backend, p: Problem, group: str, *, tile_scale: Tensor | None, keep: bool) -> Tensor:
    world = _World.meet("the sums of a loss", p, group, tile_scale, **{"any gradient wanted": keep})
    total = torch.zeros(len(p.x), dtype=p.stat_dtype, device=p.x.device)
    for block in exchange(world.ranks, p.y, world.cols_of_ranks, world.share()).walk():
        if len(block.y) and len(p.x):
            total += backend.sweep_softplus(world.problem(block))
    return total


# ---- grad ----------------------------------------------------------------------------------------------------------------


def grad(
    backend: Backend,
    p: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    group: str,
    *,
    tile_scale: Tensor | None,
) -> Grads:
    wanted = [name for name, need in needs._asdict().items() if need]
    world = _World.meet("the gradients of a loss", p, group, tile_scale, **{"gradients wanted": wanted})
    p, constants = world.p, world.ranks.rules.others_are_constants
    total = Grads.zeros(p, c, needs, cols=sum(world.cols_of_ranks))
    cols = None if isinstance(c, Sigmoid) else _coefficients_of_all(world, c)
    home = total.dx if p.triangular else total.dy
    columns_have_losses = p.triangular or (isinstance(c, Softmax) and c.col_weight is not None)
    if constants and not columns_have_losses:
        home = None  # the losses of other ranks' rows give this rank's columns no gradient
    others = exchange(world.ranks, p.y, world.cols_of_ranks, world.share(), home)
    for block in others.walk():
        if not len(block.y) or block.rows.start == block.rows.stop:
            continue
        own, problem, at = world.own(block), world.problem(block), world.at(block)
        wants_y = (total.dy if own else home) is not None
        for part, for_x, for_y in _parts(c if own else _part(c, cols, block.rows, at), own, constants):
            g = backend.grad(problem, part, needs._replace(x=needs.x and for_x, y=wants_y and for_y))
            _add_(total, g, block.rows, at)
            if g.dy is not None:
                total.dy.add_(g.dy) if own else others.give_back(block, g.dy)
    if needs.col_bias:
        total = replace(total, g_cols=world.ranks.sum_(total.g_cols)[world.own_cols()])
    return total


def _add_(total: Grads, g: Grads, rows: slice, at: list[slice]) -> None:
    """All that a block has of the gradients of its rows, of its columns among those of all ranks, and of the scale; not dy."""
    if g.dx is not None:
        total.dx[rows] += g.dx
    if g.g_rows is not None:
        total.g_rows[rows] += g.g_rows
    if g.g_cols is not None:
        _put(total.g_cols, at, _take(total.g_cols, at) + g.g_cols)
    if g.d_scale is not None:
        total.d_scale.add_(g.d_scale)
    if g.row_sum is not None:
        total.row_sum[rows] += g.row_sum


def _coefficients_of_all(world: _World, c: Softmax) -> Softmax:
    """Those of the columns of all ranks; of a triangular problem the columns are the rows."""
    side = (c.row_weight, c.row_top, c.row_offset) if world.p.triangular else (c.col_weight, c.col_top, c.col_offset)
    weight, top, offset = (None if v is None else world.ranks.all_lines(v, world.cols_of_ranks) for v in side)
    return replace(c, col_weight=weight, col_top=top, col_offset=offset)


def _part(c: Softmax | Sigmoid, cols: Softmax | None, rows: slice, at: list[slice]) -> Softmax | Sigmoid:
    """The coefficients of a block against columns of other ranks."""
    if isinstance(c, Sigmoid):
        return Sigmoid(c.row_weight[rows])
    return Softmax(
        c.row_weight[:, rows], c.row_top[:, rows], _take(cols.col_weight, at), _take(cols.col_top, at),
        _take(c.row_offset, [rows]), _take(cols.col_offset, at), c.about,
    )  # fmt: skip


def _parts(c: Softmax | Sigmoid, own: bool, others_are_constants: bool) -> list[tuple[Softmax | Sigmoid, bool, bool]]:
    """The coefficients of each call of a backend, and whether its dx and its dy count.

    "local_partial": lines of other ranks are constants to a loss. What rows lose goes to them, what columns lose to those.
    """
    if own or not others_are_constants:
        return [(c, True, True)]
    if isinstance(c, Sigmoid):
        return [(c, True, False)]
    row = replace(c, col_weight=None, col_top=None, col_offset=None)
    if c.col_weight is None:
        return [(row, True, False)]
    col = replace(c, row_weight=torch.zeros_like(c.row_weight), row_offset=None)
    return [(row, True, False), (col, False, True)]


# ---- sums over lines with equal labels -----------------------------------------------------------------------------------


def labels_of_all(labels: Tensor, group: str) -> Tensor:
    """The labels (n,) of every rank, in the order of ranks."""
    ranks = Ranks.meet(group, labels.device, "the labels", {"dtype of labels": str(labels.dtype)}, (len(labels),))
    return ranks.all_lines(labels, [n for (n,) in ranks.counts])


def label_blocks(x: Tensor, labels: Tensor, weights: Tensor, group: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x (n, D), labels (n,) and weights (P, n) of every rank, block by block; those of this rank first.

    Of the weights the first are for values, the others carry gradients: "local_partial" has none from other ranks' rows.
    """
    ranks = Ranks.meet(group, x.device, "the sums of labels", {"D": x.shape[1], "dtype": str(x.dtype)}, (len(x),))
    sizes = [n for (n,) in ranks.counts]
    labels, weights = ranks.all_lines(labels, sizes), ranks.all_lines(weights, sizes)
    starts = [0, *accumulate(sizes)]
    for block in exchange(ranks, x, sizes, lambda r, q: (slice(0, 1), slice(0, sizes[q]))).walk():
        at = [slice(starts[q] + i.start, starts[q] + i.stop) for q, i in block.pieces]
        of_block = _take(weights, at)
        if ranks.rules.others_are_constants and block.pieces[0].rank != ranks.rank:
            of_block = torch.cat([of_block[:1], torch.zeros_like(of_block[1:])])
        yield block.y, _take(labels, at), of_block


# ---- a few numbers -------------------------------------------------------------------------------------------------------


def agree_on(v: Tensor, what: str, group: str) -> Tensor:
    """v () if every rank has the same, as without a group; a RuntimeError on every rank otherwise."""
    if group:
        Ranks.meet(group, v.device, "a comparison", {what: exactly(v)})
    return v


def sum_over_ranks(v: Tensor, group: str, *, met: bool = False) -> Tensor:
    """v, a few numbers, summed over the ranks; v itself without a group.

    met: the ranks have just been in another operation of the same loss, so that they agree: the host does not wait.
    """
    if not group:
        return v
    what = "a sum over ranks"
    ranks = Ranks(group, v.device, what) if met else Ranks.meet(group, v.device, what, {"shape": list(v.shape)})
    return ranks.sum_(v.clone())
