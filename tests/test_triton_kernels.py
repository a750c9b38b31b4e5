"""The Triton kernels, through the backend's sweep and grad, against the formulas of engine/problem.py in dense float64."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("these tests are for the interpreter", allow_module_level=True)

from interpreter import reversed_programs

from flashcl.backends import tiled
from flashcl.backends import triton as backend
from flashcl.engine.problem import CLASSES, Needs, Problem, Sigmoid, Softmax
from flashcl.triton_kernels import grad as grad_module
from flashcl.triton_kernels import sweep as sweep_module
from flashcl.triton_kernels.config import Tile
from flashcl.triton_kernels.tile import operands

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 70, 8), (33, 31, 5), (70, 45, 40), (64, 96, 200)]  # (N, M, D)
POINTERS, DESCRIPTORS = Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1, tma=True)
WIDE, TALL = Tile(16, 64, 16, 4, 1, tma=True, GROUP=2), Tile(64, 16, 64, 4, 1, GROUP=3)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan(tile=POINTERS, workspace=2**20, square=None):
    return backend.Plan(tile, square or dataclasses.replace(tile, BN=32, BM=32), workspace)


def problem(N, M, D, dtype=torch.float32, program="all", *, scale=0.5, bias=False, triangular=False, seed=0, classes=4):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g)

    def vectors(size, first):
        ids = torch.arange(size, dtype=torch.int32) + first
        labels = torch.randint(classes, (size,), generator=g, dtype=torch.int32) * 2**28 - 2**29  # any int32
        return (ids, labels)[: {"all": 0, "different": 1, "by_label": 2}[program]]

    x = random(N, D).to(dtype)
    y = x if triangular else random(M, D).to(dtype)
    rows = vectors(N, 0)
    cols = rows if triangular else vectors(M, 3)
    row_bias, col_bias = (random(N), random(1).expand(M)) if bias else (None, None)
    return Problem(x, y, torch.tensor([scale]), row_bias, col_bias, program, rows, cols, triangular=triangular)


# ---- the formulas, dense and in float64 ----------------------------------------------------------------------------------


def dropped_pairs(p):
    if p.program == "all":
        return torch.zeros(len(p.x), len(p.y), dtype=torch.bool)
    return p.rows[0][:, None] == p.cols[0]


def dense_logits(p):
    """s (N, M) with -inf where a pair is dropped, and whether a pair is positive."""
    s = p.x.double() @ p.y.double().T * p.logit_scale.double()
    if p.row_bias is not None:
        s = s + p.row_bias.double()[:, None]
    if p.col_bias is not None:
        s = s + p.col_bias.double()
    dropped = dropped_pairs(p)
    positive = (p.rows[1][:, None] == p.cols[1]) & ~dropped if p.program == "by_label" else torch.zeros_like(dropped)
    return s.masked_fill(dropped, -torch.inf), positive


def members(p):
    s, positive = dense_logits(p)
    return [s] if p.classes == 1 else [s.masked_fill(positive, -torch.inf), s.masked_fill(~positive, -torch.inf)]


def dense_sweep(p):
    classes = members(p)
    return torch.stack([s.logsumexp(1) for s in classes]), torch.stack([s.logsumexp(0) for s in classes])


def dense_g(p, c):
    s, positive = dense_logits(p)
    if isinstance(c, Sigmoid):
        return c.row_weight.double()[:, None] * s.sigmoid()
    row = c.row_weight, c.row_top, c.row_offset
    col = row if p.triangular else (c.col_weight, c.col_top, c.col_offset)
    g = torch.zeros_like(s)
    for k, member in enumerate([~positive, positive][: p.classes]):
        for (weight, top, offset), axis in ((row, 1), (col, 0)):
            if weight is None:
                continue
            weight, top = weight[k].double().unsqueeze(axis), top[k].double().unsqueeze(axis)
            term = torch.where(top == -torch.inf, 0.0, weight * (s - top).exp())
            if k == 1 and offset is not None:
                term = term - offset.double().unsqueeze(axis)
            g += torch.where(member, term, 0.0)
    return g.masked_fill(dropped_pairs(p), 0.0)


def softmax(p, *, cols=True, seed=1, weight=1.0):
    """Coefficients with random weights, some of them 0, and the true log-sum-exps."""
    g = torch.Generator().manual_seed(seed)
    row_top, col_top = (lse.float() for lse in dense_sweep(p))

    def random(*shape):
        w = torch.randn(shape, generator=g) * weight
        return torch.where(torch.rand(shape, generator=g) < 0.2, 0.0, w)

    N, M, K = len(p.x), len(p.y), p.classes
    row_weight, col_weight = random(K, N), random(K, M)
    row_offset, col_offset = (0.1 * random(N), 0.1 * random(M)) if K == 2 else (None, None)
    if p.triangular or not cols:
        return Softmax(row_weight, row_top, row_offset=row_offset)
    return Softmax(row_weight, row_top, col_weight, col_top, row_offset, col_offset)


# ---- comparisons ---------------------------------------------------------------------------------------------------------


def assert_close(out, ref, tolerance, what="", relative=True):
    """The same infinities and NaNs, and elsewhere an error below the tolerance (relative: of the largest value)."""
    assert out.shape == ref.shape, what
    assert torch.equal(out.isnan(), ref.isnan()), f"{what}: NaN elsewhere than in the reference"
    infinite = ref.isinf()
    assert torch.equal(out.isinf(), infinite) and torch.equal(out[infinite].sign(), ref[infinite].to(out.dtype).sign()), what
    finite = ref.isfinite()
    if finite.any():
        error = (out.double() - ref)[finite].abs().max().item()
        bound = tolerance * (max(ref[finite].abs().max().item(), 1e-30) if relative else 1)
        assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


def check_sweep(p, tile=POINTERS, *, need_cols=True, tolerance=2e-6, **options):
    """tolerance: of the largest logit, whose own rounding nothing can undo."""
    got = backend.sweep(p, need_cols=need_cols, plan=plan(tile, **options))
    finite = [s[s.isfinite()] for s in members(p)]
    largest = max([1.0, *(s.abs().max().item() for s in finite if len(s))])
    assert (got.col is None) == (p.triangular or not need_cols)
    for out, ref in zip((got.row, got.col), dense_sweep(p)):
        if out is None:
            continue
        assert out.top.dtype == out.rest.dtype == torch.float32
        assert torch.equal(out.top == -torch.inf, ref == -torch.inf)
        assert (out.rest.abs() <= 2**-24 * out.top.abs()).logical_or(~ref.isfinite()).all()
        assert_close(out.value(), ref, tolerance * largest, relative=False)
    return got


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}  # of the largest element


def check_grad(p, c, tile=POINTERS, *, need_bias=False, tolerance=None, **options):
    exact = tolerance is None  # sums of G before it is rounded
    tolerance = tolerance or TOLERANCE[p.x.dtype]
    got = backend.grad(p, c, Needs(x=True, y=True, row_bias=need_bias, col_bias=need_bias, scale=True), plan=plan(tile, **options))
    g = dense_g(p, c)
    x, y = p.x.double(), p.y.double()
    if p.triangular:
        g = g + g.T if isinstance(c, Sigmoid) else g
        assert got.dy is None
    else:
        assert_close(got.dy, g.T @ x, tolerance, "dy")
    assert_close(got.dx, g @ y, tolerance, "dx")
    terms = g * (x @ y.T)  # of a triangular problem g is G + G^T
    d_scale = terms.sum() / (2 if p.triangular else 1)
    if d_scale.isfinite():
        assert abs(got.d_scale - d_scale) <= (2e-5 if exact else tolerance) * terms.abs().sum() + 1e-30, "d_scale"
    else:
        assert not got.d_scale.isfinite()
    if need_bias:
        assert_close(got.g_rows, g.sum(1), 2e-5, "g_rows")
        assert_close(got.g_cols, g.sum(0), 2e-5, "g_cols")
    if isinstance(c, Sigmoid):
        s, _ = dense_logits(p)
        row_sum = (c.row_weight.double()[:, None] * torch.nn.functional.softplus(s, threshold=50)).sum(1)
        assert_close(got.row_sum, row_sum, 2e-6, "row_sum")
    return got


class Spy:
    """Counts the calls of a device function."""

    def __init__(self, monkeypatch, module, name):
        self.calls, original = 0, getattr(module, name)

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)


# ---- programs, dtypes, tiles, shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS, WIDE, TALL], ids=["pointers", "descriptors", "wide", "tall"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_sweep_and_grad(program, dtype, tile):
    for N, M, D in SHAPES:
        p = problem(N, M, D, dtype, program, scale=2 / math.sqrt(D), bias=D == 40)
        check_sweep(p, tile)
        check_grad(p, softmax(p), tile, need_bias=D == 40)


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_and_sigmoid(dtype, tile):
    for N, M, D in SHAPES:
        p = problem(N, M, D, dtype, scale=4 / math.sqrt(D), bias=True)
        s, _ = dense_logits(p)
        assert_close(backend.sweep_softplus(p, plan=plan(tile)), torch.nn.functional.softplus(s, threshold=50).sum(1), 1e-6)
        check_grad(p, Sigmoid(torch.randn(N)), tile, need_bias=True)


@pytest.mark.parametrize("program", CLASSES)
def test_one_direction(program):
    p = problem(70, 45, 40, program=program)
    check_sweep(p, need_cols=False)
    check_grad(p, softmax(p, cols=False))


def test_only_what_is_asked_for():
    p = problem(40, 50, 16)
    c = softmax(p)
    got = backend.grad(p, c, Needs(y=True), plan=plan())
    assert got.dx is None and got.g_rows is None and got.row_sum is None and got.dy is not None
    got = backend.grad(p, c, Needs(row_bias=True, col_bias=True), plan=plan())
    assert got.dx is None and got.dy is None
    assert_close(got.g_rows, dense_g(p, c).sum(1), 2e-5)


def test_no_rows_or_no_columns():
    for N, M in ((0, 5), (5, 0)):
        p = problem(N, M, 8, program="different")
        got = backend.sweep(p, need_cols=True)
        row, col = got.row.value(), got.col.value()
        assert row.shape == (1, N) and col.shape == (1, M) and (row == -torch.inf).all() and (col == -torch.inf).all()
        c = Softmax(torch.ones(1, N), got.row.top, torch.ones(1, M), got.col.top)
        got = backend.grad(p, c, Needs(x=True, y=True, row_bias=True, col_bias=True, scale=True))
        assert got.dx.shape == (N, 8) and got.dy.shape == (M, 8) and not got.dx.any() and not got.dy.any()


def test_which_tensors_descriptors_can_load():
    def through_descriptors(x):
        return operands(x, x, DESCRIPTORS)[2]

    x = torch.zeros(64, 24)
    assert through_descriptors(x) and through_descriptors(x[:, 4:20]) and through_descriptors(x[1:])
    assert not through_descriptors(x[:, 1:21])  # base
    assert not through_descriptors(torch.zeros(64, 5))  # row length
    assert not through_descriptors(x[:1].expand(64, 24))  # stride 0
    assert not operands(x, x, POINTERS)[2]


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_strides(tile):
    """Transposed, sliced, shifted and broadcast inputs are what their elements are."""
    base = problem(40, 50, 24, program="different")
    wide = torch.randn(40, 80)
    views = torch.randn(24, 40).T, wide[:, 3:27], wide[:, ::2][:, :24], torch.randn(1, 24).expand(40, 24), wide[:, 16:40]
    for x in views:
        p = dataclasses.replace(base, x=x, rows=(torch.arange(80, dtype=torch.int32)[::2],))
        check_sweep(p, tile)
        check_grad(p, softmax(p), tile)


def test_rows_beyond_int32():
    """Row offsets of 2^31 elements and more, in memory that is never touched in between."""
    stride = 2**21
    x = torch.empty(0, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # nobody fills 4 GiB with NaN
    x = torch.empty(1050 * stride, dtype=torch.float16).as_strided((1050, 16), (stride, 1))
    x[:] = torch.randn(1050, 16)
    p = problem(1050, 8, 16, torch.float16)
    p = dataclasses.replace(p, x=x)
    assert backend._loadable(p).x is x
    check_sweep(p, Tile(256, 16, 16, 4, 1))


# ---- hard values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
def test_one_exp_where_it_is_safe(program, monkeypatch):
    """Logits of ordinary size never need the careful branches; the positives that most lines lack are no reason either."""
    own = Spy(monkeypatch, sweep_module, "own_sums")
    apart = Spy(monkeypatch, grad_module, "weighted_exp")
    p = problem(96, 96, 32, program=program, scale=0.2, classes=20)
    check_sweep(p)
    check_grad(p, softmax(p))
    assert own.calls == 0 and apart.calls == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_wild_logits(program, dtype, monkeypatch):
    """Logits up to 1e4: rows and columns of one tile whose maxima are thousands apart."""
    own = Spy(monkeypatch, sweep_module, "own_sums")
    apart = Spy(monkeypatch, grad_module, "weighted_exp")
    p = problem(70, 50, 16, dtype, program, scale=30.0)
    p = dataclasses.replace(p, x=(p.x * torch.logspace(-3, 1.4, 70)[:, None]).to(dtype))
    assert 5e3 < p.x.double().mm(p.y.double().T).mul(30).abs().max() < 2e4
    check_sweep(p)
    check_grad(p, softmax(p), tolerance=max(TOLERANCE[dtype], 5e-3))  # float32 logits of 1e4 are uncertain by 1e-3
    assert own.calls > 0 and apart.calls > 0


@pytest.mark.parametrize("dtype, shared, apart", [(torch.bfloat16, 55, 70), (torch.float32, 10, 20)], ids=str)
def test_threshold_of_the_shared_shift(dtype, shared, apart, monkeypatch):
    """Rows from 0 to 120 nats below the rest of their tile: right on both sides of the threshold, and both are seen."""
    own = Spy(monkeypatch, sweep_module, "own_sums")
    taken = {}
    for depth in (0, 10, 20, 40, 55, 62, 63, 70, 86, 88, 100, 104, 120, 1000):
        p = problem(32, 32, 16, dtype)
        bias = torch.zeros(32)
        bias[5] = -depth
        before = own.calls
        check_sweep(dataclasses.replace(p, row_bias=bias), tolerance=2e-7)
        taken[depth] = own.calls > before
        c = softmax(dataclasses.replace(p, row_bias=bias))
        check_grad(dataclasses.replace(p, row_bias=bias), c)
    assert list(taken.values()) == sorted(taken.values()) and not taken[shared] and taken[apart]


def test_spread_of_log_sum_exps(monkeypatch):
    """The gradient on both sides of the threshold between one exp and two."""
    apart = Spy(monkeypatch, grad_module, "weighted_exp")
    taken = []
    for depth in (0, 1, 50, 100, 1000):
        p = problem(32, 32, 16)
        p = dataclasses.replace(p, row_bias=torch.where(torch.arange(32) < 16, -float(depth), 0.0))
        before = apart.calls
        check_grad(p, softmax(p), need_bias=True)
        taken.append(apart.calls > before)
    assert taken == [False, False, True, True, True]


def test_lines_without_pairs():
    """Biases of -inf, and ids that leave a row or a column nothing: log-sum-exp -inf, gradient 0, neighbours unharmed."""
    p = problem(40, 50, 16, program="by_label")
    row_bias, col_bias = torch.randn(40), torch.randn(50)
    row_bias[[0, 33]] = -torch.inf
    col_bias[[7, 49]] = -torch.inf
    p = dataclasses.replace(p, row_bias=row_bias, col_bias=col_bias)
    check_sweep(p)
    everyone = dataclasses.replace(p, program="all", rows=(), cols=())
    got = check_grad(everyone, softmax(everyone))
    assert not got.dx[[0, 33]].any() and not got.dy[[7, 49]].any()

    same = torch.zeros(40, dtype=torch.int32)  # every pair dropped
    p = dataclasses.replace(problem(40, 40, 16, program="different"), rows=(same,), cols=(same,))
    check_sweep(p)
    c = softmax(p)
    got = check_grad(dataclasses.replace(p), dataclasses.replace(c, row_weight=torch.full_like(c.row_weight, torch.nan)))
    assert not got.dx.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_inputs_come_out_where_they_belong(value):
    for program in ("all", "different"):
        p = problem(40, 50, 16, program=program)
        p.x[35, 3] = value
        check_sweep(p)
        check_grad(p, softmax(p))
    p = problem(40, 50, 16)
    bias = torch.zeros(40)
    bias[4] = value
    check_sweep(dataclasses.replace(p, row_bias=bias))


def test_nan_weight_stays_in_its_row():
    p = problem(40, 50, 16, torch.float16)
    c = softmax(p)
    c.row_weight[0, 3] = torch.nan
    c = dataclasses.replace(c, col_weight=None, col_top=None)
    got = backend.grad(p, c, Needs(x=True), plan=plan())
    assert got.dx[3].isnan().all() and got.dx.isnan().any(1).sum() == 1


@pytest.mark.parametrize("weight", [1e-9, 1e-4, 1e6])
def test_half_precision_neither_flushes_nor_overflows(weight):
    for program in ("all", "by_label"):
        p = problem(64, 70, 16, torch.float16, program)
        check_grad(p, softmax(p, weight=weight))
    check_grad(p, Sigmoid(torch.randn(64) * weight))
    zero = softmax(p, weight=0.0)
    assert not backend.grad(p, zero, Needs(x=True, y=True), plan=plan()).dx.any()


def test_softplus_is_accurate_in_its_tail():
    """One column: no sum to hide behind. From e^s down to 1e-40 and up to s itself."""
    s = torch.linspace(-85, 200, 400)
    p = Problem(s[:, None], torch.ones(1, 1), torch.ones(1))
    row = backend.sweep_softplus(p, plan=plan())
    ref = torch.nn.functional.softplus(s.double(), threshold=100)
    assert ((row.double() - ref).abs() <= 2e-7 * ref * (2 + s.abs())).all()  # exp(s) = 2^(s log2 e) loses |s| ulps


# ---- blocks, order, symmetry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_give_the_whole(dtype, program):
    """A workspace of a few tiles: blocks are split along the rows and along the columns, and add up."""
    p = problem(70, 100, 16, dtype, program, bias=True)
    small = 64 * 64 * p.x.itemsize
    blocks = list(tiled.blocks(p, 64 * 64, plan().step()))
    assert len({i.start for i, _ in blocks}) > 1 and len({j.start for _, j in blocks}) > 1
    check_sweep(p, workspace=1024)
    check_grad(p, softmax(p), workspace=small, need_bias=True)
    check_grad(p, Sigmoid(torch.randn(70)), workspace=small, need_bias=True)
    row = backend.sweep_softplus(p, plan=plan(workspace=1024))
    assert_close(row, torch.nn.functional.softplus(dense_logits(p)[0], threshold=50).sum(1), 1e-6)


def test_blocks_are_bounded_and_cover_the_matrix_once():
    for N, M in ((1, 1), (1, 10**6), (10**6, 1), (65536, 65536), (10**6, 10**6), (4096, 10**6), (16385, 16384), (0, 3)):
        x, y = torch.empty(1, 1).expand(N, 1), torch.empty(1, 1).expand(M, 1)
        for triangular in {False, N == M}:
            p = Problem(x, y, torch.ones(1), triangular=triangular)
            blocks = list(tiled.blocks(p, 2**28, tile=128))
            cells = [(i.stop - i.start) * (j.stop - j.start) for i, j in blocks]
            assert all(c <= 2**28 for c in cells)
            off_diagonal = sum(c for c, (i, j) in zip(cells, blocks) if i != j)
            assert sum(cells) + (off_diagonal if triangular else 0) == N * M
            assert all(i.start % 128 == 0 and j.start % 128 == 0 for i, j in blocks)


@pytest.mark.parametrize("program", CLASSES)
def test_programs_in_any_order_give_the_same_bits(program):
    small = plan(workspace=4096)

    def everything():
        out = []
        for triangular in (False, True):
            p = problem(70, 70, 16, torch.bfloat16, program, triangular=triangular)
            stats = backend.sweep(p, need_cols=True, plan=plan(workspace=4096))
            out += [v for lse in (stats.row, stats.col) if lse is not None for v in (lse.top, lse.rest)]
            got = backend.grad(p, softmax(p), Needs(x=True, y=True, row_bias=not triangular, col_bias=not triangular, scale=True), plan=small)
            out += [got.dx, got.dy, got.g_rows, got.g_cols, got.d_scale]
        return [t for t in out if t is not None]

    forward = everything()
    with reversed_programs():
        backward = everything()
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("workspace", [2**20, 4096], ids=["one block", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_triangular(program, dtype, workspace):
    """Half of S is computed, all of it counts: 1 to 5 tiles along the diagonal, odd and even, ragged and not."""
    for N in (1, 31, 64, 70, 128, 150):
        p = problem(N, N, 16, dtype, program, triangular=True)
        check_sweep(p, workspace=workspace)
        check_grad(p, softmax(p), workspace=workspace)


@pytest.mark.parametrize("workspace", [2**20, 4096], ids=["one block", "blocks"])
def test_deviations_of_the_positives_from_a_center(workspace):
    """Logits of 1e4: the deviation keeps what their sum would round away."""
    for N in (1, 31, 70, 150):
        p = problem(N, N, 16, program="by_label", triangular=True, scale=300.0)
        s, positive = dense_logits(p)
        center = (s.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)).float()
        p = dataclasses.replace(p, center=center)
        got = check_sweep(p, workspace=workspace)
        ref = torch.where(positive, s - center.double()[:, None], 0.0).sum(1)
        assert got.deviation.dtype == torch.float64
        assert_close(got.deviation, ref, 1e-6 * N * s[s.isfinite()].abs().max().item() if N > 1 else 0, relative=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_in_tiles(dtype, generator):
    """Of rows with any stride: whole and ragged tiles, one and several, partners beyond the edge; of many rows a sample."""
    for N, shift in ((1, 0), (31, 0), (64, 3), (150, 149), (1100, 0), (2100, 100)):
        x, y = (torch.randn(3 * N, 20, generator=generator).to(dtype)[::3] for _ in range(2))
        rows, got = backend.products_in_tiles(x, y, shift)
        exact = (x.double() * y.roll(-shift, 0).double()).sum(1)[: N - shift][rows]
        assert got.dtype == torch.float64 and got.shape == exact.shape
        assert min(N - shift, 550) <= len(got) <= 1024
        assert_close(got, exact, 1e-6)


def test_triangular_walks_half_of_the_tiles(monkeypatch):
    tiles = Spy(monkeypatch, sweep_module, "product")
    check_sweep(problem(160, 160, 16, triangular=True))
    assert tiles.calls == 5 * 6 // 2


def test_unusable():
    assert backend.unusable(torch.device("cpu"), torch.float32) is None
    assert "float64" in backend.unusable(torch.device("cpu"), torch.float64)


# ---- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, M, D, shift", [(1, 1, 1, 0), (6, 6, 33, 3), (5, 9, 300, 0), (7, 7, 256, 6)])
def test_products_with_partners(N, M, D, shift, dtype):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, D, generator=g).to(dtype) for n in (N, M))
    want = (x.double() * y.double().roll(-shift, 0)[:N]).sum(1)
    for a, b in ((x, y), (x.T.contiguous().T, torch.cat([y, y], 1)[:, :D])):  # any strides
        got = backend.partner_products(a, b, shift)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R, C, n, D, shift", [(1, 1, 1, 1, 0), (6, 6, 6, 33, 3), (9, 5, 5, 300, 0), (5, 9, 5, 256, 8)])
def test_the_last_step_of_a_gradient(R, C, n, D, shift, dtype):
    g = torch.Generator().manual_seed(0)
    acc, other, weight = torch.randn(R, D, generator=g), torch.randn(C, D, generator=g).to(dtype), torch.randn(n, generator=g)
    partner = other.double()[(torch.arange(n) + shift) % C]
    want = acc.double()
    want[:n] += weight.double()[:, None] * partner
    for positive, expected in (((other, weight, shift), want), ((None, None, 0), acc.double())):
        expected = 0.3 * expected
        out = torch.full((R, D), torch.nan, dtype=dtype)
        backend.finish(acc, *positive, torch.tensor([0.3]), out)
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        in_place = acc.clone()
        backend.finish(in_place, *positive, torch.tensor([0.3]), in_place)
        torch.testing.assert_close(in_place.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_ends_with_its_own_nan_only():
    acc, other, weight = torch.ones(4, 3), torch.ones(4, 3), torch.ones(3)
    acc[0, 1], other[2, 0], weight[2] = torch.nan, torch.inf, torch.nan
    backend.finish(acc, other, weight, 1, torch.ones(1), acc)
    nan = torch.tensor([[False, True, False], [False] * 3, [True] * 3, [False] * 3])
    assert torch.equal(acc.isnan(), nan) and acc[1, 0] == torch.inf and (acc[3] == 1).all()
