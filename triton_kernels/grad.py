"""grad_kernel walks the tiles of S again and turns every logit into its G: dx = G y and dy = G^T x are then plain GEMMs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import Tile
from .programs import Program
from .sweep import log1p
from .tile import Block, exp, grid, held, load_vectors, logits, on, operands, options, product, tile_of

# Where the log-sum-exps of a tile lie within SPREAD of each other, e = exp(s - lowest) serves its rows and its columns.
# Overflow would allow 80; but s - lowest is rounded by up to half a unit in the last place of the spread, which at 8 is 5e-7
# of the result: as much as float32 bears. (16 bits would bear more, and more tiles with one exp: to be measured.)
SPREAD = tl.constexpr(8.0)


class Side(NamedTuple):
    """The coefficients of G along the rows or along the columns, rounded up to whole tiles.

    Lines past the edge have weight 0 and lse +inf: G = 0. Of a line without pairs lse is -inf, and G is 0 whatever its weight.
    """

    weight: Any  # (K, n) float32
    lse: Any  # (K, n) float32; None with sigmoid coefficients
    stride: int  # from one class to the next
    offset: Any  # (n,) float32, or None
    precise: Any  # 1 if embeddings are float32; None if they have 16 bits, which hide the last bits of a quotient


class Sums(NamedTuple):
    """Where the row and column sums of each tile go, or None. N and M are rounded up to whole tiles."""

    g_rows: Any  # (tiles_m, N) float32: of G
    g_cols: Any  # (tiles_n, M) float32
    softplus: Any  # (tiles_m, N) float32: of weight * softplus(s)
    scaled: Any  # (tiles,) float32: of G_ij (<x_i, y_j> - about), over a whole tile
    about: Any  # (1,) float32, or None: 0


@triton.jit
def load_side(side, k, i):
    """weight and lse of class k; 0 and +inf of lines without pairs"""
    at = k * side.stride + i
    weight, lse = tl.load(side.weight + at), tl.load(side.lse + at)
    empty = lse == float("-inf")
    return tl.where(empty, 0.0, weight), tl.where(empty, float("inf"), lse)


@triton.jit
def weighted_exp(s, positive, side, i, AXIS: tl.constexpr):
    """weight[k] exp(s - lse[k]), k the class of the pair, by the rows (AXIS 1) or by the columns (AXIS 0)."""
    weight, lse = load_side(side, 0, i)
    if positive is not None:
        weight1, lse1 = load_side(side, 1, i)
    weight, lse = tl.expand_dims(held(weight), AXIS), tl.expand_dims(held(lse), AXIS)
    if positive is not None:
        weight = tl.where(positive, tl.expand_dims(held(weight1), AXIS), weight)
        lse = tl.where(positive, tl.expand_dims(held(lse1), AXIS), lse)
    return weight * exp(s - lse)  # (BN, BM)


@triton.jit
def extremes(side, i, K: tl.constexpr):
    """The lowest and the highest log-sum-exp of each line i; the highest is +inf where a coefficient is NaN."""
    low, high = float("inf"), float("-inf")
    for k in tl.static_range(K):
        weight, lse = load_side(side, k, i)
        nan = (weight != weight) | (lse != lse)
        low = tl.minimum(low, lse)
        high = tl.maximum(high, tl.where(nan, float("inf"), tl.where(lse < float("inf"), lse, float("-inf"))))
    return low, high


@triton.jit
def range_of_sides(row, col, n, m, K: tl.constexpr, COLS: tl.constexpr):
    """The lowest log-sum-exp of the rows n and the columns m, and the highest; that is +inf where a coefficient is NaN."""
    low, high = extremes(row, n, K)
    if COLS:
        col_low, col_high = extremes(col, m, K)
        if n.shape[0] == m.shape[0]:  # a reduction over all warps takes as long as two passes over the tile
            low, high = tl.min(tl.minimum(low, col_low)), tl.max(tl.maximum(high, col_high))
        else:
            low, high = tl.minimum(tl.min(low), tl.min(col_low)), tl.maximum(tl.max(high), tl.max(col_high))
    else:
        low, high = tl.min(low), tl.max(high)
    return low, high


@triton.jit
def shared_weight(low, row, col, k, n, m):
    """a_i + b_j of class k, (BN, BM)"""
    row_weight, row_lse = load_side(row, k, n)
    col_weight, col_lse = load_side(col, k, m)
    a = row_weight * exp(low - row_lse)
    b = col_weight * exp(low - col_lse)
    return a[:, None] + held(b)[None, :]


@triton.jit
def two_sided_g(s, low, high, positive, row, col, n, m):
    """G_ij = row_weight[k, i] exp(s_ij - row_lse[k, i]) + col_weight[k, j] exp(s_ij - col_lse[k, j])

    = exp(s_ij - low) (a_i + b_j), one exp per logit, where the log-sum-exps of the tile are close enough for one low.
    """
    if high - low < SPREAD:
        low = tl.where(low < float("inf"), low, 0.0)  # of lines without pairs: any low will do
        weight = shared_weight(low, row, col, 0, n, m)
        if positive is not None:
            weight = tl.where(positive, shared_weight(low, row, col, 1, n, m), weight)
        g = exp(s - low) * weight
    else:
        g = weighted_exp(s, positive, row, n, 1) + weighted_exp(s, positive, col, m, 0)
    return g


@triton.jit
def less_offset(g, positive, side, i, AXIS: tl.constexpr):
    """The G of the positives, less the offset of their row (AXIS 1) or of their column (AXIS 0)."""
    offset = held(tl.load(side.offset + i))
    return tl.where(positive, g - tl.expand_dims(offset, AXIS), g)


@triton.jit
def softmax_g(s, low, high, positive, row, col, n, m, COLS: tl.constexpr):
    if COLS:
        g = two_sided_g(s, low, high, positive, row, col, n, m)
    else:
        g = weighted_exp(s, positive, row, n, 1)
    if row.offset is not None:
        g = less_offset(g, positive, row, n, 1)
        if COLS:
            g = less_offset(g, positive, col, m, 0)
    return g  # (BN, BM)


@triton.jit
def symmetric_g(s, low, high, positive, row, n, m, diagonal):
    """(G + G^T)_ij of a problem whose columns are its rows."""
    if diagonal:
        # s_ij and s_ji may be rounded apart, and the log-sum-exp of line j has seen s_ji.
        g = softmax_g(s, low, high, positive, row, row, n, m, False)
        g += g.T
    else:
        g = softmax_g(s, low, high, positive, row, row, n, m, True)
    return g


@triton.jit
def sigmoid_of(e, precise):
    """e / (1 + e). A GPU's quotient may be off by two units in the last place, alike for logits that are: precise takes that off.

    1 / (1 + e) is 1 less the quotient. (tl.div_rn takes so many registers that the tile spills.)
    """
    q = e / (1.0 + e)
    if precise is not None:
        q = tl.fma(tl.fma(-q, 1.0 + e, e), 1.0 - q, q)
    return q


@triton.jit
def store_tile(p, stride, t, i, j):
    """p[i, j] = t"""
    tl.store(p + i.to(tl.int64)[:, None] * stride + j[None, :], t)


@triton.jit
def grad_kernel(
    x, y,  # (N, D), (M, D): pointers or tensor descriptors
    block, row, col,  # Block, Side, Side; col is looked at with COLS only, and not where TRIANGULAR
    g_block, g_stride,  # G goes to g_block (N, M rounded up to whole tiles), rows g_stride apart; or None
    sums,  # Sums
    DROP: tl.constexpr, POSITIVE: tl.constexpr, SIGMOID: tl.constexpr, COLS: tl.constexpr, TRIANGULAR: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N, M = block.N, block.M
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile_n, tile_m = tile_of(tl.program_id(0), tiles_n, tiles_m, GROUP, TRIANGULAR)
    acc = product(x, y, tile_n * BN, tile_m * BM, block, BN, BM, BK, TMA, PRECISION)
    n, m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    rows, cols = load_vectors(block.rows, n), load_vectors(block.cols, m)
    whole = ((tile_n + 1) * BN <= N) & ((tile_m + 1) * BM <= M)
    if not SIGMOID:  # before the logits, which take registers
        K: tl.constexpr = 1 if POSITIVE is None else 2
        low, high = range_of_sides(row, row if TRIANGULAR else col, n, m, K, TRIANGULAR or COLS)
    s = logits(acc, n, m, rows, cols, whole, block, DROP)  # (BN, BM)

    row_at = (tile_m.to(tl.int64) * tiles_n + tile_n) * BN + tl.arange(0, BN)
    col_at = (tile_n.to(tl.int64) * tiles_m + tile_m) * BM + tl.arange(0, BM)
    if SIGMOID:
        w = tl.load(row.weight + n)
        e = exp(-tl.abs(s))
        tl.store(sums.softplus + row_at, w * tl.sum(tl.maximum(s, 0.0) + log1p(e), 1))
        e = sigmoid_of(e, row.precise)  # sigmoid(-|s|)
        g = w[:, None] * tl.where(s >= 0, 1.0 - e, e)
    else:
        positive = POSITIVE(rows, cols) if POSITIVE is not None else None
        if TRIANGULAR:
            g = symmetric_g(s, low, high, positive, row, n, m, tile_n == tile_m)
        else:
            g = softmax_g(s, low, high, positive, row, col, n, m, COLS)
        if high == float("inf"):  # exp(-inf) is 0, but 0 times the NaN of a line is not
            g = DROP(g, load_vectors(block.rows, n), load_vectors(block.cols, m), 0.0)  # again: not to keep them until here

    if row.offset is not None:
        if not whole:  # past the edges G is 0, but for the offsets of what may look like positives there
            g = tl.where((n < N)[:, None] & (m < M)[None, :], g, 0.0)
    if sums.g_rows is not None:
        tl.store(sums.g_rows + row_at, tl.sum(g, 1))
    if sums.g_cols is not None:
        tl.store(sums.g_cols + col_at, tl.sum(g, 0))
    if sums.scaled is not None:
        if sums.about is not None:
            acc -= tl.load(sums.about)
        scaled = tl.sum(g * acc)
        if TRIANGULAR:
            scaled *= tl.where(tile_n == tile_m, 0.5, 1.0)  # there G + G^T meets every pair twice
        tl.store(sums.scaled + tl.program_id(0), scaled)

    if g_block is not None:
        g = g.to(g_block.dtype.element_ty)
        store_tile(g_block, g_stride, g, n, m)
        if TRIANGULAR:
            if tile_n != tile_m:
                store_tile(g_block, g_stride, g.T, m, n)


# ---- on the host ---------------------------------------------------------------------------------------------------------


def grad(
    x: Tensor,  # (N, D)
    y: Tensor,  # (M, D)
    block: Block,
    row: Side,
    col: Side | None,
    g: Tensor | None,  # (N, M rounded up to whole tiles): what lies past the edges is undefined
    sums: Sums,
    program: Program,
    triangular: bool,
    tile: Tile,
) -> None:
    """G of a block, and the sums of every tile of it. Of a triangular block S = S^T all of G is written, half is computed."""
    a, b, tma = operands(x, y, tile)
    with on(x.device):
        grad_kernel[grid(block, tile, triangular)](
            a, b, block, row, col, g, 0 if g is None else g.stride(0), sums,
            DROP=program.drop, POSITIVE=program.positive, SIGMOID=row.lse is None, COLS=col is not None, TRIANGULAR=triangular,
            **options(tile, tma),
        )  # fmt: skip
