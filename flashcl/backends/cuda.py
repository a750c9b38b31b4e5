"""The CUDA backend: blocks of S go through the Hopper kernels of csrc/, the G they leave through library GEMMs.

Tensors on a CPU run through the same code, lane by lane, by emulation in csrc/: that is for tests, and `unusable` says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcl.backends import tiled
from flashcl.engine.problem import Grads, Needs, Problem, Sigmoid, Softmax, Statistics

try:
    from flashcl import _C
except ImportError as error:
    _C, _MISSING = None, str(error)

# Of a block on the diagonal of S = S^T, the backward computes both halves, strip by strip: this many strips leave out most of
# what is below the diagonal (3 / 8 of the block) while a strip is high enough for its GEMMs. In a lower one than this the four
# launches of a strip take the host longer than what it leaves out would take the GPU.
_STRIPS = 4
_LOWEST_STRIP = 2048


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    if _C is None:
        return f"flashcl._C is not there: {_MISSING}"
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"  # which an AMD one could be taken for: it has a capability, too
    arch = torch.cuda.get_device_capability(device)
    if arch != (9, 0):
        return f"the kernels are for sm_90, this is sm_{arch[0]}{arch[1]}"
    if "90a" not in _C.build_info()["architectures"]:
        return f"flashcl._C was built for {', '.join(_C.build_info()['architectures'])}, without 90a"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels multiply bfloat16 and float16, not {dtype}"
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing may be looked at now
    return _failed_check(torch.cuda.current_device() if device.index is None else device.index)


def kept_elements(p: Problem) -> int:
    return 0  # the tiles of S never leave the chip


# ---- sweep ---------------------------------------------------------------------------------------------------------------


def sweep(p: Problem, *, need_cols: bool, keep: bool = False, workspace: int = tiled.WORKSPACE) -> Statistics:
    a = _Arguments.of(p)
    col_center = a.center if p.triangular else a.col_center

    def room(lines: slice, others: slice, center: Tensor | None) -> _Lines:
        sums = torch.empty(p.classes, 2, _tiles(others), _whole(lines), dtype=torch.float32, device=p.x.device)
        if center is None:
            return _Lines(sums)
        return _Lines(sums, center[lines.start :], sums.new_empty(_tiles(others), _whole(lines)))

    def launch(i: slice, j: slice, diagonal: bool, need_cols: bool) -> tuple[_Lines, _Lines | None]:
        rows, cols = room(i, j, a.center), room(j, i, col_center) if need_cols else None
        places = {"row": rows, "col": rows if diagonal else cols}
        lines = {f"{side}_{name}": v for side, at in places.items() if at is not None for name, v in at._asdict().items()}
        _C.sweep(a.block(i, j, diagonal), **lines, stream=stream)
        return rows, cols

    def fold(sums: Tensor, out: Tensor, *, first: bool, last: bool) -> None:
        _C.fold(sums, out, first, last, stream)

    with _on(p.x.device) as stream:  # which launch and fold read
        return tiled.sweep(p, need_cols, workspace / tiled.bytes_of_sums(p, _C.TILE, _C.TILE), _C.TILE, launch, fold)


class _Lines(NamedTuple):
    """Room for what a sweep leaves of every tile, along the rows or along the columns."""

    sums: Tensor  # (K, 2, tiles, lines)
    center: Tensor | None = None  # (lines,)
    deviation: Tensor | None = None  # (tiles, lines)


def sweep_softplus(p: Problem, *, workspace: int = tiled.WORKSPACE) -> Tensor:
    a, ones = _Arguments.of(p), torch.ones(_whole(slice(0, len(p.x))), dtype=torch.float32, device=p.x.device)
    total = ones.new_zeros(len(p.x))
    for i, j in tiled.blocks(p, workspace / tiled.bytes_of_sums(p, _C.TILE, _C.TILE), _C.TILE):
        sums = ones.new_empty(_tiles(j), _whole(i))
        with _on(p.x.device) as stream:
            _C.sigmoid(a.block(i, j), ones, sums, stream=stream)
        tiled.add_lines_(total, i, sums, first=j.start == 0)
    return total


# ---- one positive a row --------------------------------------------------------------------------------------------------


def partner_products(x: Tensor, y: Tensor, shift: int) -> Tensor:
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)
    with _on(x.device) as stream:
        _C.partner_products(_rows(x), _rows(y), shift, out, stream)
    return out


def products_in_tiles(x: Tensor, y: Tensor, shift: int) -> tuple[slice, Tensor]:
    rows, *partners = tiled.compared(x.detach(), y.detach(), shift)
    x, y = (tiled.aligned(v, 8) for v in partners)
    here = slice(0, len(x))
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    label = torch.arange(_whole(here), dtype=torch.int32, device=x.device)  # each row has one positive, whose logit is all
    sums = one.new_empty(2, 2, _tiles(here), _whole(here))
    products = one.new_empty(_tiles(here), _whole(here))
    with _on(x.device) as stream:
        block = _C.Block(x, y, one, row_label=label, col_label=label)
        _C.sweep(block, row_sums=sums, row_deviation=products, stream=stream)
    return rows, products.sum(0, dtype=torch.float64)[: len(x)]


def finish(acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, out: Tensor) -> None:
    other, weight = (None, None) if other is None else (_rows(other), weight.contiguous())
    with _on(acc.device) as stream:
        _C.finish(acc, other, weight, shift, scale.detach(), out, stream)


def _rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(1) == 1 else x.contiguous()


# ---- grad ----------------------------------------------------------------------------------------------------------------


def grad(
    p: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    *,
    kept: Tensor | None = None,
    workspace: int = tiled.WORKSPACE,
) -> Grads:
    a, D, softplus = _Arguments.of(p), p.x.shape[1], isinstance(c, Sigmoid)

    def room(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=p.x.device) if wanted else None

    def launch(i: slice, j: slice, row: tiled.Side, col: tiled.Side | None, g: Tensor | None) -> tiled.TileSums:
        along_rows, along_cols = (_tiles(j), _whole(i)), (_tiles(i), _whole(j))
        scaled = room(needs.scale, _tiles(i), _tiles(j))
        sums = tiled.TileSums(
            room(needs.row_bias, *along_rows), room(needs.col_bias, *along_cols), room(softplus, *along_rows), scaled
        )
        _launch(a.block(i, j), row, col, sums, g, None if softplus else c.about, stream)
        if p.triangular and i.start == j.start and scaled is not None:
            scaled[:, : _tiles(i)] *= 0.5  # there G + G^T meets every pair twice
        return sums

    blocks = _strips(p, workspace / p.x.itemsize)
    # The aligned copies, if there are any, less their columns of zeros: what the GEMMs write has D.
    loaded = dataclasses.replace(p, x=a.x[:, :D], y=a.y[:, :D])
    with _on(p.x.device) as stream:  # which launch reads
        return tiled.grad(loaded, c, needs, _C.TILE, blocks, lambda i, j: (_whole(i), _whole(j)), launch)


def _launch(block, row: tiled.Side, col: tiled.Side | None, sums: tiled.TileSums, g: Tensor | None, about, stream) -> None:
    of_g = dict(g=g, g_rows=sums.g_rows, g_cols=sums.g_cols, scaled=sums.scaled, stream=stream)
    if sums.softplus is not None:
        _C.sigmoid(block, row.weight, sums.softplus, **of_g)
        return
    sides = dict(row_weight=row.weight, row_lse=row.top, row_offset=row.offset)
    if col is not None:
        sides |= dict(col_weight=col.weight, col_lse=col.top, col_offset=col.offset)
    _C.grad(block, **sides, **of_g, about=about)


# ---- arguments -----------------------------------------------------------------------------------------------------------


class _Arguments(NamedTuple):
    """Embeddings and vectors as the kernels read them: copied, once, where they are not."""

    x: Tensor
    y: Tensor
    logit_scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    rows: _Ids
    cols: _Ids
    center: Tensor | None
    col_center: Tensor | None

    @staticmethod
    def of(p: Problem) -> _Arguments:
        # detach, here and above: PyTorch exports no tensor by DLPack that requires a gradient.
        x = tiled.aligned(p.x.detach(), 8)  # columns: TMA wants rows of 16 bytes
        y = x if p.triangular else tiled.aligned(p.y.detach(), 8)
        biases = (None if v is None else _pad(v.detach()) for v in (p.row_bias, p.col_bias))
        centers = (None if v is None else _pad(v) for v in (p.center, p.col_center))
        rows = _Ids.of(p.rows)
        cols = rows if all(map(_same, p.rows, p.cols)) else _Ids.of(p.cols)
        return _Arguments(x, y, p.logit_scale.detach(), *biases, rows, cols, *centers)

    def block(self, i: slice, j: slice, triangular: bool = False) -> Any:
        """Rows i and columns j of S, whose starts are multiples of TILE."""

        row_bias, col_bias = (
            None if b is None else b[at.start :] for b, at in ((self.row_bias, i), (self.col_bias, j))
        )
        sides = ("row", self.rows, i.start), ("col", self.cols, j.start)
        ids = {f"{side}_{k}": v for side, lines, start in sides for k, v in lines.at(start)._asdict().items()}
        return _C.Block(self.x[i], self.y[j], self.logit_scale, row_bias, col_bias, **ids, triangular=triangular)


class _Ids(NamedTuple):
    """What a pair program reads of the rows, or of the columns."""

    id: Tensor | None = None  # (n,) in whole tiles
    range: Tensor | None = None  # (tiles, 2) the smallest and the largest id of each tile
    label: Tensor | None = None  # (n,)

    @staticmethod
    def of(vectors: tuple[Tensor, ...]) -> _Ids:
        """Of the `rows`, or `cols`, of a Problem."""
        if not vectors:
            return _Ids()
        id, *label = map(_pad, vectors)
        tiles = id.unflatten(0, (-1, _C.TILE))
        ranges = id.new_empty(len(tiles), 2)
        torch.aminmax(tiles, dim=1, out=(ranges[:, 0], ranges[:, 1]))
        return _Ids(id, ranges, *label)

    def at(self, start: int) -> _Ids:
        """From the line `start` on, the first of a tile."""
        if start == 0:  # as where there is one block: each slice takes the host as long as a small operation
            return self
        cuts = start, start // _C.TILE, start
        return _Ids(*(None if v is None else v[cut:] for v, cut in zip(self, cuts)))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _pad(v: Tensor) -> Tensor:
    return tiled.pad(v, _C.TILE)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """The current stream of the device, which is made current: tensors of another one are not exported, nor kernels launched."""
    if device.type != "cuda":
        yield 0
    elif device.index == torch.cuda.current_device():  # as nearly always: looking is cheaper than changing it
        yield torch.cuda.current_stream().cuda_stream
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream


# ---- blocks --------------------------------------------------------------------------------------------------------------


def _tiles(lines: slice) -> int:
    return -(-(lines.stop - lines.start) // _C.TILE)


def _whole(lines: slice) -> int:
    return _tiles(lines) * _C.TILE


def _strips(p: Problem, cells: float) -> Iterator[tuple[slice, slice]]:
    """Blocks, with strips in place of the blocks on the diagonal of S = S^T: each goes from its diagonal to the right."""
    for i, j in tiled.blocks(p, cells, _C.TILE):
        if p.triangular and i == j:
            for strip in tiled.pieces(i, max(-(-(i.stop - i.start) // _STRIPS), _LOWEST_STRIP), _C.TILE):
                yield strip, slice(strip.start, i.stop)
        else:
            yield i, j


# ---- self-check ----------------------------------------------------------------------------------------------------------


@functools.cache
def _failed_check(index: int) -> str | None:
    """What is wrong with the kernels on this GPU, or None: a small problem against dense float64, once per process."""
    device = torch.device("cuda", index)
    wrong = [f"{name} is off by {error:.1e}" for name, error, allowed in self_check(device) if not error <= allowed]
    if not wrong:
        return None
    reason = f"its self-check failed on {torch.cuda.get_device_name(device)}: {', '.join(wrong)}"
    warnings.warn(f'flashcl: the backend "cuda" is switched off: {reason}', stacklevel=2)
    return reason


def self_check(device: torch.device) -> list[tuple[str, float, float]]:
    """(quantity, error relative to the largest value, what is allowed), of ragged tiles with biases, ids and labels."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    x, y = (random(n, 72).to(torch.bfloat16).to(device) for n in (200, 300))
    scale, bias = torch.full((1,), 0.3, dtype=torch.float32, device=device), random(200).to(device)
    ids = [torch.arange(n, dtype=torch.int32, device=device) for n in (200, 300)]
    rows, cols = ((v, v % 7) for v in ids)
    p = Problem(x, y, scale, bias, None, "by_label", rows, cols)
    s = 0.3 * x.double() @ y.double().T + bias.double()[:, None]
    same, positive = rows[0][:, None] == cols[0], rows[1][:, None] == cols[1]
    members = [s.masked_fill(same | positive, -torch.inf), s.masked_fill(same | ~positive, -torch.inf)]

    def off(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want).abs().amax() / want.abs().amax()).item()  # NaN where got has one

    got = sweep(p, need_cols=True)
    lse = [torch.stack([m.logsumexp(axis) for m in members]) for axis in (1, 0)]
    half = [v.of_top(torch.full_like(v.top, 0.5)) for v in (got.row, got.col)]
    everything = Needs(x=True, y=True, scale=True)
    grads = grad(p, Softmax(half[0], got.row.top, half[1], got.col.top), everything)
    g = sum(0.5 * (m - lse[0][k, :, None]).exp() + 0.5 * (m - lse[1][k]).exp() for k, m in enumerate(members))
    out = [("row_lse", off(got.row.value(), lse[0]), 1e-6), ("col_lse", off(got.col.value(), lse[1]), 1e-6)]
    out += [("dx", off(grads.dx, g @ y.double()), 8e-3), ("dy", off(grads.dy, g.T @ x.double()), 8e-3)]

    p = dataclasses.replace(p, program="all", rows=(), cols=())
    grads, g = grad(p, Sigmoid(torch.ones(200, dtype=torch.float32, device=device)), everything), s.sigmoid()
    loss = torch.nn.functional.softplus(s).sum(1)
    return [*out, ("softplus", off(grads.row_sum, loss), 1e-6), ("dx of softplus", off(grads.dx, g @ y.double()), 8e-3)]
