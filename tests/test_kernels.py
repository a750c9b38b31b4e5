"""sweep and grad of every backend that this machine's CPU can run, against dense float64 (kernels.py): what all have in common.

torch: in small tiles. triton: in the interpreter. emulated: csrc/emulate.cpp does to tiles of a CPU product what the CUDA
kernels do to those of the tensor cores, lane by lane. ptx: the CUDA kernels themselves, on a simulated GPU (ptx/).
What one of them has alone is in test_triton_kernels.py, test_cuda_host.py and test_cuda_ptx.py; the losses over cuda are in
test_cuda_contract.py.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, strategies as st
from kernels import (
    ROUNDED,
    assert_close,
    assert_grads,
    assert_sweeps,
    dense_g,
    gradients,
    logits,
    problem,
    softmax,
    softplus_sums,
)
from torch.nn.functional import normalize

import ptx

from flashcl.backends import cuda, tiled, torch as torch_backend
from flashcl.engine.problem import CLASSES, Needs, Problem, Sigmoid, Softmax

pytestmark = pytest.mark.usefixtures("poison")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A backend, and how it is called here."""

    backend: ModuleType
    tile: int  # rows and columns of a tile
    dtypes: list[torch.dtype]
    within: Callable[[int], dict]  # its arguments for a workspace of so many bytes

    def assert_sweeps(self, p, workspace=2**29, **options):
        return assert_sweeps(self.backend, p, **self.within(workspace), **options)

    def assert_grads(self, p, c, workspace=2**29, **options):
        return assert_grads(self.backend, p, c, **self.within(workspace), **options)


def torch_kernels(patch):
    patch.setattr(torch_backend, "_CPU_TILE", (32, 32))
    # It has no workspace: its blocks are tiles.
    return Kernels(torch_backend, 32, [torch.float32, torch.bfloat16, torch.float64], lambda workspace: {})


def triton_kernels(patch):
    if not INTERPRETED:
        pytest.skip("these tests are for the interpreter")
    from flashcl.backends import triton
    from flashcl.triton_kernels.config import Tile

    tile = Tile(32, 32, 32, 4, 1)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return Kernels(triton, 32, dtypes, lambda workspace: dict(plan=triton.Plan(tile, tile, workspace)))


def emulated_kernels(patch):
    if cuda._C is None:
        pytest.skip("flashcl._C was not built: no nvcc, or no CUTLASS headers")
    patch.setattr(cuda, "_LOWEST_STRIP", cuda._C.TILE)  # small problems in several strips, as large ones are
    return Kernels(cuda, cuda._C.TILE, [torch.bfloat16, torch.float16], lambda workspace: dict(workspace=workspace))


def ptx_kernels(patch):
    if isinstance(machine := ptx.machine(), str):
        pytest.skip(machine)
    patch.setattr(cuda, "_C", machine.module)
    return emulated_kernels(patch)


MAKE = dict(torch=torch_kernels, triton=triton_kernels, emulated=emulated_kernels, ptx=ptx_kernels)


@pytest.fixture(scope="module", params=MAKE)
def run(request):
    with pytest.MonkeyPatch.context() as patch:
        yield MAKE[request.param](patch)


# ---- programs, dtypes, shapes --------------------------------------------------------------------------------------------


def shapes(T):
    """(N, M, D): 1 to 3 tiles of T, ragged or not."""
    return [(1, 1, 1), (1, 2 * T + 6, 8), (T + 1, T - 1, 5), (T, T, 40), (2 * T + 6, T + 13, 72)]


@pytest.mark.parametrize("program", CLASSES)
def test_sweep_and_grad(program, run):
    for dtype in run.dtypes:
        for N, M, D in shapes(run.tile):
            p = problem(N, M, D, program, dtype=dtype, bias=D in (5, 40))
            run.assert_sweeps(p)
            run.assert_grads(p, softmax(p), need_bias=D == 40)


@pytest.mark.parametrize("program", ["all", "different"])
def test_softplus_and_sigmoid(program, run):
    for dtype in run.dtypes:
        for N, M, D in shapes(run.tile):
            p = problem(N, M, D, program, dtype=dtype, scale=4 / math.sqrt(D), bias=True)
            allowed = 1e-13 if dtype == torch.float64 else 1e-6
            assert_close(run.backend.sweep_softplus(p, **run.within(2**29)), softplus_sums(p), allowed)
            run.assert_grads(p, Sigmoid(torch.randn(N)), need_bias=True)


@given(
    N=st.floats(0, 2.4), M=st.floats(0, 2.4), D=st.integers(1, 40), program=st.sampled_from(list(CLASSES)),
    scale=st.sampled_from([-1.0, 0.0, 0.1, 1.0, 30.0]), bias=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_problem(N, M, D, program, scale, bias, seed, run):
    N, M = (max(round(tiles * run.tile), 1) for tiles in (N, M))
    dtype = run.dtypes[-1]
    p = problem(N, M, D, program, dtype=dtype, scale=scale / math.sqrt(D), bias=bias, seed=seed)
    # A logit may be next to nothing, and its terms are not: they are rounded once at least.
    terms = (p.x.double().abs() @ p.y.double().abs().T).max() * p.logit_scale.abs()
    run.assert_sweeps(p, rounding=torch.finfo(p.stat_dtype).eps / 2 * terms.item())
    c = softmax(p, seed=seed)
    got = run.backend.grad(p, c, Needs(x=True, y=True, scale=True), **run.within(2**29))
    ref, size = gradients(p, c)[0], dense_g(p, c, size=True)
    for name, terms in (("dx", size @ p.y.double().abs()), ("dy", size.T @ p.x.double().abs())):
        # G is rounded, and logits of 100 are uncertain by 1e-5
        allowed = torch.finfo(dtype).eps / 2 * 1.1 + 2e-5
        assert ((getattr(got, name) - ref[name]).abs() <= allowed * terms + 1e-7).all(), name


@pytest.mark.parametrize("program", CLASSES)
def test_one_direction(program, run):
    for dtype in run.dtypes:
        p = problem(2 * run.tile - 3, run.tile + 13, 40, program, dtype=dtype)
        run.assert_sweeps(p, need_cols=False)
        run.assert_grads(p, softmax(p, cols=False))


def test_only_what_is_asked_for(run):
    p = problem(40, 50, 16, dtype=run.dtypes[0])
    c, ref = softmax(p), gradients(p, softmax(p))[0]
    for name, needs in dict(dx="x", dy="y", g_rows="row_bias", g_cols="col_bias", d_scale="scale").items():
        got = run.backend.grad(p, c, Needs(**{needs: True}))
        assert [k for k, v in vars(got).items() if v is not None] == [name]
        assert_close(getattr(got, name), ref[name], ROUNDED[p.x.dtype])


def test_no_rows_or_no_columns(run):
    for N, M in ((0, 5), (5, 0)):
        p = problem(N, M, 8, "different", dtype=run.dtypes[0])
        got = run.backend.sweep(p, need_cols=True, keep=False)
        row, col = got.row.value(), got.col.value()
        assert row.shape == (1, N) and col.shape == (1, M) and (row == -torch.inf).all() and (col == -torch.inf).all()
        c = Softmax(torch.ones(1, N), got.row.top, torch.ones(1, M), got.col.top)
        got = run.backend.grad(p, c, Needs(x=True, y=True, row_bias=True, col_bias=True, scale=True))
        assert got.dx.shape == (N, 8) and got.dy.shape == (M, 8) and not got.dx.any() and not got.dy.any()
        assert got.d_scale == 0 and not got.g_rows.any() and not got.g_cols.any()


def test_strides(run):
    """Transposed, sliced, shifted and broadcast inputs are what their elements are."""
    for dtype in run.dtypes:
        base = problem(40, 50, 24, "different", dtype=dtype)
        wide = torch.randn(40, 80).to(dtype)
        views = [wide[:, 3:27], wide[:, ::2][:, :24], wide[:1, :24].expand(40, 24), wide[:, 16:40]]
        for x in [torch.randn(24, 40).to(dtype).T, *views]:
            p = dataclasses.replace(base, x=x, rows=(torch.arange(80, dtype=torch.int32)[::2],))
            run.assert_sweeps(p)
            run.assert_grads(p, softmax(p))


# ---- hard values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
def test_wild_logits(program, run):
    """Logits up to 1e4: rows and columns of one tile whose maxima are thousands apart."""
    for dtype in run.dtypes:
        N, M = 2 * run.tile + 6, run.tile + 13
        p = problem(N, M, 16, program, dtype=dtype, scale=30.0)
        p = dataclasses.replace(p, x=(p.x * torch.logspace(-3, 1.4, N)[:, None]).to(dtype))
        assert 5e3 < p.x.double().mm(p.y.double().T).mul(30).abs().max() < 2e4
        run.assert_sweeps(p)
        run.assert_grads(p, softmax(p), tolerance=max(ROUNDED[dtype], 5e-3))  # float32 logits of 1e4 are uncertain by 1e-3


@pytest.mark.parametrize("program", CLASSES)
@pytest.mark.parametrize("depth", [0, 1, 20, 55, 62, 63, 70, 74, 77, 80, 83, 88, 104, 120, 1000])
def test_lines_far_below_their_tile(program, depth, run):
    """On both sides of the thresholds: one top for a tile or a warp, one exp for rows and columns."""
    n = run.tile + 12
    for rows, cols in (([5], []), ([], [7, n - 10]), ([5], [7, n - 10])):
        p = problem(n, n, 16, program, dtype=run.dtypes[0])
        row_bias, col_bias = torch.zeros(n), torch.zeros(n)
        row_bias[rows], col_bias[cols] = -depth, -depth
        p = dataclasses.replace(p, row_bias=row_bias, col_bias=col_bias)
        run.assert_sweeps(p, tolerance=4e-7)
        run.assert_grads(p, softmax(p))


@pytest.mark.parametrize("height", [-300.0, -60.0, 0.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("program", CLASSES)
def test_columns_far_from_the_first_ones(program, height, run):
    """One top serves a warp of the CUDA kernels if it is near enough to that of the negatives in a quarter of the columns."""
    n = 2 * run.tile
    p = problem(n, n, 16, program, dtype=run.dtypes[0], scale=1.0)
    first = torch.arange(n) % run.tile < run.tile // 4
    p.x[:, 0] = 1.0
    p.y[:, 0] = torch.where(first, 0.0, height)
    if program == "by_label":  # no negative among the first ones
        p.rows[1].fill_(1)
        p.cols[1].copy_(first)
    run.assert_sweeps(p)


def test_lines_without_pairs(run):
    """Biases of -inf, and ids that leave a row or a column nothing: log-sum-exp -inf, gradient 0, neighbours unharmed."""
    n, m = run.tile + 12, run.tile + 22
    p = problem(n, m, 16, "by_label", dtype=run.dtypes[0])
    row_bias, col_bias = torch.randn(n), torch.randn(m)
    row_bias[[0, 33]] = -torch.inf
    col_bias[[7, m - 1]] = -torch.inf
    p = dataclasses.replace(p, row_bias=row_bias, col_bias=col_bias)
    run.assert_sweeps(p)
    everyone = dataclasses.replace(p, program="all", rows=(), cols=())
    got = run.assert_grads(everyone, softmax(everyone))
    assert not got.dx[[0, 33]].any() and not got.dy[[7, m - 1]].any()

    same = torch.zeros(n, dtype=torch.int32)  # every pair dropped
    p = dataclasses.replace(problem(n, n, 16, "different", dtype=run.dtypes[0]), rows=(same,), cols=(same,))
    run.assert_sweeps(p)
    c = softmax(p)
    got = run.assert_grads(p, dataclasses.replace(c, row_weight=torch.full_like(c.row_weight, torch.nan)))
    assert not got.dx.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("program", ["all", "different"])
def test_not_finite_inputs_come_out_where_they_belong(program, value, run):
    n = run.tile + 12
    p = problem(n, n + 10, 16, program, dtype=run.dtypes[0])
    p.x[n - 5, 3] = value
    run.assert_sweeps(p)
    run.assert_grads(p, softmax(p))
    p = problem(n, n + 10, 16, program, dtype=run.dtypes[0])
    bias = torch.zeros(n)
    bias[4] = value
    run.assert_sweeps(dataclasses.replace(p, row_bias=bias))


def test_nan_weight_stays_in_its_row(run):
    """float16 too, where weights are lifted by what is the largest of them."""
    for dtype in run.dtypes:
        p = problem(run.tile + 12, run.tile + 22, 16, dtype=dtype)
        c = softmax(p, cols=False)
        c.row_weight[0, 3] = torch.nan
        got = run.backend.grad(p, c, Needs(x=True))
        assert got.dx[3].isnan().all() and got.dx.isnan().any(1).sum() == 1


@pytest.mark.parametrize("weight", [1e-9, 1e-4, 1e6])
def test_large_and_small_weights_neither_flush_nor_overflow(weight, run):
    for dtype in run.dtypes:
        for program in ("all", "by_label"):
            p = problem(64, 70, 16, program, dtype=dtype)
            run.assert_grads(p, softmax(p, weight=weight))
        p = problem(64, 70, 16, dtype=dtype)
        run.assert_grads(p, Sigmoid(torch.randn(64) * weight))
        assert not run.backend.grad(p, softmax(p, weight=0.0), Needs(x=True, y=True)).dx.any()


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("highest", [-20.0, -4.2, -4.1, 3.0])
def test_sigmoid_far_below_zero(scale, highest, run):
    """Whole warps without a logit above -6 bits, -4.16, take shorter polynomials; one logit above it, and they do not."""
    p = problem(128, 128, 16, dtype=run.dtypes[0], scale=scale)
    row_bias = torch.full((128,), -20.0)
    p = dataclasses.replace(p, x=p.x * 0.1, row_bias=row_bias)
    p.x[40] = 0.0
    row_bias[40] = highest  # of the second warp
    c = Sigmoid(torch.rand(128) + 0.5)
    got, ref = run.assert_grads(p, c, need_bias=True), gradients(p, c)[0]
    for name in ("row_sum", "g_rows"):  # relative to each row: those far below would be lost beside the others
        assert ((getattr(got, name) - ref[name]) / ref[name]).abs().max() < 2e-6, name


def test_sigmoid_of_nan_and_infinite_logits_far_below_zero(run):
    p = problem(128, 128, 16, dtype=run.dtypes[0], scale=1.0)
    p = dataclasses.replace(p, x=p.x * 0.1, row_bias=torch.full((128,), -20.0))
    p.row_bias[3], p.row_bias[5], p.row_bias[70] = torch.nan, -torch.inf, torch.inf
    run.assert_grads(p, Sigmoid(torch.ones(128)), need_bias=True)


@pytest.mark.parametrize("program", CLASSES)
def test_probabilities_of_large_logits_sum_to_one(program, run):
    """Logits of 150 with biases: rounded there, sweep and grad would each be off by 8e-6, and differ."""
    n, m = run.tile + 12, run.tile + 22
    p = problem(n, m, 16, program, dtype=run.dtypes[0], bias=True)
    unit = normalize(p.x[0].double(), dim=0) * 1.2
    x, y = unit.repeat(n, 1).to(p.x.dtype), (unit * torch.linspace(-0.5, 1, m)[:, None]).to(p.x.dtype)
    p = dataclasses.replace(p, x=x, y=y, logit_scale=torch.tensor([100.0]))
    s = run.backend.sweep(p, need_cols=True, keep=False)
    rows, cols = (lse.of_top(torch.ones_like(lse.top)) for lse in (s.row, s.col))
    one_way = run.backend.grad(p, Softmax(rows, s.row.top), Needs(row_bias=True))
    both = run.backend.grad(p, Softmax(0 * rows, s.row.top, cols, s.col.top), Needs(col_bias=True))
    for sums, lse in ((one_way.g_rows, s.row), (both.g_cols, s.col)):
        expected = (lse.top > -torch.inf).sum(0)  # one for each class of which a line has pairs
        assert (sums - expected).abs().max() < 2e-6 * p.classes


def test_softplus_is_accurate_in_its_tail(run):
    """One column: no sum to hide behind. From e^s down to 1e-37 and up to s itself."""
    for dtype in run.dtypes:
        s = torch.linspace(-85, 200, 400).to(dtype)
        row = run.backend.sweep_softplus(Problem(s[:, None], torch.ones(1, 1, dtype=dtype), torch.ones(1)))
        ref = torch.nn.functional.softplus(s.double(), threshold=100)
        assert ((row.double() - ref).abs() <= 2e-7 * ref * (2 + s.double().abs())).all()  # exp(s) = 2^(s log2 e) loses |s| ulps


# ---- blocks, symmetry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
def test_blocks_give_the_whole(program, run):
    """A workspace of a few tiles: blocks are split along the rows and along the columns, and add up."""
    for dtype in run.dtypes:
        N, M, cells = 2 * run.tile + 24, 2 * run.tile + 14, run.tile**2
        p = problem(N, M, 16, program, dtype=dtype, bias=True)
        assert len(list(tiled.blocks(p, cells, run.tile))) == 9  # three times three
        run.assert_sweeps(p, workspace=1024)
        run.assert_grads(p, softmax(p), workspace=cells * p.x.itemsize, need_bias=True)
        if program != "by_label":
            run.assert_grads(p, Sigmoid(torch.randn(N)), workspace=cells * p.x.itemsize, need_bias=True)
            assert_close(run.backend.sweep_softplus(p, **run.within(1024)), softplus_sums(p), 1e-6)


@pytest.mark.parametrize("workspace", [2**29, 4096], ids=["one block", "blocks"])
@pytest.mark.parametrize("program", CLASSES)
def test_triangular(program, workspace, run):
    """Half of S is computed, all of it counts: 1 to 5 tiles along the diagonal, odd and even, ragged and not."""
    T = run.tile
    for dtype in run.dtypes:
        for N in (1, T - 1, T, 2 * T + 6, 4 * T, 4 * T + 22):
            p = problem(N, N, 16, program, triangular=True, dtype=dtype)
            run.assert_sweeps(p, workspace=workspace)
            run.assert_grads(p, softmax(p), workspace=workspace)


@pytest.mark.parametrize("workspace", [2**29, 1024], ids=["one block", "blocks"])
def test_deviations_of_the_positives_from_a_center(workspace, run):
    """Logits of 1e4: the deviation keeps what their sum would round away."""
    T = run.tile
    for N, M in ((1, 1), (T - 1, T - 1), (2 * T + 6, 2 * T + 6), (T + 12, 2 * T + 44), (2 * T + 1, T - 1)):
        p = problem(N, M, 16, "by_label", triangular=N == M, dtype=run.dtypes[0], scale=300.0)
        s, _, positive = logits(p)
        centers = [(s.masked_fill(~positive, 0).sum(k) / positive.sum(k).clamp(min=1)).float() for k in (1, 0)]
        p = dataclasses.replace(p, center=centers[0], col_center=None if p.triangular else centers[1])
        got = run.assert_sweeps(p, workspace=workspace)
        assert got.deviation.dtype == torch.float64 and (got.col_deviation is None) == p.triangular
        allowed = 1e-6 * max(N, M) * s[s.isfinite()].abs().max().item() if N > 1 else 0
        for k, deviation in ((1, got.deviation), (0, got.col_deviation)):
            if deviation is not None:
                ref = torch.where(positive, s - centers[1 - k].double().unsqueeze(k), 0.0).sum(k)
                assert_close(deviation, ref, allowed, "rows" if k else "columns", relative=False)
