"""The triton backend: blocks of S go through the kernels of flashcl.triton_kernels, the G they leave through library GEMMs."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from torch import Tensor

from flashcl.backends import tiled
from flashcl.engine.problem import Grads, Needs, Problem, Sigmoid, Softmax, Statistics
from flashcl.triton_kernels import config, grad as grad_kernels, rows as row_kernels, sweep as sweep_kernels
from flashcl.triton_kernels.grad import Side, Sums
from flashcl.triton_kernels.programs import PARTNERS, PROGRAMS
from flashcl.triton_kernels.sweep import Lines
from flashcl.triton_kernels.tile import Block, cdiv

# Triton before 3.4 has no knobs: it is too old anyway, which `unusable` says.
INTERPRETED = hasattr(triton, "knobs") and triton.knobs.runtime.interpret


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"the kernels need triton 3.6 or later, this is {triton.__version__}"
    if dtype == torch.float64:
        return "float64 is served by the torch backend"
    if device.type == "cuda" and torch.version.hip:
        return "the kernels are for NVIDIA GPUs"  # which an AMD one could be taken for: it has a capability, too
    if device.type == "cuda":
        arch = torch.cuda.get_device_capability(device)
        return None if arch >= (8, 0) else f"the kernels need sm_80 or later, this is sm_{arch[0]}{arch[1]}"
    if device.type == "cpu" and INTERPRETED:
        if dtype == torch.bfloat16 and not _interpreter_knows_bfloat16():
            return f"the interpreter of triton {triton.__version__} computes with the bit patterns of bfloat16"
        return None
    return f"the kernels run on CUDA devices, not on {device.type}"


@functools.cache
def _interpreter_knows_bfloat16() -> bool:
    x = torch.ones(1, 16, dtype=torch.bfloat16, device="cpu")
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    return sweep(Problem.of(x, x.clone(), one, None, None, "all", (), ()), need_cols=False).row.value().item() == 16.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tiles a call uses, and how much memory: by default what config says. Tests and tools pass their own."""

    tile: config.Tile
    square: config.Tile  # of the blocks on the diagonal of a triangular problem
    workspace: int = tiled.WORKSPACE

    @classmethod
    def of(cls, p: Problem, kernel: str) -> Plan:
        entry = config.entry(_arch(p.x.device), kernel, p.x.dtype)
        return cls(entry.tile, entry.square)

    def step(self) -> int:
        """Blocks begin at multiples of this."""
        return max(self.tile.BN, self.tile.BM, self.square.BN)


def _many_vectors(p: Problem) -> bool:
    return p.classes == 2 or p.row_bias is not None or p.col_bias is not None


def _arch(device: torch.device) -> int:
    if INTERPRETED:
        return config.INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kept_elements(p: Problem) -> int:
    return 0  # the tiles of S never leave the chip


# ---- sweep ---------------------------------------------------------------------------------------------------------------


def sweep(p: Problem, *, need_cols: bool, keep: bool = False, plan: Plan | None = None) -> Statistics:
    plan = plan or Plan.of(p, _sweep_entry(p))
    p, program = _loadable(p), PROGRAMS[p.program]
    col_center = p.center if p.triangular else p.col_center

    def launch(i: slice, j: slice, diagonal: bool, need_cols: bool) -> tuple[Lines, Lines | None]:
        tile = plan.square if diagonal else plan.tile
        x, y, block = _block(p, i, j)
        tiles_n, tiles_m = cdiv(block.N, tile.BN), cdiv(block.M, tile.BM)
        rows = _lines(p, p.center, tiles_m, tiles_n * tile.BN, i)
        cols = _lines(p, col_center, tiles_n, tiles_m * tile.BM, j) if need_cols else None
        sweep_kernels.sweep(x, y, block, rows, rows if diagonal else cols, None, program, diagonal, tile)
        return rows, cols

    cells = plan.workspace / tiled.bytes_of_sums(p, plan.tile.BN, plan.tile.BM)
    return tiled.sweep(p, need_cols, cells, plan.step(), launch, sweep_kernels.fold)


def _sweep_entry(p: Problem) -> str:
    """The entry of the tile table for statistics."""
    if p.triangular and p.classes == 2 and len(p.x) % 16:
        return "grad2"  # the smaller tiles: such sizes take some registers more
    return "sweep2" if _many_vectors(p) else "sweep"


def _lines(p: Problem, center: Tensor | None, tiles: int, n: int, at: slice) -> Lines:
    sums = torch.empty(p.classes, 2, tiles, n, dtype=torch.float32, device=p.x.device)
    return Lines(sums) if center is None else Lines(sums, center[at.start :], sums.new_empty(tiles, n))


def sweep_softplus(p: Problem, *, plan: Plan | None = None) -> Tensor:
    plan = plan or Plan.of(p, "sweep")
    p, program = _loadable(p), PROGRAMS[p.program]
    total = torch.zeros(len(p.x), dtype=torch.float32, device=p.x.device)
    for i, j in tiled.blocks(p, plan.workspace / tiled.bytes_of_sums(p, plan.tile.BN, plan.tile.BM), plan.step()):
        x, y, block = _block(p, i, j)
        sums = total.new_empty(cdiv(block.M, plan.tile.BM), tiled.whole(block.N, plan.tile.BN))
        sweep_kernels.sweep(x, y, block, None, None, sums, program, False, plan.tile)
        tiled.add_lines_(total, i, sums, first=j.start == 0)
    return total


# ---- one positive a row --------------------------------------------------------------------------------------------------

partner_products, finish = row_kernels.partner_products, row_kernels.finish


def products_in_tiles(x: Tensor, y: Tensor, shift: int) -> tuple[slice, Tensor]:
    rows, x, y = tiled.compared(x, y, shift)
    label = torch.arange(len(x), dtype=torch.int32, device=x.device)  # each row has one positive, whose logit is all
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    p = _loadable(Problem(x, y, one, None, None, "by_label", (label,), (label,)))
    tile = Plan.of(p, _sweep_entry(p)).tile
    x, y, block = _block(p, slice(0, len(x)), slice(0, len(y)))
    along_rows = cdiv(block.M, tile.BM), tiled.whole(block.N, tile.BN)
    sums, products = one.new_empty(2, 2, *along_rows), one.new_empty(along_rows)
    sweep_kernels.sweep(x, y, block, Lines(sums, deviation=products), None, None, PARTNERS, False, tile)
    return rows, products.sum(0, dtype=torch.float64)[: len(x)]


# ---- grad ----------------------------------------------------------------------------------------------------------------


def grad(
    p: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    *,
    kept: Tensor | None = None,
    plan: Plan | None = None,
) -> Grads:
    plan = plan or Plan.of(p, _grad_entry(p, c, needs.scale))
    loadable, program, D = _loadable(p), PROGRAMS[p.program], p.x.shape[1]
    softplus = isinstance(c, Sigmoid)
    about = c.about if needs.scale and not softplus else None

    def tile_of(i: slice, j: slice) -> config.Tile:
        return plan.square if p.triangular and i == j else plan.tile

    def shape(i: slice, j: slice) -> tuple[int, int]:
        return tiled.whole(i.stop - i.start, tile_of(i, j).BN), tiled.whole(j.stop - j.start, tile_of(i, j).BM)

    def launch(i: slice, j: slice, row: tiled.Side, col: tiled.Side | None, g: Tensor | None) -> tiled.TileSums:
        tile, diagonal = tile_of(i, j), p.triangular and i == j
        x, y, block = _block(loadable, i, j)
        n, m = shape(i, j)
        along_rows, along_cols = (m // tile.BM, n), (n // tile.BN, m)
        wanted = (needs.row_bias, along_rows), (needs.col_bias, along_cols), (softplus, along_rows)
        wanted += ((needs.scale, grad_kernels.grid(block, tile, diagonal)),)
        sums = tiled.TileSums(*(torch.empty(s, dtype=torch.float32, device=x.device) if w else None for w, s in wanted))
        sides = _side(row, x.dtype), None if col is None else _side(col, x.dtype)
        grad_kernels.grad(x, y, block, *sides, g, Sums(*sums, about), program, diagonal, tile)
        return sums

    blocks = tiled.blocks(p, plan.workspace / p.x.itemsize, plan.step())
    # The aligned copies, if there are any, less their columns of zeros: what the GEMMs write has D.
    loaded = dataclasses.replace(p, x=loadable.x[:, :D], y=loadable.y[:, :D])
    return tiled.grad(loaded, c, needs, config.LARGEST, blocks, shape, launch)


def _grad_entry(p: Problem, c: Softmax | Sigmoid, need_scale: bool) -> str:
    """The entry of the tile table for a gradient."""
    if isinstance(c, Sigmoid):
        return "sigmoid"
    # The products stay in registers for the gradient of the scale, and sizes that are not multiples of 16 take more of them.
    ragged = len(p.x) % 16 or len(p.y) % 16
    return "grad2" if _many_vectors(p) or (need_scale and ragged) else "grad"


def _side(side: tiled.Side, dtype: torch.dtype) -> Side:
    """Coefficients as the kernel takes them."""
    weight, top, offset = side
    return Side(weight, top, 0 if top is None else weight.stride(0), offset, 1 if dtype == torch.float32 else None)


# ---- blocks --------------------------------------------------------------------------------------------------------------


def _loadable(p: Problem) -> Problem:
    """With embeddings and vectors as the kernels read them: copied, once, where they are not."""
    x = tiled.aligned(p.x, 16)  # columns: no tile of the products is ragged then
    y = x if p.triangular else tiled.aligned(p.y, 16)
    rows, cols = tuple(map(_pad, p.rows)), tuple(map(_pad, p.cols))
    names = "row_bias", "col_bias", "center", "col_center"
    vectors = {name: _pad(v) for name in names if (v := getattr(p, name)) is not None}
    return dataclasses.replace(p, x=x, y=y, rows=rows, cols=cols, **vectors)


def _pad(v: Tensor) -> Tensor:
    """For tiles of any size."""
    return tiled.pad(v, config.LARGEST)


def _block(p: Problem, i: slice, j: slice) -> tuple[Tensor, Tensor, Block]:
    x, y = p.x[i], p.y[j]
    row_bias, col_bias = (None if b is None else b[at.start :] for b, at in ((p.row_bias, i), (p.col_bias, j)))
    return x, y, Block(
        p.logit_scale,
        row_bias, col_bias, tuple(v[i.start :] for v in p.rows), tuple(v[j.start :] for v in p.cols),
        len(x), len(y), x.shape[1], x.stride(0), y.stride(0),
    )  # fmt: skip
