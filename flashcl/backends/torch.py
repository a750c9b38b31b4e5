"""The torch backend: tiles of plain PyTorch operations, on any device, in any floating dtype.

One tile of logits is alive at a time, in buffers that are made once per call. The GEMMs are the library's; what happens to
a tile between them runs in place while the tile is in cache. On a CPU a tile decides by looking at its values whether one
exp per logit is safe; on a GPU such a look would make the host wait, so there the careful form is always taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from flashcl.backends.gemm import addmm_, mm
from flashcl.engine.problem import Grads, Problem, Sigmoid, Softmax

# CPU: 4 MiB of float32, so that the two buffers of a tile stay in the last-level cache, while the GEMMs are large enough
# to run at library speed. GPU: 64 MiB, since there a tile has to be many waves of thread blocks.
_CPU_TILE, _GPU_TILE = 1024, 4096

# Terms of exp(s - top) below the smallest normal number, 1e-38, may be lost. A tile has 1024 of them in a row at most:
# beside a sum of this size they are 1e-8.
_SAFE_SUM = 1e-27

# exp(s - low) * exp(low - lse) stays within the range of float32, e^88, on both sides if all lse lie this close above low.
_SAFE_SPREAD = 60.0


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


# ---- tiles ---------------------------------------------------------------------------------------------------------------


class _Tiles:
    """Walks the logits of a problem, tile by tile, in two buffers."""

    def __init__(self, p: Problem):
        self.p = p
        self.edge = _GPU_TILE if p.x.is_cuda else _CPU_TILE
        # A CPU has no 16-bit GEMM with a float32 result: there the operands are widened, a block at a time.
        self.operand_dtype = p.x.dtype if p.x.is_cuda else p.stat_dtype
        size = min(self.edge, len(p.x)) * min(self.edge, len(p.y))
        self._buffers = [torch.empty(size, dtype=p.stat_dtype, device=p.x.device) for _ in range(2)]

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.p.x), self.edge):
            i = slice(start, min(start + self.edge, len(self.p.x)))
            yield i, self.p.x[i].to(self.operand_dtype)  # (BN, D)

    def along(self, i: slice, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor]]:
        """The tiles of the row block i: columns j, y[j], logits s, which pairs are positives, and a free buffer."""
        for start in range(i.start if self.p.triangular else 0, len(self.p.y), self.edge):
            j = slice(start, min(start + self.edge, len(self.p.y)))
            y = self.p.y[j].to(self.operand_dtype)  # (BM, D)
            s, free = (b[: len(x) * len(y)].view(len(x), len(y)) for b in self._buffers)  # (BN, BM)
            mm(x, y.T, out=s)
            s.mul_(self.p.logit_scale)
            if self.p.row_bias is not None:
                s.add_(self.p.row_bias[i, None])
            if self.p.col_bias is not None:
                s.add_(self.p.col_bias[j])
            positive = _apply(self.p.program, s, [v[i] for v in self.p.rows], [v[j] for v in self.p.cols])
            yield j, y, s, positive, free


def _apply(program: str, s: Tensor, rows: list[Tensor], cols: list[Tensor]) -> Tensor | None:
    """Drops pairs from s (BN, BM) in place; returns which are positives, (BN, BM), for programs that have a second class."""
    match program:
        case "all":
            return None
        case "different":
            _drop_equal(s, rows[0], cols[0])
            return None
        case "by_label":
            _drop_equal(s, rows[0], cols[0])
            return (rows[1][:, None] == cols[1]).logical_and_(rows[0][:, None] != cols[0])
    raise ValueError(f"the torch backend has no pair program {program!r}")


def _drop_equal(s: Tensor, row_id: Tensor, col_id: Tensor) -> None:
    # Ids mostly are row numbers: then only the tiles on the diagonal have pairs to drop. Only a CPU may look.
    if s.device.type == "cpu" and (row_id.max() < col_id.min() or col_id.max() < row_id.min()):
        return
    s.masked_fill_(row_id[:, None] == col_id, -torch.inf)


# ---- sweep ---------------------------------------------------------------------------------------------------------------


def sweep(p: Problem, reduction: str, *, need_cols: bool) -> tuple[Tensor, Tensor | None]:
    if reduction == "softplus":
        return _sweep_softplus(p), None
    # Tiles are merged in float64: a float32 log-sum-exp rounded once per tile would drift with the number of tiles.
    row = torch.full((p.classes, len(p.x)), -torch.inf, dtype=torch.float64, device=p.x.device)
    col = row if p.triangular else row.new_full((p.classes, len(p.y)), -torch.inf)
    tiles = _Tiles(p)
    for i, x in tiles.rows():
        for j, _, s, positive, free in tiles.along(i, x):
            mirrored = p.triangular and j.start > i.start
            for k, part in enumerate(_split(s, positive)):
                row_lse, col_lse = _tile_logsumexp(part, free, need_cols=mirrored or (need_cols and not p.triangular))
                _merge(row[k, i], row_lse)
                if col_lse is not None:
                    _merge(col[k, j], col_lse)
    return row.to(p.stat_dtype), col.to(p.stat_dtype) if need_cols and not p.triangular else None


def _split(s: Tensor, positive: Tensor | None) -> Iterator[Tensor]:
    """The logits of each class, -inf elsewhere. The last one is s itself, overwritten."""
    if positive is not None:
        yield s.masked_fill(positive, -torch.inf)
        s.masked_fill_(~positive, -torch.inf)
    yield s


def _tile_logsumexp(s: Tensor, free: Tensor, *, need_cols: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exps of a tile, float64, along its rows (BN,) and its columns (BM,): one exp per logit where that is safe."""
    if s.device.type == "cpu":
        top = s.amax()
        e = torch.sub(s, top, out=free).exp_()  # (BN, BM)
        row, col = e.sum(1), e.sum(0) if need_cols else None
        smallest = row.min() if col is None else min(row.min(), col.min())
        if top.isfinite() and smallest > _SAFE_SUM:
            return top + row.double().log_(), None if col is None else top + col.double().log_()
    return s.logsumexp(1).double(), s.logsumexp(0).double() if need_cols else None


def _merge(total: Tensor, part: Tensor) -> None:
    torch.logaddexp(total, part, out=total)


def _sweep_softplus(p: Problem) -> Tensor:
    total = torch.zeros(len(p.x), dtype=torch.float64, device=p.x.device)
    tiles = _Tiles(p)
    for i, x in tiles.rows():
        for _, _, s, _, _ in tiles.along(i, x):
            total[i] += softplus(s).sum(1)
    return total.to(p.stat_dtype)[None]


def softplus(s: Tensor) -> Tensor:
    # PyTorch's default threshold of 20 returns s itself beyond it: an error of 2e-9, which float64 sees.
    return F.softplus(s, threshold=50.0)


# ---- grad ----------------------------------------------------------------------------------------------------------------


def grad(p: Problem, c: Softmax | Sigmoid, *, need_x: bool, need_y: bool, need_bias: bool) -> Grads:
    tiles = _Tiles(p)
    # 16-bit operands get a G in their dtype, lifted by a power of two into the middle of its range.
    lift = _lift(c) if tiles.operand_dtype.itemsize == 2 else None

    def zeros(*shape):
        return torch.zeros(*shape, dtype=p.stat_dtype, device=p.x.device)

    need_y = need_y and not p.triangular
    dx = zeros(p.x.shape) if need_x else None
    dy = zeros(p.y.shape) if need_y else None
    g_rows, g_cols = (zeros(len(p.x)), zeros(len(p.y))) if need_bias else (None, None)
    row_sum = zeros(len(p.x)) if isinstance(c, Sigmoid) else None

    for i, x in tiles.rows():
        for j, y, s, positive, free in tiles.along(i, x):
            if isinstance(c, Sigmoid):
                row_sum[i] += softplus(s).sum(1) * c.row_weight[i]
                g = s.sigmoid_().mul_(c.row_weight[i, None])  # (BN, BM)
            else:
                g = _softmax_tile(s, positive, free, *_coefficients(c, p, i, j))
            if need_bias:
                g_rows[i] += g.sum(1)
                g_cols[j] += g.sum(0)
            if lift is not None:
                g = (g * lift).to(tiles.operand_dtype)
            if need_x:
                addmm_(dx[i], g, y)
            if need_y:
                addmm_(dy[j], g.T, x)
            if p.triangular and need_x and j.start > i.start:
                addmm_(dx[j], g.T, x)

    if lift is not None:
        for d in (dx, dy):
            if d is not None:
                d.div_(lift)
    return Grads(dx, dy, g_rows, g_cols, row_sum)


def _coefficients(c: Softmax, p: Problem, i: slice, j: slice) -> tuple[list, list]:
    """(weight (K, B), lse (K, B), offset (B,)) of the rows i and of the columns j."""
    row = [c.row_weight[:, i], c.row_lse[:, i], None if c.row_offset is None else c.row_offset[i]]
    if p.triangular:
        return row, [c.row_weight[:, j], c.row_lse[:, j], None if c.row_offset is None else c.row_offset[j]]
    if c.col_weight is None:
        return row, [None, None, None]
    return row, [c.col_weight[:, j], c.col_lse[:, j], None if c.col_offset is None else c.col_offset[j]]


def _softmax_tile(s: Tensor, positive: Tensor | None, free: Tensor, row: list, col: list) -> Tensor:
    """G (BN, BM) of a tile of logits, which it overwrites."""

    def of_class(k, s, free):
        return _weighted_exp(s, free, *(v if v is None else v[k] for v in (*row[:2], *col[:2])))

    if positive is None:
        return of_class(0, s, free)
    g = of_class(1, s.clone(), free)
    for offset in (row[2][:, None] if row[2] is not None else None, col[2]):
        if offset is not None:
            g.sub_(offset)
    return torch.where(positive, g, of_class(0, s, torch.empty_like(s)))


def _weighted_exp(
    s: Tensor,  # (BN, BM), overwritten
    free: Tensor,  # (BN, BM), overwritten
    row_weight: Tensor,  # (BN,)
    row_lse: Tensor,  # (BN,)
    col_weight: Tensor | None,  # (BM,)
    col_lse: Tensor | None,  # (BM,)
) -> Tensor:
    """row_weight_i exp(s_ij - row_lse_i) + col_weight_j exp(s_ij - col_lse_j), (BN, BM)."""
    row_lse = _no_pairs_to_zero(row_lse)
    if col_weight is None:
        return s.sub_(row_lse[:, None]).exp_().mul_(row_weight[:, None])
    col_lse = _no_pairs_to_zero(col_lse)
    if s.device.type == "cpu" and (low := _common_shift(row_lse, col_lse)) is not None:
        a, b = row_weight * torch.exp(low - row_lse), col_weight * torch.exp(low - col_lse)
        return s.sub_(low).exp_().mul_(torch.add(a[:, None], b, out=free))
    torch.sub(s, row_lse[:, None], out=free).exp_().mul_(row_weight[:, None])
    return s.sub_(col_lse).exp_().mul_(col_weight).add_(free)


def _no_pairs_to_zero(lse: Tensor) -> Tensor:
    """exp(s - inf) = 0: a row without pairs has no gradient, where exp(-inf - -inf) would be NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _common_shift(row_lse: Tensor, col_lse: Tensor) -> Tensor | None:
    """The smallest finite lse of a tile if all lie within _SAFE_SPREAD of it.

    Every logit lies below its own lse, so exp(s - low) <= e^60; and exp(low - lse) >= e^-60 loses nothing either.
    """
    lse = torch.cat([row_lse, col_lse])
    lse = lse[lse.isfinite()]
    if not len(lse):
        return None
    low, high = lse.aminmax()
    return low if high - low <= _SAFE_SPREAD else None


def _lift(c: Softmax | Sigmoid) -> Tensor:
    """A power of two, (1,), that brings the largest possible |G| to 2^14: float16 ends at 2^16 and begins at 2^-24."""
    vectors = [c.row_weight] if isinstance(c, Sigmoid) else [c.row_weight, c.col_weight, c.row_offset, c.col_offset]
    largest = sum(v.abs().amax() for v in vectors if v is not None)
    lift = torch.exp2(14 - torch.log2(largest).ceil())
    return torch.where(lift.isfinite() & (lift > 0), lift, 1.0)
