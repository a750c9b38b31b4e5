"""What is done once per row of the embeddings, O(N D): a product with one partner, and the last step of a gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import cdiv, on

BR, BD = 4, 256  # rows and columns that a program walks: 1024 elements, 8 for each thread of 4 warps


@triton.jit
def partner_of(i, shift, size):
    """(i + shift) mod size, for 0 <= i, shift < size, without the sum: it could leave int32."""
    return tl.where(i < size - shift, i + shift, i - (size - shift))


@triton.jit
def partner_products_kernel(
    x, y,  # (N, D), (M, D)
    out,  # (N,) float64
    N, M, D, x_stride, y_stride, shift,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    row = i < N
    x += i.to(tl.int64)[:, None] * x_stride
    y += partner_of(i, shift, M).to(tl.int64)[:, None] * y_stride
    total = tl.zeros((BR,), tl.float64)
    for d in range(0, D, BD):
        k = d + tl.arange(0, BD)[None, :]
        mask = row[:, None] & (k < D)
        product = tl.load(x + k, mask=mask, other=0.0).to(tl.float32) * tl.load(y + k, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(product.to(tl.float64), 1)
    tl.store(out + i, total, mask=row)


@triton.jit
def finish_kernel(
    acc,  # (R, D) float32
    other,  # (C, D), or None
    weight,  # (n,) float32
    scale,  # (1,) float32
    out,  # (R, D)
    R, C, n, D, acc_stride, other_stride, out_stride, shift,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (i < R)[:, None] & (k < D)
    at = i.to(tl.int64)[:, None]
    d = tl.load(acc + at * acc_stride + k, mask=mask, other=0.0)  # (BR, BD)
    if other is not None:
        has = i < n
        w = tl.load(weight + i, mask=has, other=0.0)[:, None]
        j = partner_of(i, shift, C).to(tl.int64)[:, None]
        positive = tl.load(other + j * other_stride + k, mask=mask & has[:, None], other=0.0).to(tl.float32)
        d = tl.where(has[:, None], d + w * positive, d)
    d *= tl.load(scale)
    tl.store(out + at * out_stride + k, d.to(out.dtype.element_ty), mask=mask)


# ---- on the host ---------------------------------------------------------------------------------------------------------


def partner_products(x: Tensor, y: Tensor, shift: int) -> Tensor:
    """<x_i, y_j> with j = (i + shift) mod M, (N,) float64; x (N, D), y (M, D), N <= M, 0 <= shift < M."""
    x, y = _rows(x), _rows(y)
    (N, D), M = x.shape, len(y)
    out = torch.empty(N, dtype=torch.float64, device=x.device)
    with on(x.device):
        partner_products_kernel[(cdiv(N, BR),)](x, y, out, N, M, D, x.stride(0), y.stride(0), shift, BR=BR, BD=BD)
    return out


def finish(acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, out: Tensor) -> None:
    """out_i = scale (acc_i + weight_i other_j), j = (i + shift) mod C; rows from len(weight) on are scale acc_i.

    acc (R, D) float32; other (C, D), 0 <= shift < C, weight (n,) float32, n <= min(R, C), or neither; scale (1,) float32.
    """
    (R, D), C, n = acc.shape, 0, 0
    if other is not None:
        other, weight, C, n = _rows(other), weight.contiguous(), len(other), len(weight)
    stride = 0 if other is None else other.stride(0)
    with on(acc.device):
        finish_kernel[cdiv(R, BR), cdiv(D, BD)](
            acc, other, weight, scale, out, R, C, n, D, acc.stride(0), stride, out.stride(0), shift, BR=BR, BD=BD
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
