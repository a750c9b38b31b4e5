"""What backends share, those with kernels most of it: how S is cut into blocks, how vectors are laid out for whole tiles, and
what becomes of the numbers that the kernels leave for every tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flashcl.backends.gemm import addmm_
from flashcl.engine.problem import Grads, LogSumExp, Needs, Problem, Sigmoid, Softmax, Statistics

# Bound on the largest temporary of a call: the block of G in the backward, the statistics of the tiles in the forward.
# 16k x 16k elements of 16 bits: blocks so large that adding them up in dx and dy costs nothing beside the GEMMs.
WORKSPACE = 512 * 2**20


def bytes_of_sums(p: Problem, rows: int, cols: int) -> float:
    """Of the statistics that a sweep leaves of all tiles of rows x cols, per logit: a top and a total of every class and
    perhaps a deviation, for each row and each column of a tile."""
    return 4 * (2 * p.classes + (p.center is not None)) * (1 / rows + 1 / cols)


# ---- blocks --------------------------------------------------------------------------------------------------------------


def blocks(p: Problem, cells: float, tile: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the blocks of S, at most `cells` logits each; of S = S^T those on and above the diagonal.

    They are as square as the matrix allows: a block of R rows and C columns adds to R rows of dx and to C rows of dy, so
    that accumulation costs 1 / R + 1 / C per logit.
    """
    N, M = len(p.x), len(p.y)
    edge = math.isqrt(int(cells))
    # In whole tiles: so what a block leaves is laid out, and few rows take as much as those of a tile.
    tallest, widest = (max(edge, int(cells) // max(whole(n, tile), tile)) for n in (M, N))
    rows = pieces(slice(0, N), tallest, tile)
    for i in rows:
        for j in rows if p.triangular else pieces(slice(0, M), widest, tile):
            if not p.triangular or j.start >= i.start:
                yield i, j


def pieces(lines: slice, limit: int, tile: int) -> list[slice]:
    """`lines` in pieces of about equal length, at most `limit` but at least a tile, of whole tiles."""
    size = lines.stop - lines.start
    limit = max(limit // tile, 1) * tile
    count = max(-(-size // limit), 1)
    length = max(whole(-(-size // count), tile), tile)
    return [slice(at, min(at + length, lines.stop)) for at in range(lines.start, lines.stop, length)]


# ---- layout --------------------------------------------------------------------------------------------------------------


def whole(size: int, tile: int) -> int:
    """size rounded up to whole tiles"""
    return -(-size // tile) * tile


def pad(v: Tensor, tile: int, value: float | None = None) -> Tensor:
    """v (..., n), contiguous, with n rounded up to whole tiles: loads need no mask then.

    What is added is `value`, or the last element again: ids beyond it could make a tile look for equal ones.
    """
    missing = -v.shape[-1] % tile
    if missing == 0:
        return v.contiguous()
    last = v[..., -1:] if value is None else v.new_full((), value)
    return torch.cat([v, last.expand(*v.shape[:-1], missing)], dim=-1)


def aligned(x: Tensor, multiple: int) -> Tensor:
    """x (N, D), or a copy with zeros up to the next multiple of columns: contiguous rows that begin at multiples of 16 bytes.

    A copy costs O(N D), loads of single elements cost a factor in everything that is O(N M D). It is also made where the
    256 rows of the largest tile would be out of reach of an int32.
    """
    (N, D), (row, element) = x.shape, x.stride()
    as_wanted = element == 1 and row >= D and D % multiple == 0 and row % multiple == 0 and x.data_ptr() % 16 == 0
    if as_wanted and 256 * row < 2**31:
        return x
    padded = x.new_zeros(N, -(-D // multiple) * multiple)
    padded[:, :D] = x
    return padded


# ---- one positive a row --------------------------------------------------------------------------------------------------

# Rows whose products are looked at in tiles: 64 tiles of 128 x 128, one for about half of the multiprocessors.
_COMPARED = 1024


def compared(x: Tensor, y: Tensor, shift: int) -> tuple[slice, Tensor, Tensor]:
    """Rows of x that have a partner in y, shift to the right; their embeddings and those of the partners, (n, D) each."""
    n = min(len(x), len(y) - shift)  # the other partners are on the left
    rows = slice(0, n, max(-(-n // _COMPARED), 1))
    return rows, x[rows], y[shift:][rows]


# ---- sweep ---------------------------------------------------------------------------------------------------------------


class _Totals(NamedTuple):
    """Statistics of all lines (rows or columns), to which those of blocks are added."""

    lse: LogSumExp
    deviation: Tensor | None  # (n,) float64

    @staticmethod
    def of(p: Problem, n: int, center: Tensor | None) -> _Totals:
        device, deviation = p.x.device, None
        if center is not None:
            deviation = torch.empty(n, dtype=torch.float64, device=device)
        if len(p.x) and len(p.y):
            return _Totals(LogSumExp(torch.empty(p.classes, 2, n, dtype=p.stat_dtype, device=device)), deviation)
        # There will be no block.
        return _Totals(LogSumExp.of_no_pair(p, n), None if deviation is None else deviation.zero_())

    def add(self, fold: Callable, lines: NamedTuple, at: slice, *, first: bool, last: bool) -> None:
        fold(lines.sums, self.lse.parts[:, :, at], first=first, last=last)
        add_lines_(self.deviation, at, lines.deviation, first=first)


def sweep(p: Problem, need_cols: bool, cells: float, tile: int, launch: Callable, fold: Callable) -> Statistics:
    """Statistics of all blocks of at most `cells` logits, whose edges are multiples of `tile`.

    launch(i, j, diagonal, need_cols) sweeps a block and returns what that left of every tile, along the rows i and along the
    columns j (None where not needed): `sums` (K, 2, tiles, n) and `deviation` (tiles, n), n rounded up to whole tiles.
    fold(sums, out, first=, last=) adds them to `out` (K, 2, n): the first block begins it, the last makes it a LogSumExp.
    """
    row = _Totals.of(p, len(p.x), p.center)
    col = row if p.triangular else _Totals.of(p, len(p.y), p.col_center) if need_cols else None
    for i, j in blocks(p, cells, tile):
        diagonal = p.triangular and i == j
        rows, cols = launch(i, j, diagonal, col is not None and not diagonal)
        # A line of a triangular problem is a column to the blocks above the diagonal first, then a row.
        row.add(fold, rows, i, first=j.start == 0, last=j.stop == len(p.y))
        if cols is not None:
            col.add(fold, cols, j, first=i.start == 0, last=i.stop == len(p.x) and not p.triangular)
        del rows, cols  # else those of two blocks are alive while the next is launched
    if p.triangular or col is None:
        return Statistics(row.lse, None, row.deviation)
    return Statistics(row.lse, col.lse, row.deviation, col.deviation)


# ---- grad ----------------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """The coefficients of G along the rows, or along the columns; n is rounded up to whole tiles."""

    weight: Tensor  # (K, n); (n,) with Sigmoid coefficients
    top: Tensor | None = None  # (K, n); None with Sigmoid coefficients
    offset: Tensor | None = None  # (n,)

    def at(self, lines: slice) -> Side:
        """Of the lines from lines.start on. Only the last dimension is cut: a class is as far from the next one as before."""
        return self if lines.start == 0 else Side(*(None if v is None else v[..., lines.start :] for v in self))


def sides(p: Problem, c: Softmax | Sigmoid, tile: int) -> tuple[Side, Side | None]:
    """Of all rows and of all columns; a triangular problem has one for both."""
    if isinstance(c, Sigmoid):
        return Side(pad(c.row_weight, tile, 0.0)), None
    row = _side(c.row_weight, c.row_top, c.row_offset, tile)
    if p.triangular:
        return row, row
    return row, None if c.col_weight is None else _side(c.col_weight, c.col_top, c.col_offset, tile)


def _side(weight: Tensor, top: Tensor, offset: Tensor | None, tile: int) -> Side:
    return Side(pad(weight, tile, 0.0), pad(top, tile, torch.inf), None if offset is None else pad(offset, tile, 0.0))


Coefficients = TypeVar("Coefficients", Softmax, Sigmoid)


def lifted(c: Coefficients, dtype: torch.dtype) -> tuple[Coefficients, Tensor | None]:
    """Coefficients whose largest possible |G| is 2^14, if G will be float16: that ends at 2^16 and begins at 2^-24.

    And the power of two that they have been multiplied by, (). Computed on the device: the host must not wait for it.
    """
    if dtype != torch.float16:
        return c, None
    names = "row_weight", "col_weight", "row_offset", "col_offset"
    vectors = {name: v for name in names if (v := getattr(c, name, None)) is not None}
    # |G| is at most the sum of these. A NaN among the weights must not spoil the other rows.
    largest = sum(v.nan_to_num(0.0, 0.0, 0.0).abs().amax() for v in vectors.values())
    lift = torch.exp2((14 - torch.log2(largest).ceil()).clamp(-100, 100))  # before clamp inf, where all weights are 0
    return replace(c, **{name: v * lift for name, v in vectors.items()}), lift


def unlift_(total: Grads, lift: Tensor | None) -> None:
    """What lifted coefficients gave, back to what was asked for."""
    if lift is None:
        return
    for d in (total.dx, total.dy, total.g_rows, total.g_cols, total.d_scale, total.row_sum):
        if d is not None:
            d /= lift


class TileSums(NamedTuple):
    """What a kernel leaves of every tile of a block, n and m rounded up to whole tiles; None where not wanted."""

    g_rows: Tensor | None  # (tiles_m, n): of G
    g_cols: Tensor | None  # (tiles_n, m)
    softplus: Tensor | None  # (tiles_m, n): of weight softplus(s)
    scaled: Tensor | None  # of any shape: of G_ij (<x_i, y_j> - about)


def grad(
    p: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    tile: int,
    walk: Iterable[tuple[slice, slice]],
    shape: Callable,
    launch: Callable,
) -> Grads:
    """Gradients from all blocks (i, j) of S, in the order of `walk`: each leaves its G, which goes through GEMMs with x and y.

    shape(i, j): of the G of a block, in whole tiles. tile: a multiple of their edges.
    launch(i, j, row, col, g) writes it to g (None where not wanted), from the coefficients of its rows and of its columns, and
    returns TileSums. A block on the diagonal of S = S^T begins with as many columns as it has rows, and these hold G + G^T
    already: only from there on it counts for its columns, too.
    """
    walk = list(walk)
    c, lift = lifted(c, p.x.dtype)
    row, col = sides(p, c, tile)
    total, scaled = Grads.empty(p, c, needs._replace(scale=False)), []
    buffer = None  # of G
    if total.dx is not None or total.dy is not None:
        largest = max((math.prod(shape(i, j)) for i, j in walk), default=0)
        buffer = torch.empty(largest, dtype=p.x.dtype, device=p.x.device)
    for i, j in walk:
        size = shape(i, j)
        g = None if buffer is None else buffer[: math.prod(size)].view(size)
        sums = launch(i, j, row.at(i), None if col is None else col.at(j), g)
        add_lines_(total.g_rows, i, sums.g_rows, first=j.start == 0)
        add_lines_(total.g_cols, j, sums.g_cols, first=i.start == 0)
        add_lines_(total.row_sum, i, sums.softplus, first=j.start == 0)
        if needs.scale:
            scaled.append(sums.scaled.flatten())
        if g is not None:
            _add_products_(total, p, i, j, g[: i.stop - i.start, : j.stop - j.start])
    if needs.scale:  # added up once, at the end
        scaled = scaled[0] if len(scaled) == 1 else torch.cat([p.logit_scale[:0], *scaled])
        total = replace(total, d_scale=scaled.sum(dtype=torch.float64))
    unlift_(total, lift)
    return total


def _add_products_(total: Grads, p: Problem, i: slice, j: slice, g: Tensor) -> None:
    """dx += G y and dy += G^T x of the block (i, j). The first block of each line is written, where there is nothing yet."""
    x, y = p.x[i], p.y[j]
    if total.dx is not None:
        addmm_(total.dx[i], g, y, first=j.start == 0)
    if total.dy is not None:
        addmm_(total.dy[j], g.T, x, first=i.start == 0)
    own = len(x) if i.start == j.start else 0
    if p.triangular and own < len(y):
        addmm_(total.dx[j.start + own : j.stop], g[:, own:].T, x, first=i.start == 0)


def add_lines_(total: Tensor | None, at: slice, sums: Tensor | None, *, first: bool) -> None:
    """total[at] += what all tiles left of these lines, (tiles, n rounded up); first: nothing is there yet."""
    if total is None:
        return
    sums = sums[:, : at.stop - at.start]
    if first:
        torch.sum(sums, 0, out=total[at])
    else:
        total[at].add_(sums.sum(0, dtype=total.dtype))
