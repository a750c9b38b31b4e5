"""The torch backend: tiles of plain PyTorch operations, on CPUs and GPUs, in any floating dtype.

One tile of logits is alive at a time, in buffers that are made once per call; beside them a sweep on a CPU leaves a bounded
number of products for the backward. The GEMMs are the library's; what happens to a tile between them runs in place while
the tile is in cache. On a CPU a tile decides by looking at its values whether one
exp per logit is safe; on a GPU such a look would make the host wait, so there the careful form is always taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flashcl.backends import tiled
from flashcl.backends.gemm import addmm_, mm
from flashcl.engine.problem import Grads, LogSumExp, Needs, Problem, Sigmoid, Softmax, Statistics

# Rows and columns of a tile. CPU: 2 MiB of float32, so that the passes over a tile stay in the second-level caches; twice as
# many rows as columns, since the column block and its gradient are read anew for every row block. GPU: 64 MiB, since there
# a tile has to be many waves of thread blocks.
_CPU_TILE, _GPU_TILE = (1024, 512), (4096, 4096)

# A sweep on a CPU leaves the products <x_i, y_j> of its first tiles for the backward, up to 64 MiB: all of them where
# N <= 4096, so that small problems do the 6 N M D of the dense formula. On a GPU the recomputation is cheap.
_KEPT_BYTES = 64 * 2**20

# Equal ids are listed as pairs up to this share of a tile, beyond it they are a mask: a list costs by its length, a mask by
# the tile.
_MANY_PAIRS = 1 / 8

# The lines of a tile may share one exp per logit, exp(s - top), where no sum is below this: e^-16. s - top is rounded by half a
# unit in the last place of the spread, which below 16 is 5e-7 of a term.
_SAFE_SUM = 1e-7

# The log-sum-exps of a tile may share one exp per logit, exp(s - low) * exp(low - lse), where they lie this close above
# low. Overflow would allow 60; but s - low is rounded by up to half a unit in the last place of the spread, which at 8 is
# 5e-7 of the result.
_SPREAD = 8.0


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return "statistics are summed up in float64, which mps has not" if device.type == "mps" else None


def kept_elements(p: Problem) -> int:
    if p.x.device.type != "cpu":
        return 0
    # sym_min: under torch.compile the sizes are symbols, and min would compile anew where they cross the limit.
    return torch.sym_min(p.x.shape[0] * p.y.shape[0], _KEPT_BYTES // p.stat_dtype.itemsize)


# ---- tiles ---------------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    j: slice  # its columns
    y: Tensor  # (BM, D) of these columns
    s: Tensor  # (BN, BM) logits, for the taker to overwrite
    classes: _Classes
    product: Tensor  # (BN, BM) <x_i, y_j>, to read
    free: Tensor  # (BN, BM) with nothing in it


class _Tiles:
    """Walks the logits of a problem, tile by tile, in three buffers.

    The first products are written to `keep`, or read from `kept`, a flat tensor of tiles one after the other.
    """

    def __init__(self, p: Problem, *, keep: Tensor | None = None, kept: Tensor | None = None):
        self.p = p
        self._store, self._stored, self._offset = keep if kept is None else kept, kept is not None, 0
        self.bn, self.bm = _GPU_TILE if p.x.is_cuda else _CPU_TILE
        # A CPU has no 16-bit GEMM with a float32 result: there the operands are widened, a block at a time.
        self.operand_dtype = p.x.dtype if p.x.is_cuda else p.stat_dtype
        size = min(self.bn, len(p.x)) * min(self.bn if p.triangular else self.bm, len(p.y))
        self._buffers = [torch.empty(size, dtype=p.stat_dtype, device=p.x.device) for _ in range(3)]

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.p.x), self.bn):
            i = slice(start, min(start + self.bn, len(self.p.x)))
            yield i, self.p.x[i].to(self.operand_dtype)  # (BN, D)

    def along(self, i: slice, x: Tensor) -> Iterator[_Tile]:
        """The tiles of the row block i."""
        for j in self._columns(i):
            y = self.p.y[j].to(self.operand_dtype)  # (BM, D)
            product, s, free = (b[: len(x) * len(y)].view(len(x), len(y)) for b in self._buffers)  # (BN, BM)
            product = self._product(x, y, product)
            torch.mul(product, self.p.logit_scale, out=s)
            if self.p.row_bias is not None:
                s.add_(self.p.row_bias[i, None])
            if self.p.col_bias is not None:
                s.add_(self.p.col_bias[j])
            classes = _classes(self.p.program, [v[i] for v in self.p.rows], [v[j] for v in self.p.cols])
            if classes.dropped is not None:
                _fill_(s, classes.dropped, -torch.inf)
            yield _Tile(j, y, s, classes, product, free)

    def _columns(self, i: slice) -> Iterator[slice]:
        if self.p.triangular:
            yield i  # a square tile, on the diagonal
        for start in range(i.stop if self.p.triangular else 0, len(self.p.y), self.bm):
            yield slice(start, min(start + self.bm, len(self.p.y)))

    def _product(self, x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
        """<x_i, y_j>, (BN, BM), from the store or computed, there or in the buffer."""
        end = self._offset + buffer.numel()
        if self._store is None or end > len(self._store):
            mm(x, y.T, out=buffer)
            return buffer
        product, self._offset = self._store[self._offset : end].view_as(buffer), end
        if not self._stored:
            mm(x, y.T, out=product)
        return product


_Pairs = Tensor | tuple[Tensor, Tensor]  # an index into a tile: a mask (BN, BM), or rows (P,) and columns (P,)


class _Classes(NamedTuple):
    """What a pair program says of a tile, None where it says nothing."""

    dropped: _Pairs | None
    positive: _Pairs | None = None


def _classes(program: str, rows: list[Tensor], cols: list[Tensor]) -> _Classes:
    match program:
        case "all":
            return _Classes(None)
        case "different":
            return _Classes(_equal(rows[0], cols[0]))
        case "by_label":
            same, positive = _equal(rows[0], cols[0]), _equal(rows[1], cols[1])
            return _Classes(same, _without(positive, same, rows[0], cols[0]))
    raise ValueError(f"the torch backend has no pair program {program!r}")


def _equal(row_id: Tensor, col_id: Tensor) -> _Pairs:
    """The pairs of equal ids: a mask on a GPU, where the host must not wait to count them, and where there are many."""
    if row_id.device.type != "cpu":
        return row_id[:, None] == col_id
    (row_first, row_last), (col_first, col_last) = row_id.aminmax(), col_id.aminmax()
    if row_last < col_first or col_last < row_first:  # ids mostly are row numbers: only tiles on the diagonal have equal ones
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return none, none
    ordered, j = col_id.sort()
    first, end = (torch.searchsorted(ordered, row_id.contiguous(), right=right) for right in (False, True))
    count = end - first  # how many columns have the id of each row
    if count.sum() > _MANY_PAIRS * len(row_id) * len(col_id):
        return row_id[:, None] == col_id
    i = torch.arange(len(row_id), device="cpu").repeat_interleave(count)
    nth = torch.arange(len(i), device="cpu") - (count.cumsum(0) - count)[i]
    return i, j[first[i] + nth]


def _without(positive: _Pairs, same: _Pairs, row_id: Tensor, col_id: Tensor) -> _Pairs:
    """`positive` less the pairs of equal ids."""
    if isinstance(positive, tuple):
        i, j = positive
        other = row_id[i] != col_id[j]
        return i[other], j[other]
    _fill_(positive, same, False)
    return positive


def _fill_(tile: Tensor, pairs: _Pairs, value: float) -> None:
    if isinstance(pairs, tuple):
        tile[pairs] = value
    else:
        tile.masked_fill_(pairs, value)  # an assignment at a mask may count the pairs first, and the host wait for it


# ---- sweep ---------------------------------------------------------------------------------------------------------------


def sweep(p: Problem, *, need_cols: bool, keep: bool) -> Statistics:
    need_cols = need_cols and not p.triangular
    row = _Running(p, len(p.x))
    col = row if p.triangular else _Running(p, len(p.y))
    deviation, col_deviation = (_no_deviation(p, center) for center in (p.center, p.col_center))
    kept = torch.empty(kept_elements(p), dtype=p.stat_dtype, device=p.x.device) if keep else None
    tiles = _Tiles(p, keep=kept)
    for i, x in tiles.rows():
        in_rows, in_cols = ([[] for _ in range(p.classes)] for _ in range(2))
        for j, _, s, classes, _, free in tiles.along(i, x):
            mirrored = p.triangular and j.start > i.start
            if deviation is not None:
                deviation[i] += _deviation(s, p.center[i], classes.positive, free, 1)
                if mirrored:
                    deviation[j] += _deviation(s, p.center[j], classes.positive, free, 0)
                if col_deviation is not None:
                    col_deviation[j] += _deviation(s, p.col_center[j], classes.positive, free, 0)
            sums = _class_sums(s, classes.positive, free, need_cols=need_cols or mirrored)
            for k, (of_rows, of_cols) in enumerate(sums):
                in_rows[k].append(of_rows)
                if of_cols is not None:
                    in_cols[k].append(of_cols)
        for k in range(p.classes):
            row.add(k, i, in_rows[k], first=i.start == 0 or not p.triangular)
            if in_cols[k]:
                own = tuple(map(torch.cat, zip(*in_cols[k])))
                col.add(k, slice(i.stop if p.triangular else 0, len(p.y)), [own], first=i.start == 0)
    return Statistics(row.result(), col.result() if need_cols else None, deviation, col_deviation, kept)


def _no_deviation(p: Problem, center: Tensor | None) -> Tensor | None:
    return None if center is None else torch.zeros(len(center), dtype=torch.float64, device=p.x.device)


def _deviation(s: Tensor, center: Tensor, positive: _Pairs, free: Tensor, axis: int) -> Tensor:
    """sum of s - center over the positives of each row (axis 1, center (BN,)), or of each column (axis 0, center (BM,))"""
    if isinstance(positive, tuple):
        line = positive[1 - axis]
        return _line_sums(s[positive] - center[line], line, len(center))
    return torch.sub(s, center.unsqueeze(axis), out=free).masked_fill_(~positive, 0.0).sum(axis)


def _line_sums(v: Tensor, line: Tensor, n: int) -> Tensor:
    """The sums of the v (P,) of each line, (n,) float64: in that dtype a CPU adds them in order, in float32 in any."""
    return torch.zeros(n, dtype=torch.float64, device=v.device).index_put_((line,), v.double(), accumulate=True)


class _Running:
    """Log-sum-exps of every class for all rows, or all columns, while tiles are added."""

    def __init__(self, p: Problem, n: int):
        self.top = torch.full((p.classes, n), -torch.inf, dtype=p.stat_dtype, device=p.x.device)
        # float64: one more rounding per tile would show in a row of many tiles.
        self.total = torch.zeros(p.classes, n, dtype=torch.float64, device=p.x.device)  # sum of exp(s - top)

    def add(self, k: int, block: slice, parts: list[tuple[Tensor, Tensor]], *, first: bool) -> None:
        parts = parts if first else [(self.top[k, block], self.total[k, block]), *parts]
        if parts:  # none where there are no columns
            self.top[k, block], self.total[k, block] = _fold(parts)

    def result(self) -> LogSumExp:
        return LogSumExp.of(self.top, self.total.log_().to(self.top.dtype))


def _fold(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(top, total) each (B,), total a sum of exp(s - top), of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    tops, totals = (torch.stack(v) for v in zip(*parts))  # (P, B)
    top = tops.amax(0)
    decay = torch.where(tops == top, 1.0, torch.exp((tops - top).double()))  # inf - inf is 0 here
    return top, decay.mul_(totals).sum(0)


def _class_sums(s: Tensor, positive: _Pairs | None, free: Tensor, *, need_cols: bool) -> Iterator[tuple[tuple, tuple | None]]:
    """(top, sum of exp(s - top)) of each row (BN,), and of each column (BM,), of one class after the other. Overwrites s."""
    if positive is None:
        yield _tile_sums(s, free, need_cols=need_cols)
    elif isinstance(positive, tuple):
        of_positives = s[positive]  # (P,)
        _fill_(s, positive, -torch.inf)
        yield _tile_sums(s, free, need_cols=need_cols)
        row, col = (_own_top_sums_of_pairs(of_positives, line, n) for line, n in zip(positive, s.shape))
        yield row, col if need_cols else None
    else:
        yield _tile_sums(s.masked_fill(positive, -torch.inf), free, need_cols=need_cols)
        yield _tile_sums(s.masked_fill_(~positive, -torch.inf), free, need_cols=need_cols)


def _tile_sums(s: Tensor, free: Tensor, *, need_cols: bool) -> tuple[tuple, tuple | None]:
    """The same of all logits: one exp for each where that is safe."""
    if s.device.type == "cpu":
        top = s.amax()
        e = _exp_(torch.sub(s, top, out=free))  # (BN, BM)
        row, col = e.sum(1), e.sum(0) if need_cols else None
        smallest = row.min() if col is None else min(row.min(), col.min())
        if smallest > _SAFE_SUM:  # NaN where the top is infinite
            return (top.expand_as(row), row), None if col is None else (top.expand_as(col), col)
    return _own_top_sums(s, free, 1), _own_top_sums(s, free, 0) if need_cols else None


def _exp_(v: Tensor) -> Tensor:
    """exp, in place. Results below the smallest normal number, for which a CPU takes 10 to 35 times as long, are 0."""
    if v.device.type == "cpu":
        F.threshold_(v, math.log(torch.finfo(v.dtype).tiny), -math.inf)  # NaN stays
    return v.exp_()


def _own_top_sums(s: Tensor, free: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    top = s.amax(axis)
    shift = top.masked_fill(top.isinf(), 0.0)  # of no pair: the sum is 0; of +inf: it is +inf
    return top, _exp_(torch.sub(s, shift.unsqueeze(axis), out=free)).sum(axis)


def _own_top_sums_of_pairs(s: Tensor, line: Tensor, n: int) -> tuple[Tensor, Tensor]:
    top = s.new_full((n,), -torch.inf).scatter_reduce_(0, line, s, "amax")
    shift = top.masked_fill(top.isinf(), 0.0)
    return top, _line_sums(_exp_(torch.sub(s, shift[line])), line, n)


def sweep_softplus(p: Problem) -> Tensor:
    total = torch.zeros(len(p.x), dtype=torch.float64, device=p.x.device)
    tiles = _Tiles(p)
    for i, x in tiles.rows():
        for tile in tiles.along(i, x):
            total[i] += softplus(tile.s).sum(1)
    return total.to(p.stat_dtype)


def softplus(s: Tensor) -> Tensor:
    # PyTorch's default threshold of 20 returns s itself beyond it: an error of 2e-9, which float64 sees.
    return F.softplus(s, threshold=50.0)


# ---- one positive a row --------------------------------------------------------------------------------------------------


def partner_products(x: Tensor, y: Tensor, shift: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for i, j in _partners(len(x), y, shift):
        out[i] = (x[i].to(dtype) * y[j].to(dtype)).sum(1, dtype=torch.float64)
    return out


def products_in_tiles(x: Tensor, y: Tensor, shift: int) -> tuple[slice, Tensor] | None:
    if not x.is_cuda or x.itemsize > 2:
        return None
    # Of the shape of a tile: a GEMM of another one may sum in another order.
    bn, bm = _GPU_TILE
    start = min(shift, max(len(y) - bm, 0))
    x, y = x[:bn], y[start : start + bm]
    products = torch.empty(len(x), len(y), dtype=torch.float32, device=x.device)
    mm(x, y.T, out=products)
    in_tiles = products.diagonal(shift - start).double()
    return slice(0, len(in_tiles)), in_tiles


def finish(acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, out: Tensor) -> None:
    if other is not None:
        for i, j in _partners(len(weight), other, shift):
            acc[i].addcmul_(other[j].to(acc.dtype), weight[i, None])
    torch.mul(acc, scale, out=out)


def _partners(rows: int, y: Tensor, shift: int) -> Iterator[tuple[slice, slice]]:
    """Slices i of the rows and j of y, j = (i + shift) mod M, of 2 MiB of float32 on a CPU: y is widened a slice at a time."""
    (M, D), start = y.shape, 0
    limit = max((2**24 if y.is_cuda else 2**19) // D, 1)
    while start < rows:
        j = (start + shift) % M
        size = min(limit, rows - start, M - j)
        yield slice(start, start + size), slice(j, j + size)
        start += size


# ---- grad ----------------------------------------------------------------------------------------------------------------


def grad(
    p: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    *,
    kept: Tensor | None = None,
) -> Grads:
    tiles = _Tiles(p, kept=kept)
    c, lift = tiled.lifted(c, tiles.operand_dtype)

    total = Grads.zeros(p, c, needs)
    row_sum = None if total.row_sum is None else total.row_sum.double()  # each tile may add less than float32 rounds off
    rows = cols = about = None
    if isinstance(c, Softmax):
        rows, about = _Side.of(c.row_weight, c.row_top, c.row_offset), c.about
        cols = rows if p.triangular else _Side.of(c.col_weight, c.col_top, c.col_offset)
    for i, x in tiles.rows():
        for tile in tiles.along(i, x):
            j, diagonal = tile.j, p.triangular and tile.j.start == i.start
            if isinstance(c, Sigmoid):
                row_sum[i] += softplus(tile.s).sum(1) * c.row_weight[i]
                g = tile.s.sigmoid_().mul_(c.row_weight[i, None])  # (BN, BM)
            else:
                g = _softmax_tile(tile, rows.at(i), None if cols is None or diagonal else cols.at(j))
            if needs.scale:
                centered = tile.product if about is None else torch.sub(tile.product, about, out=tile.free)
                total.d_scale.add_(torch.mul(centered, g, out=tile.free).sum(1).sum(dtype=torch.float64))
            if diagonal:
                # Not exp(s_ij - lse_j): a GEMM may round s_ij and s_ji apart, and lse_j has seen s_ji.
                g = g + g.T
            if needs.row_bias:
                total.g_rows[i] += g.sum(1)
            if needs.col_bias:
                total.g_cols[j] += g.sum(0)
            # The gradient of a column of S = S^T is that of its row, but where the tile has both.
            of_cols = total.dy if not p.triangular else None if diagonal else total.dx
            _add_gemms_(g.to(tiles.operand_dtype), (total.dx, i, tile.y), (of_cols, j, x))
    if row_sum is not None:
        total.row_sum.copy_(row_sum)
    tiled.unlift_(total, lift)
    return total


def _add_gemms_(g: Tensor, rows: tuple[Tensor | None, slice, Tensor], cols: tuple[Tensor | None, slice, Tensor]) -> None:
    """dx[i] += G y and dy[j] += G^T x, where these are wanted: (dx, i, y) and (dy, j, x)."""
    for operand, (total, at, other) in ((g, rows), (g.T, cols)):
        if total is not None:
            addmm_(total[at], operand, other)


class _Side(NamedTuple):
    """The coefficients of the rows, or of the columns, of a block: weight exp(s - top), less offset."""

    weight: Tensor  # (K, B)
    top: Tensor  # (K, B)
    offset: Tensor | None  # (B,)

    @staticmethod
    def of(weight: Tensor | None, top: Tensor | None, offset: Tensor | None) -> _Side | None:
        if weight is None:
            return None
        # exp(s - inf) = 0: a row without pairs has no gradient, where exp(-inf - -inf) would be NaN; whatever its weight.
        empty = top == -torch.inf
        return _Side(weight.masked_fill(empty, 0.0), top.masked_fill(empty, torch.inf), offset)

    def at(self, lines: slice | Tensor) -> _Side:
        return _Side(*(None if v is None else v[..., lines] for v in self))

    def range(self, k: int) -> tuple[float, float]:
        """The smallest and the largest log-sum-exp of class k. Only a CPU may look."""
        top = self.top[k]
        return top.min().item(), top.masked_fill(top == torch.inf, -torch.inf).max().item()


def _softmax_tile(tile: _Tile, row: _Side, col: _Side | None) -> Tensor:
    """G (BN, BM) of a tile, whose logits it overwrites."""
    g = _softmax_of_classes(tile.s, tile.classes.positive, tile.free, row, col)
    if tile.classes.dropped is not None:  # 0 already, unless the log-sum-exp of its row is NaN
        _fill_(g, tile.classes.dropped, 0.0)
    return g


def _softmax_of_classes(s: Tensor, positive: _Pairs | None, free: Tensor, row: _Side, col: _Side | None) -> Tensor:
    if positive is None:
        return _weighted_exp(s, free, row, col, 0)
    if isinstance(positive, tuple):
        of_positives, (i, j) = s[positive], positive  # (P,)
        g = _weighted_exp(s, free, row, col, 0)
        g[positive] = _of_pairs(of_positives, row.at(i)) + (0.0 if col is None else _of_pairs(of_positives, col.at(j)))
        return g
    g = _weighted_exp(s.clone(), free, row, col, 1)
    if row.offset is not None:
        g.sub_(row.offset[:, None])
    if col is not None and col.offset is not None:
        g.sub_(col.offset)
    return torch.where(positive, g, _weighted_exp(s, free, row, col, 0))


def _of_pairs(s: Tensor, side: _Side) -> Tensor:
    """weight exp(s - top) - offset of positives s (P,), (P,)"""
    g = _exp_(torch.sub(s, side.top[1])).mul_(side.weight[1])
    return g if side.offset is None else g.sub_(side.offset)


def _weighted_exp(s: Tensor, free: Tensor, row: _Side, col: _Side | None, k: int) -> Tensor:
    """row.weight_i exp(s_ij - row.top_i) + col.weight_j exp(s_ij - col.top_j) of class k, (BN, BM), in place of s."""
    top, weight = row.top[k], row.weight[k]  # (BN,)
    if col is None:
        return _exp_(s.sub_(top[:, None])).mul_(weight[:, None])
    col_top, col_weight = col.top[k], col.weight[k]  # (BM,)
    if s.device.type == "cpu" and (low := _common_shift(row.range(k), col.range(k))) is not None:
        a = weight * torch.exp(low - top.double()).to(s.dtype)
        b = col_weight * torch.exp(low - col_top.double()).to(s.dtype)
        return _exp_(s.sub_(low)).mul_(torch.add(a[:, None], b, out=free))
    _exp_(torch.sub(s, top[:, None], out=free)).mul_(weight[:, None])
    return _exp_(s.sub_(col_top)).mul_(col_weight).add_(free)


def _common_shift(row: tuple[float, float], col: tuple[float, float]) -> float | None:
    """The smallest top of a tile if all lie within _SPREAD of it: every logit of weight is as near."""
    low, high = min(row[0], col[0]), max(row[1], col[1])
    return low if math.isfinite(low) and high - low < _SPREAD else None
