"""What the backends with kernels share: how S is cut into blocks, and how vectors beside it are laid out for whole tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flashcl.engine.problem import LogSumExp, Problem


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


def room(p: Problem, n: int) -> LogSumExp:
    """Of n lines of p, for the statistics of all blocks to be folded into; where there is no block they are of no pair."""
    if len(p.x) == 0 or len(p.y) == 0:
        return LogSumExp.of_no_pair(p, n)
    return LogSumExp(torch.empty(p.classes, 2, n, dtype=p.stat_dtype, device=p.x.device))


def no_deviation(center: Tensor | None, n: int) -> Tensor | None:
    return None if center is None else torch.zeros(n, dtype=torch.float64, device=center.device)


def first_and_last(p: Problem, i: slice, j: slice) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """Whether the block of rows i and columns j is the first and the last one that its rows meet; and its columns.

    A line of a triangular problem is a column to the blocks above the diagonal first, then a row.
    """
    of_rows = j.start == 0, j.stop == len(p.y)
    return of_rows, (i.start == 0, i.stop == len(p.x) and not p.triangular)


def folded_weight(weight: Tensor, lse: LogSumExp) -> Tensor:
    """weight exp(-rest), (K, N), so that exp(s - top) is all that is left to a kernel.

    exp(-rest) is 1 - rest to the rounding of s itself: rest is at most half a unit in the last place of top.
    """
    return torch.addcmul(weight, weight, lse.rest, value=-1)


def lift(vectors: list[Tensor | None]) -> Tensor:
    """A power of two, (1,), that brings the largest possible |G| to 2^14: float16 ends at 2^16 and begins at 2^-24.

    vectors: weights and offsets, G is at most their sum. Computed on the device: the host must not wait for it. A NaN among
    the weights must not spoil the other rows.
    """
    largest = sum(v.nan_to_num(0.0, 0.0, 0.0).abs().amax() for v in vectors if v is not None)
    exponent = 14 - torch.log2(largest).ceil()
    return torch.exp2(exponent.clamp(-100, 100)).reshape(1)  # exponent is inf where all weights are 0


def blocks(p: Problem, cells: float, tile: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the blocks of S, at most `cells` logits each; of S = S^T those on and above the diagonal.

    They are as square as the matrix allows: a block of R rows and C columns adds to R rows of dx and to C rows of dy, so
    that accumulation costs 1 / R + 1 / C per logit.
    """
    N, M = len(p.x), len(p.y)
    edge = math.isqrt(int(cells))
    rows = pieces(slice(0, N), max(edge, int(cells) // max(M, 1)), tile)
    for i in rows:
        for j in rows if p.triangular else pieces(slice(0, M), max(edge, int(cells) // max(N, 1)), tile):
            if not p.triangular or j.start >= i.start:
                yield i, j


def pieces(lines: slice, limit: int, tile: int) -> list[slice]:
    """`lines` in pieces of about equal length, at most `limit` but at least a tile, of whole tiles."""
    size = lines.stop - lines.start
    limit = max(limit // tile, 1) * tile
    count = max(-(-size // limit), 1)
    length = max(whole(-(-size // count), tile), tile)
    return [slice(at, min(at + length, lines.stop)) for at in range(lines.start, lines.stop, length)]
