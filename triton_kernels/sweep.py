"""sweep_kernel walks the tiles of S and leaves the statistics of each; fold_kernel merges those of all tiles.

The statistic of a line (a row or a column) is a pair (top, total): its log-sum-exp is top + log(total). Logits of 1e4 keep
their digits that way, which a log-sum-exp in float32 would round away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import Tile
from .programs import Program
from .tile import Block, cdiv, exp, grid, load_vectors, logits, on, operands, options, product, tile_of

# One top serves all lines of a tile where no total is below this. Of 16-bit embeddings: terms exp(s - top) below 2^-126 are
# lost, at most 2^9 of them in a line, less than 2^-117 together; a total above 2^-90 has thus lost less than 2^-27 of itself,
# an eighth of the float32 rounding unit. Of float32 ones (e^-16): s - top is rounded by half a unit in the last place of the
# spread, which below 16 is 5e-7 of a term; logits of 16-bit embeddings come with larger errors.
SMALLEST_TOTAL = {2: 2.0**-90, 4: 2.0**-23}  # by bytes of an element


class Lines(NamedTuple):
    """Where the statistics of the n rows (or columns) of a block go, for every tile that a row passes through.

    n is rounded up to whole tiles: what lies past the edge is stored, and looked at by nobody.
    """

    sums: Any  # (K, 2, tiles, n) float32: top and total of every class
    center: Any = None  # (n,) float32, or None: 0
    deviation: Any = None  # (tiles, n) float32, or None: sum of s - center over the positives


# ---- log-sum-exps of a tile ----------------------------------------------------------------------------------------------


@triton.jit
def or_zero(top):
    """A shift that is always finite: exp(-inf - 0) = 0 and exp(inf - 0) = inf is what the totals should have."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def own_sums(s, AXIS: tl.constexpr):
    """top and total along AXIS, every line with its own top: right for any input."""
    top = tl.max(s, AXIS)
    return top, tl.sum(exp(s - tl.expand_dims(or_zero(top), AXIS)), AXIS)


@triton.jit
def store_sums(at, plane, mask, top, total):
    tl.store(at, top, mask=mask)
    tl.store(at + plane, total, mask=mask)


@triton.jit
def store_own_sums(at, plane, mask, s, AXIS: tl.constexpr):
    top, total = own_sums(s, AXIS)
    store_sums(at, plane, mask, top, total)


@triton.jit
def smallest(row_total, col_total, COLS: tl.constexpr):
    least = tl.min(row_total)
    if COLS:
        least = tl.minimum(least, tl.min(col_total))
    return least


@triton.jit
def sums_of_one_class(s, row_at, row_plane, col_at, col_plane, col_mask, whole, COLS: tl.constexpr, SMALLEST: tl.constexpr):
    """Statistics of the rows and columns of s (BN, BM): from one exp per logit where the top of the tile serves them all.

    It does where no total is below SMALLEST. A tile that is not whole has totals of 0 past the edge.
    """
    top = tl.max(s)
    e = exp(s - or_zero(top))
    row_total, col_total = tl.sum(e, 1), tl.sum(e, 0)
    if whole & (top < float("inf")) & (smallest(row_total, col_total, COLS) > SMALLEST):
        store_sums(row_at, row_plane, None, top, row_total)
        if COLS:
            store_sums(col_at, col_plane, col_mask, top, col_total)
    else:
        store_own_sums(row_at, row_plane, None, s, 1)
        if COLS:
            store_own_sums(col_at, col_plane, col_mask, s, 0)


@triton.jit
def top_of_some(top, total):
    """Lines without pairs have no top."""
    return tl.where(total == 0.0, float("-inf"), top)


@triton.jit
def sums_of_two_classes(
    s, positive, row_at, row_plane, col_at, col_plane, col_mask, whole, COLS: tl.constexpr, SMALLEST: tl.constexpr
):
    """The same of the negatives and of the positives, with one top for both."""
    top = tl.max(s)
    e = exp(s - or_zero(top))
    e0, e1 = tl.where(positive, 0.0, e), tl.where(positive, e, 0.0)
    # Most lines of a tile have no positive: a total of 0 tells nothing there, the smallest of the terms does.
    least1 = tl.min(tl.where(positive, e, 1.0))
    row_total, row_total1, col_total, col_total1 = tl.sum(e0, 1), tl.sum(e1, 1), tl.sum(e0, 0), tl.sum(e1, 0)
    least = tl.minimum(smallest(row_total, col_total, COLS), least1)
    if whole & (top < float("inf")) & (least > SMALLEST):
        store_sums(row_at, row_plane, None, top, row_total)
        store_sums(row_at + 2 * row_plane, row_plane, None, top_of_some(top, row_total1), row_total1)
        if COLS:
            store_sums(col_at, col_plane, col_mask, top, col_total)
            store_sums(col_at + 2 * col_plane, col_plane, col_mask, top_of_some(top, col_total1), col_total1)
    else:
        s0, s1 = tl.where(positive, float("-inf"), s), tl.where(positive, s, float("-inf"))
        store_own_sums(row_at, row_plane, None, s0, 1)
        store_own_sums(row_at + 2 * row_plane, row_plane, None, s1, 1)
        if COLS:
            store_own_sums(col_at, col_plane, col_mask, s0, 0)
            store_own_sums(col_at + 2 * col_plane, col_plane, col_mask, s1, 0)


@triton.jit
def store_deviation(at, mask, s, positive, center, i, AXIS: tl.constexpr):
    """The sum of s - center over the positives of each line i."""
    counts = positive & (s != float("-inf"))  # past the edges anything may be a positive
    if center is not None:
        s -= tl.expand_dims(tl.load(center + i), AXIS)
    tl.store(at, tl.sum(tl.where(counts, s, 0.0), AXIS), mask=mask)


# ---- softplus ------------------------------------------------------------------------------------------------------------


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1, relative error below 2e-7: minimax polynomial of log1p(e) / e, no cancellation at small e."""
    p = 0.005232688 * e - 0.029505214
    p = p * e + 0.078225911
    p = p * e - 0.136632428
    p = p * e + 0.191060051
    p = p * e - 0.248429820
    p = p * e + 0.333190978
    p = p * e - 0.499994934
    p = p * e + 0.999999940
    return p * e


@triton.jit
def softplus(s):
    """log(1 + exp(s)) = max(s, 0) + log1p(exp(-|s|))"""
    return tl.maximum(s, 0.0) + log1p(exp(-tl.abs(s)))


# ---- kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def sweep_kernel(
    x, y,  # (N, D), (M, D): pointers or tensor descriptors
    block,  # Block
    row, col,  # Lines; col is None without COLS, and row itself where TRIANGULAR
    softplus_sums,  # None, or (tiles_m, N rounded up to whole tiles) float32: sums of softplus(s), and nothing else is done
    DROP: tl.constexpr, POSITIVE: tl.constexpr, COLS: tl.constexpr, TRIANGULAR: tl.constexpr, SMALLEST: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N, M = block.N, block.M
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile_n, tile_m = tile_of(tl.program_id(0), tiles_n, tiles_m, GROUP, TRIANGULAR)
    acc = product(x, y, tile_n * BN, tile_m * BM, block, BN, BM, BK, TMA, PRECISION)
    n, m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    rows, cols = load_vectors(block.rows, n), load_vectors(block.cols, m)
    whole = ((tile_n + 1) * BN <= N) & ((tile_m + 1) * BM <= M)
    s = logits(acc, n, m, rows, cols, whole, block, DROP)  # (BN, BM)

    # Line i of a triangular block meets tile t as a row where t is on its right, as a column (of the tile above) where t
    # is on its left: every place (t, i) of the array that rows and columns share is written once, the diagonal by its rows.
    row_at = (tile_m.to(tl.int64) * tiles_n + tile_n) * BN + tl.arange(0, BN)
    col_at = (tile_n.to(tl.int64) * tiles_m + tile_m) * BM + tl.arange(0, BM)
    col_mask = (tile_n != tile_m) if TRIANGULAR else None

    if softplus_sums is not None:
        tl.store(softplus_sums + row_at, tl.sum(softplus(s), 1))
    else:
        row_sums, row_plane, col_plane = row.sums + row_at, tiles_n * tiles_m * BN, tiles_n * tiles_m * BM
        col_sums = row_sums  # not looked at without columns
        if COLS:
            col_sums = col.sums + col_at
        if POSITIVE is None:
            sums_of_one_class(s, row_sums, row_plane, col_sums, col_plane, col_mask, whole, COLS, SMALLEST)
        else:
            positive = POSITIVE(rows, cols)
            if row.deviation is not None:
                store_deviation(row.deviation + row_at, None, s, positive, row.center, n, 1)
                if COLS:
                    store_deviation(col.deviation + col_at, col_mask, s, positive, col.center, m, 0)
            sums_of_two_classes(s, positive, row_sums, row_plane, col_sums, col_plane, col_mask, whole, COLS, SMALLEST)


@triton.jit
def log_sum_exp(top, total):
    """top + log(total) as a rounded number and what the rounding has lost: the exact error of a sum (Knuth, 4.2.2, theorem B)."""
    log_total = tl.log(total)
    lse = top + log_total
    added = lse - top
    lost = (top - (lse - added)) + (log_total - added)
    lost = tl.where(tl.abs(lse) < float("inf"), lost, 0.0)
    return tl.where(total == total, lse, total), lost  # max ignores NaN on a GPU, a sum does not


@triton.jit
def fold_kernel(
    sums,  # (K, 2, T, stride) float32: of T tiles
    out,  # (K, 2, n) float32, planes out_plane apart: of the tiles so far, top and total; after the LAST the log-sum-exp
    T, n, stride, out_plane,
    FIRST: tl.constexpr, LAST: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge top and total of T tiles into out, in one pass and in a fixed order."""
    i = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.program_id(1).to(tl.int64)
    out += 2 * k * out_plane + i
    sums += 2 * k * T * stride + i[None, :]
    # total is float64: each tile may add less than float32 rounds off.
    if FIRST:
        top, total = tl.full((BC,), float("-inf"), tl.float32), tl.zeros((BC,), tl.float64)
    else:
        top = tl.load(out, mask=i < n, other=float("-inf"))  # (BC,)
        total = tl.load(out + out_plane, mask=i < n, other=0.0).to(tl.float64)
    for t in range(0, T, BT):
        j = t + tl.arange(0, BT)
        mask = (j < T)[:, None] & (i < n)[None, :]
        at = sums + j.to(tl.int64)[:, None] * stride
        tops = tl.load(at, mask=mask, other=float("-inf"))  # (BT, BC)
        totals = tl.load(at + T * stride, mask=mask, other=0.0)
        highest = tl.maximum(top, tl.max(tops, 0))
        shift = or_zero(highest)
        total = total * exp(top - shift) + tl.sum((totals * exp(tops - shift[None, :])).to(tl.float64), 0)
        top = highest
    total = total.to(tl.float32)
    if LAST:
        top, total = log_sum_exp(top, total)
    tl.store(out, top, mask=i < n)
    tl.store(out + out_plane, total, mask=i < n)


# ---- on the host ---------------------------------------------------------------------------------------------------------


def sweep(
    x: Tensor,  # (N, D)
    y: Tensor,  # (M, D)
    block: Block,
    row: Lines | None,
    col: Lines | None,
    softplus_sums: Tensor | None,
    program: Program,
    triangular: bool,
    tile: Tile,
) -> None:
    """The statistics of every tile of a block; a triangular one has square tiles and one place for rows and columns."""
    a, b, tma = operands(x, y, tile)
    with on(x.device):
        sweep_kernel[grid(block, tile, triangular)](
            a, b, block, row, col, softplus_sums,
            DROP=program.drop, POSITIVE=program.positive, COLS=col is not None, TRIANGULAR=triangular,
            SMALLEST=SMALLEST_TOTAL[x.itemsize], **options(tile, tma),
        )  # fmt: skip


def fold(sums: Tensor, out: Tensor, *, first: bool, last: bool) -> None:
    """Merge the statistics (K, 2, T, n rounded up) of T tiles into out (K, 2, n), whose last dimension is a slice.

    What out holds before the first call does not matter; after the last it is the log-sum-exp, rounded, and what that lost.
    """
    K, _, T, stride = sums.shape
    n = out.shape[2]
    with on(out.device):
        fold_kernel[cdiv(n, 64), K](
            sums, out, T, n, stride, out.stride(1), FIRST=first, LAST=last, BT=32, BC=64
        )  # fmt: skip
