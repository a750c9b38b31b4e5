"""One tile of the logit matrix: which tile, its product, its logits. Both kernels begin with these."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile


class Block(NamedTuple):
    """A block of logits, without x and y themselves (Triton takes tensor descriptors as plain arguments only).

    Vectors are contiguous and go on to the end of the last tile; what they hold past the edge does not matter.
    """

    logit_scale: Any  # (1,) float32
    row_bias: Any  # (N,) float32 or None
    col_bias: Any  # (M,) float32 or None
    rows: tuple  # integer vectors (N,) of the pair program
    cols: tuple  # (M,)
    N: int
    M: int
    D: int
    x_stride: int
    y_stride: int


@triton.jit
def grouped(pid, tiles_n, tiles_m, GROUP: tl.constexpr):
    """Tile (n, m) of program pid: down GROUP tiles, then one to the right, so that a wave shares rows and columns in L2."""
    first = pid // (GROUP * tiles_m) * GROUP
    height = tl.minimum(GROUP, tiles_n - first)
    i = pid % (GROUP * tiles_m)
    return first + i % height, i // height


@triton.jit
def folded(pid, tiles, GROUP: tl.constexpr):
    """Tile (n, m) of program pid, m >= n: the triangle of tiles, folded into a rectangle without a tile to spare.

    Row r of the rectangle is row r of the triangle, tiles - r long, and behind it the row that fills it up: the r-th
    from below where the number of tiles is even, the (r - 1)-th where it is odd (row 0 then fills its row alone).
    """
    odd = tiles % 2
    n, m = grouped(pid, (tiles + odd) // 2, tiles + 1 - odd, GROUP)
    behind = n + m >= tiles
    n, m = tl.where(behind, tiles - 1 + odd - n, n), tl.where(behind, m - 1 + odd, n + m)
    return n, m


@triton.jit
def tile_of(pid, tiles_n, tiles_m, GROUP: tl.constexpr, TRIANGULAR: tl.constexpr):
    if TRIANGULAR:
        n, m = folded(pid, tiles_n, GROUP)
    else:
        n, m = grouped(pid, tiles_n, tiles_m, GROUP)
    return n, m


@triton.jit
def load_rows(x, stride, row, k, N, D, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + BN, k : k + BK], zero past D. Rows past N hold anything: their logits are dropped."""
    if TMA:
        return x.load([row, k])  # (BN, BK)
    else:
        i = tl.minimum(tl.arange(0, BN), N - 1 - row)
        j = k + tl.arange(0, BK)
        x += row.to(tl.int64) * stride  # one int64 base per tile, int32 within it
        return tl.load(x + i[:, None] * stride + j[None, :], mask=(j < D)[None, :], other=0.0)  # (BN, BK)


@triton.jit
def product(
    x, y, row, col, block,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row : row + BN] @ y[col : col + BM].T, accumulated in float32. PRECISION is that of float32 operands."""
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, block.D, BK):
        a = load_rows(x, block.x_stride, row, k, block.N, block.D, BN, BK, TMA)  # (BN, BK)
        b = load_rows(y, block.y_stride, col, k, block.M, block.D, BM, BK, TMA)  # (BM, BK)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc  # (BN, BM)


@triton.jit
def exp(v):
    """e^v; below 2^-126 it is 0. tl.exp computes the same, with three more instructions for the numbers below."""
    return tl.exp2(v * 1.4426950408889634)


@triton.jit
def held(v):
    """v (n,), each element of it computed once, and then handed to the threads that need it: a gather that moves nothing.

    Without one the compiler loads and computes v again in every thread, 32 or 64 columns in each.
    """
    return tl.gather(v, tl.arange(0, v.shape[0]), 0)


@triton.jit
def load_vectors(pointers, i):
    out = ()
    for k in tl.static_range(len(pointers)):
        out = out + (tl.load(pointers[k] + i),)
    return out


@triton.jit
def logits(acc, n, m, rows, cols, whole, block, DROP: tl.constexpr):
    """s = logit_scale * acc + biases, through the pair program, -inf past the edges: of a whole tile none of it lies there."""
    s = acc * tl.load(block.logit_scale)
    if block.row_bias is not None:
        s += tl.load(block.row_bias + n)[:, None]
    if block.col_bias is not None:
        s += held(tl.load(block.col_bias + m))[None, :]
    s = DROP(s, rows, cols, float("-inf"))
    if not whole:
        s = tl.where((n < block.N)[:, None] & (m < block.M)[None, :], s, float("-inf"))
    return s  # (BN, BM)


# ---- on the host ---------------------------------------------------------------------------------------------------------


def tma_can_load(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x (N, D): the driver wants 16-byte alignment of its base and its rows."""
    return x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % 16 == 0


def operands(x: Tensor, y: Tensor, tile: Tile) -> tuple[Any, Any, bool]:
    """x and y as the kernels load them, and whether that is through tensor descriptors."""
    if not (tile.tma and tma_can_load(x) and tma_can_load(y)):
        return x, y, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    x_tile, y_tile = [tile.BN, tile.BK], [tile.BM, tile.BK]
    return TensorDescriptor.from_tensor(x, x_tile), TensorDescriptor.from_tensor(y, y_tile), True


def cdiv(size: int, tile: int) -> int:
    """How many tiles: triton.cdiv, called from the host, takes longer than a tensor operation."""
    return -(-size // tile)


def grid(block: Block, tile: Tile, triangular: bool) -> tuple[int]:
    tiles_n, tiles_m = cdiv(block.N, tile.BN), cdiv(block.M, tile.BM)
    return (tiles_n * (tiles_n + 1) // 2 if triangular else tiles_n * tiles_m,)


def options(tile: Tile, tma: bool) -> dict[str, Any]:
    return dict(
        BN=tile.BN, BM=tile.BM, BK=tile.BK, GROUP=tile.GROUP, TMA=tma, PRECISION=tile.precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def on(device: torch.device):
    """Launches go to the current device, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
