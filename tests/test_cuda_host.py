"""The CUDA backend without a GPU, twice.

emulated: csrc/emulate.cpp does to tiles of a CPU product what the kernels do to those of the tensor cores, lane by lane, and
flashcl.backends.cuda takes CPU tensors through it.
ptx: the kernels themselves, as PTX, on a simulated GPU (ptx/). test_cuda_ptx.py has what is of it alone.
"""

import dataclasses
import math
import sys

import numpy
import pytest
import torch
from hypothesis import given, strategies as st

_C = pytest.importorskip("flashcl._C", reason="flashcl._C was not built: no nvcc, or no CUTLASS headers")

import ptx
from world import run_world

import flashcl
from flashcl.backends import cuda as backend, tiled, torch as reference
from flashcl.contract import LOSSES, case, check, evaluate, violations
from flashcl.engine import ops
from flashcl.engine.problem import CLASSES, Needs, Problem, Sigmoid, Softmax

TILE = _C.TILE
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 200, 8),
    (130, 127, 5),
    (128, 128, 40),
    (300, 260, 72),
]  # (N, M, D): 1 to 3 tiles, ragged or not

pytestmark = pytest.mark.usefixtures("poison", "low_strips")


@pytest.fixture
def low_strips(monkeypatch):
    """Small problems in several strips, as large ones are."""
    monkeypatch.setattr(backend, "_LOWEST_STRIP", TILE)


@pytest.fixture(params=["emulated", "ptx"], scope="module", autouse=True)
def kernels(request):
    if request.param == "emulated":
        yield request.param
        return
    machine = ptx.machine()
    if isinstance(machine, str):
        pytest.skip(machine)
    with pytest.MonkeyPatch.context() as patch:
        for module in (backend, sys.modules[__name__]):
            patch.setattr(module, "_C", machine.module)
        yield request.param


def problem(
    N, M, D, dtype=torch.bfloat16, program="all", *, scale=0.5, bias=False, triangular=False, seed=0, classes=4
):
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


def in_float64(p):
    """The same problem, for the torch backend: its results are exact beside those of 16 bits."""

    def wide(v):
        return None if v is None else v.double()

    x = p.x.double()
    return dataclasses.replace(
        p, x=x, y=x if p.triangular else p.y.double(), logit_scale=p.logit_scale.double(),
        row_bias=wide(p.row_bias), col_bias=wide(p.col_bias), center=wide(p.center), col_center=wide(p.col_center),
    )  # fmt: skip


def wide_coefficients(c):
    """Softmax or Sigmoid coefficients in float64."""

    def wide(v):
        return None if v is None else v.double()

    return type(c)(**{f.name: wide(getattr(c, f.name)) for f in dataclasses.fields(c)})


def softmax(p, *, cols=True, seed=1, weight=1.0):
    """Coefficients with random weights, some of them 0, and the true log-sum-exps."""
    g = torch.Generator().manual_seed(seed)
    statistics = reference.sweep(in_float64(p), need_cols=True, keep=False)

    def random(*shape):
        w = torch.randn(shape, generator=g) * weight
        return torch.where(torch.rand(shape, generator=g) < 0.2, 0.0, w)

    N, M, K = len(p.x), len(p.y), p.classes
    row_weight, col_weight = random(K, N), random(K, M)
    row_offset, col_offset = (0.1 * random(N), 0.1 * random(M)) if K == 2 else (None, None)
    if p.triangular or not cols:
        return Softmax(row_weight, statistics.row.top.float(), row_offset=row_offset, about=torch.tensor([0.3]))
    row_top, col_top = (lse.top.float() for lse in (statistics.row, statistics.col))
    return Softmax(row_weight, row_top, col_weight, col_top, row_offset, col_offset, torch.tensor([0.3]))


def assert_close(out, ref, tolerance, what="", relative=True):
    """The same infinities and NaNs, and elsewhere an error below the tolerance (relative: of the largest value)."""
    assert out.shape == ref.shape, what
    assert torch.equal(out.isnan(), ref.isnan()), f"{what}: NaN elsewhere than in the reference"
    infinite = ref.isinf()
    assert torch.equal(out.isinf(), infinite) and torch.equal(
        out[infinite].sign(), ref[infinite].to(out.dtype).sign()
    ), what
    finite = ref.isfinite()
    if finite.any():
        error = (out.double() - ref)[finite].abs().max().item()
        bound = tolerance * (max(ref[finite].abs().max().item(), 1e-30) if relative else 1)
        assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


def check_sweep(p, *, need_cols=True, tolerance=2e-6, **options):
    got = backend.sweep(p, need_cols=need_cols, **options)
    ref = reference.sweep(in_float64(p), need_cols=need_cols, keep=False)
    assert (got.col is None) == (ref.col is None)
    for out, want in ((got.row, ref.row), (got.col, ref.col)):
        if want is None:
            continue
        want = want.value()
        largest = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0)
        assert out.top.dtype == out.rest.dtype == torch.float32
        assert ((out.rest.abs() <= 2**-24 * out.top.abs()) | ~want.isfinite()).all()
        assert torch.equal(out.top == -torch.inf, want == -torch.inf)
        assert_close(out.value(), want, tolerance * largest, relative=False)
    return got, ref


TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}  # of the largest element


def check_grad(p, c, *, need_bias=False, tolerance=None, **options):
    exact, tolerance = tolerance is None, tolerance or TOLERANCE[p.x.dtype]
    wanted = Needs(x=True, y=True, row_bias=need_bias, col_bias=need_bias, scale=True)
    got = backend.grad(p, c, wanted, **options)
    ref = reference.grad(in_float64(p), wide_coefficients(c), wanted)
    assert (got.dy is None) == p.triangular
    for name in ("dx", "dy"):
        if getattr(got, name) is not None:
            assert_close(getattr(got, name), getattr(ref, name), tolerance, name)
    # Of a triangular problem half the terms may cancel the others: measured by the size of a gradient times a vector.
    size = (ref.dx.abs() * p.x.double().abs()).sum() + 1e-30
    if ref.d_scale.isfinite():
        assert abs(got.d_scale - ref.d_scale) <= (2e-5 if exact else tolerance) * size, "d_scale"
    else:
        assert not got.d_scale.isfinite()
    of_g = 2e-5 if exact else tolerance / 20  # before G is rounded
    for name, allowed in (("g_rows", of_g), ("g_cols", of_g), ("row_sum", 2e-6)):
        assert (getattr(got, name) is None) == (
            name != "row_sum" and not need_bias or name == "row_sum" and isinstance(c, Softmax)
        )
        if getattr(got, name) is not None:
            assert_close(getattr(got, name), getattr(ref, name), allowed, name)
    return got


# ---- walks and layouts ---------------------------------------------------------------------------------------------------


@given(tiles_n=st.integers(1, 40), tiles_m=st.integers(1, 40), triangular=st.booleans())
def test_a_walk_meets_every_tile_once(tiles_n, tiles_m, triangular):
    tiles_m = tiles_n if triangular else tiles_m
    walk = _C.schedule(tiles_n, tiles_m, triangular)
    wanted = [(n, m) for _, _, n, m, counts in walk if counts]
    every = [(n, m) for n in range(tiles_n) for m in range(tiles_m) if not triangular or m >= n]
    assert sorted(wanted) == every
    # Beside them only what pairs, in a triangle squares of two by two, have past the edges and below the diagonal.
    assert len(walk) - len(wanted) <= (2 * tiles_n + 1 if triangular else tiles_m)


@given(tiles_n=st.integers(1, 40), tiles_m=st.integers(1, 40), triangular=st.booleans())
def test_the_ctas_of_a_cluster_share_columns(tiles_n, tiles_m, triangular):
    walk = _C.schedule(tiles_n, tiles_n if triangular else tiles_m, triangular)
    for unit, pair in enumerate(zip(*[iter(walk)] * 2)):
        n, m = pair[0][2:4]
        assert n % 2 == 0
        assert [tile[:4] for tile in pair] == [(unit, 0, n, m), (unit, 1, n + 1, m)]


def test_a_wave_shares_rows_and_columns():
    """The tiles that run together on 132 processors read little of x and y: a square would read 23 of their tiles."""
    walk = _C.schedule(512, 512, False)
    read = []
    for start in range(0, len(walk) - 132, 132):
        wave = walk[start : start + 132]
        read.append(len({n for _, _, n, _, _ in wave}) + len({m for _, _, _, m, _ in wave}))
    assert sum(read) / len(read) < 26 and max(read) < 35  # the largest where one group of rows ends and the next begins


def test_every_accumulator_has_a_place():
    places = _C.fragment()
    assert sorted((row, col) for *_, row, col in places) == [(i, j) for i in range(TILE) for j in range(TILE)]
    for warp in range(4):
        for lane in range(32):
            assert sorted(p for w, l, p, *_ in places if (w, l) == (warp, lane)) == list(range(128))
            break  # all lanes are alike: 128 of 16384 places are enough
    by_row = {}
    for warp, lane, _, row, _ in places:
        by_row.setdefault(row, set()).add((warp, lane // 4))
    assert all(len(quads) == 1 for quads in by_row.values())  # a row lies in one quad of one warp


@pytest.mark.skipif("90a" not in _C.build_info()["architectures"], reason="built without sm_90a")
def test_places_are_where_wgmma_leaves_them():
    assert _C.fragment_is_right()


# ---- programs, dtypes, shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_sweep_and_grad(program, dtype):
    for N, M, D in SHAPES:
        p = problem(N, M, D, dtype, program, scale=2 / math.sqrt(D), bias=D in (5, 72))
        check_sweep(p)
        check_grad(p, softmax(p), need_bias=D == 72)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_and_sigmoid(dtype):
    for N, M, D in SHAPES:
        for program in ("all", "different"):
            p = problem(N, M, D, dtype, program, scale=4 / math.sqrt(D), bias=True)
            assert_close(backend.sweep_softplus(p), reference.sweep_softplus(in_float64(p)), 1e-6)
            check_grad(p, Sigmoid(torch.randn(N)), need_bias=True)


def terms(p, c):
    """sum_j |G_ij y_j| and sum_i |G_ij x_i|, (N, D) and (M, D): what rounding of G is measured by, whatever cancels."""
    q = in_float64(p)
    s = q.x @ q.y.T * q.logit_scale + (0 if q.row_bias is None else q.row_bias[:, None] + q.col_bias)
    g = torch.zeros_like(s)
    for k in range(p.classes):
        row, col = c.row_top.double()[k, :, None], c.col_top.double()[k]
        g += c.row_weight[k, :, None].abs() * (s - row).exp().clamp(max=1) + c.col_weight[k].abs() * (
            s - col
        ).exp().clamp(max=1)
    return g @ q.y.abs(), g.T @ q.x.abs()


@given(
    N=st.integers(1, 300), M=st.integers(1, 300), D=st.integers(1, 40), program=st.sampled_from(list(CLASSES)),
    scale=st.sampled_from([-1.0, 0.0, 0.1, 1.0, 30.0]), bias=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_problem(N, M, D, program, scale, bias, seed):
    p = problem(N, M, D, torch.float16, program, scale=scale / math.sqrt(D), bias=bias, seed=seed)
    check_sweep(p)
    c = softmax(p, seed=seed)
    wanted = Needs(x=True, y=True, scale=True)
    got, ref = backend.grad(p, c, wanted), reference.grad(in_float64(p), wide_coefficients(c), wanted)
    for name, size in zip(("dx", "dy"), terms(p, c)):
        # float16 rounds by 2^-11; offsets of the positives are at most 0.1 times a handful, and logits of 100 uncertain by 1e-5
        assert ((getattr(got, name) - getattr(ref, name)).abs() <= 1e-3 * (size + 1)).all(), name


@pytest.mark.parametrize("program", CLASSES)
def test_one_direction(program):
    p = problem(200, 150, 40, program=program)
    check_sweep(p, need_cols=False)
    check_grad(p, softmax(p, cols=False))


def test_only_what_is_asked_for():
    p = problem(40, 50, 16)
    c = softmax(p)
    got = backend.grad(p, c, Needs(y=True))
    assert got.dx is None and got.g_rows is None and got.row_sum is None and got.d_scale is None and got.dy is not None
    got = backend.grad(p, c, Needs(row_bias=True, col_bias=True))
    assert got.dx is None and got.dy is None and got.g_rows is not None


def test_no_rows_or_no_columns():
    for N, M in ((0, 5), (5, 0)):
        p = problem(N, M, 8, program="different")
        got = backend.sweep(p, need_cols=True)
        row, col = got.row.value(), got.col.value()
        assert row.shape == (1, N) and col.shape == (1, M) and (row == -torch.inf).all() and (col == -torch.inf).all()
        c = Softmax(torch.ones(1, N), got.row.top, torch.ones(1, M), got.col.top)
        got = backend.grad(p, c, Needs(x=True, y=True, row_bias=True, col_bias=True, scale=True))
        assert got.dx.shape == (N, 8) and got.dy.shape == (M, 8) and not got.dx.any() and not got.dy.any()


def test_strides():
    """Transposed, sliced, shifted and broadcast inputs are what their elements are."""
    base = problem(40, 50, 24, program="different")
    wide = torch.randn(40, 80).bfloat16()
    views = [
        torch.randn(24, 40).bfloat16().T,
        wide[:, 3:27],
        wide[:, ::2][:, :24],
        wide[:1, :24].expand(40, 24),
        wide[:, 16:40],
    ]
    assert tiled.aligned(views[-1], 8) is views[-1]
    for x in views:
        p = dataclasses.replace(base, x=x, rows=(torch.arange(80, dtype=torch.int32)[::2],))
        check_sweep(p)
        check_grad(p, softmax(p))


# ---- hard values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_wild_logits(program, dtype):
    """Logits up to 1e4: rows and columns of one tile whose maxima are thousands apart."""
    p = problem(200, 150, 16, dtype, program, scale=30.0)
    p = dataclasses.replace(p, x=(p.x * torch.logspace(-3, 1.4, 200)[:, None]).to(dtype))
    assert 5e3 < p.x.double().mm(p.y.double().T).mul(30).abs().max() < 2e4
    check_sweep(p)
    check_grad(p, softmax(p), tolerance=1e-2)  # float32 logits of 1e4 are uncertain by 1e-3


@pytest.mark.parametrize("program", CLASSES)
@pytest.mark.parametrize("depth", [0, 1, 20, 55, 62, 63, 70, 74, 77, 80, 83, 88, 104, 120, 1000])
def test_lines_far_below_their_tile(program, depth):
    """On both sides of the two thresholds: one top for a warp, one exp for rows and columns."""
    for rows, cols in (([5], []), ([], [7, 130]), ([5], [7, 130])):
        p = problem(140, 140, 16, program=program)
        row_bias, col_bias = torch.zeros(140), torch.zeros(140)
        row_bias[rows], col_bias[cols] = -depth, -depth
        p = dataclasses.replace(p, row_bias=row_bias, col_bias=col_bias)
        check_sweep(p, tolerance=4e-7)
        check_grad(p, softmax(p))


@pytest.mark.parametrize("height", [-300.0, -60.0, 0.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("program", CLASSES)
def test_columns_far_from_the_first_ones(program, height):
    """One top serves a warp if it is near enough, and it is looked for among the negatives of the first 32 columns of a tile."""
    p = problem(256, 256, 16, program=program, scale=1.0)
    first = torch.arange(256) % 128 < 32
    p.x[:, 0] = 1.0
    p.y[:, 0] = torch.where(first, 0.0, height)
    if program == "by_label":  # no negative among the first ones
        p.rows[1].fill_(1)
        p.cols[1].copy_(first)
    check_sweep(p)


def test_lines_without_pairs():
    """Biases of -inf, and ids that leave a row or a column nothing: log-sum-exp -inf, gradient 0, neighbours unharmed."""
    p = problem(140, 150, 16, program="by_label")
    row_bias, col_bias = torch.randn(140), torch.randn(150)
    row_bias[[0, 33]] = -torch.inf
    col_bias[[7, 149]] = -torch.inf
    p = dataclasses.replace(p, row_bias=row_bias, col_bias=col_bias)
    check_sweep(p)
    everyone = dataclasses.replace(p, program="all", rows=(), cols=())
    got = check_grad(everyone, softmax(everyone))
    assert not got.dx[[0, 33]].any() and not got.dy[[7, 149]].any()

    same = torch.zeros(140, dtype=torch.int32)  # every pair dropped
    p = dataclasses.replace(problem(140, 140, 16, program="different"), rows=(same,), cols=(same,))
    check_sweep(p)
    c = softmax(p)
    got = check_grad(p, dataclasses.replace(c, row_weight=torch.full_like(c.row_weight, torch.nan)))
    assert not got.dx.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("program", ["all", "different"])
def test_not_finite_inputs_come_out_where_they_belong(program, value):
    p = problem(140, 150, 16, program=program)
    p.x[135, 3] = value
    check_sweep(p)
    check_grad(p, softmax(p))
    p = problem(140, 150, 16, program=program)
    bias = torch.zeros(140)
    bias[4] = value
    check_sweep(dataclasses.replace(p, row_bias=bias))


def test_nan_weight_stays_in_its_row():
    p = problem(140, 150, 16, torch.float16)
    c = softmax(p, cols=False)
    c.row_weight[0, 3] = torch.nan
    got = backend.grad(p, c, Needs(x=True))
    assert got.dx[3].isnan().all() and got.dx.isnan().any(1).sum() == 1


@pytest.mark.parametrize("weight", [1e-9, 1e-4, 1e6])
def test_half_precision_neither_flushes_nor_overflows(weight):
    for program in ("all", "by_label"):
        p = problem(64, 70, 16, torch.float16, program)
        check_grad(p, softmax(p, weight=weight))
    check_grad(p := problem(64, 70, 16, torch.float16), Sigmoid(torch.randn(64) * weight))
    zero = softmax(p, weight=0.0)
    assert not backend.grad(p, zero, Needs(x=True, y=True)).dx.any()


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("highest", [-20.0, -4.2, -4.1, 3.0])
def test_sigmoid_far_below_zero(scale, highest):
    """Whole warps without a logit above -6 bits, -4.16, take shorter polynomials; one logit above it, and they do not."""
    p = problem(128, 128, 16, scale=scale)
    row_bias = torch.full((128,), -20.0)
    p = dataclasses.replace(p, x=p.x * 0.1, row_bias=row_bias)
    p.x[40] = 0.0
    row_bias[40] = highest  # of the second warp
    c = Sigmoid(torch.rand(128) + 0.5)
    wanted = Needs(x=True, y=True, row_bias=True, col_bias=True, scale=True)
    got, ref = backend.grad(p, c, wanted), reference.grad(in_float64(p), wide_coefficients(c), wanted)
    for name in ("row_sum", "g_rows"):  # relative to each row: those far below would be lost beside the others
        assert ((getattr(got, name) - getattr(ref, name)) / getattr(ref, name)).abs().max() < 2e-6, name
    check_grad(p, c, need_bias=True)


def test_sigmoid_of_nan_and_infinite_logits_far_below_zero():
    p = problem(128, 128, 16, scale=1.0)
    p = dataclasses.replace(p, x=p.x * 0.1, row_bias=torch.full((128,), -20.0))
    p.row_bias[3], p.row_bias[5], p.row_bias[70] = torch.nan, -torch.inf, torch.inf
    check_grad(p, Sigmoid(torch.ones(128)), need_bias=True)


@pytest.mark.parametrize("program", CLASSES)
def test_probabilities_of_large_logits_sum_to_one(program):
    """Logits of 150 with biases: rounded there, sweep and grad would each be off by 8e-6, and differ."""
    p = problem(140, 150, 16, program=program, bias=True)
    unit = torch.nn.functional.normalize(p.x[0].double(), dim=0) * 1.2
    y = unit * torch.linspace(-0.5, 1, 150)[:, None]
    p = dataclasses.replace(p, x=unit.bfloat16().repeat(140, 1), y=y.bfloat16(), logit_scale=torch.tensor([100.0]))
    s = backend.sweep(p, need_cols=True)
    rows, cols = (lse.of_top(torch.ones_like(lse.top)) for lse in (s.row, s.col))
    one_way = backend.grad(p, Softmax(rows, s.row.top), Needs(row_bias=True))
    both = backend.grad(p, Softmax(0 * rows, s.row.top, cols, s.col.top), Needs(col_bias=True))
    for sums, lse in ((one_way.g_rows, s.row), (both.g_cols, s.col)):
        expected = (lse.top > -torch.inf).sum(0)  # one for each class of which a line has pairs
        assert (sums - expected).abs().max() < 2e-6 * p.classes


def test_softplus_is_accurate_in_its_tail():
    """One column: no sum to hide behind. From e^s down to 1e-37 and up to s itself."""
    s = torch.linspace(-85, 200, 400).bfloat16()
    row = backend.sweep_softplus(Problem(s[:, None], torch.ones(1, 1).bfloat16(), torch.ones(1)))
    ref = torch.nn.functional.softplus(s.double(), threshold=100)
    assert ((row.double() - ref).abs() <= 2e-7 * ref * (2 + s.abs())).all()  # exp(s) = 2^(s log2 e) loses |s| ulps


# ---- blocks, order, symmetry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
def test_blocks_give_the_whole(program):
    """A workspace of a tile: blocks are split along the rows and along the columns, and add up."""
    p = problem(300, 280, 16, torch.float16, program, bias=True)
    assert len(list(tiled.blocks(p, TILE * TILE, TILE))) == 9
    check_sweep(p, workspace=1024)
    check_grad(p, softmax(p), workspace=TILE * TILE * 2, need_bias=True)
    if program != "by_label":
        check_grad(p, Sigmoid(torch.randn(300)), workspace=TILE * TILE * 2, need_bias=True)
        assert_close(backend.sweep_softplus(p, workspace=1024), reference.sweep_softplus(in_float64(p)), 1e-6)


def test_blocks_are_bounded_and_cover_the_matrix_once():
    for N, M in ((1, 1), (1, 10**6), (10**6, 1), (65536, 65536), (10**6, 10**6), (4096, 10**6), (16385, 16384), (0, 3)):
        x, y = torch.empty(1, 1).expand(N, 1), torch.empty(1, 1).expand(M, 1)
        for triangular in {False, N == M}:
            p = Problem(x, y, torch.ones(1), triangular=triangular)
            for blocks in (list(tiled.blocks(p, 2**28, TILE)), list(backend._strips(p, 2**28))):
                cells = [(i.stop - i.start) * (j.stop - j.start) for i, j in blocks]
                assert all(c <= 2**28 for c in cells) and all(i.start % TILE == 0 == j.start % TILE for i, j in blocks)
                own = sum((i.stop - i.start) ** 2 for i, j in blocks if i.start == j.start)
                assert sum(cells) + (sum(cells) - own if triangular else 0) == N * M


def log_sum_exp(top, total):
    """In nats, of a top in bits."""
    return math.log(2) * (top.double() + total.double().log2())


def statistics(T, n=50):
    """Statistics (2, 2, T, n) of T tiles, lines 0 to 2 of which are empty, infinite and NaN, and their log-sum-exps (2, n)."""
    g = torch.Generator().manual_seed(T)
    top, total = torch.randn(2, T, n, generator=g) * 20, torch.rand(2, T, n, generator=g) + 0.5
    empty = torch.rand(2, T, n, generator=g) < 0.3
    empty[:, :, 0] = True
    top[empty], total[empty] = -torch.inf, 0.0
    top[:, -1, 1], total[:, -1, 1] = torch.inf, torch.inf
    total[:, 0, 2] = torch.nan
    return torch.stack([top, total], 1), log_sum_exp(top, total).logsumexp(1)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 40])
def test_fold(T):
    """Statistics of T tiles onto those of earlier ones."""
    sums, lse = statistics(T)
    out = torch.zeros(2, 2, 60)
    out[:, 0] = -torch.inf
    out[0, 0, 3:9], out[0, 1, 3:9] = 30.0, 2.0
    want = torch.logaddexp(lse, log_sum_exp(out[:, 0, :50], out[:, 1, :50]))
    _C.fold(sums, out[:, :, :50])
    assert_close(log_sum_exp(out[:, 0, :50], out[:, 1, :50]), want, 1e-6, relative=False)
    assert (out[:, 0, 50:] == -torch.inf).all() and not out[:, 1, 50:].any()  # a slice, and nothing beside it


@pytest.mark.parametrize("T", [1, 7, 8, 9, 40])
def test_the_first_fold_reads_nothing_and_the_last_leaves_log_sum_exps(T):
    sums, lse = statistics(T)
    at_once = torch.full((2, 2, 60), torch.nan)
    _C.fold(sums, at_once[:, :, :50], first=True, last=True)
    high, low = at_once[:, 0, :50], at_once[:, 1, :50]
    assert_close(high.double() + low, lse, 1e-6, relative=False)  # 2^(top - top') is of float32
    assert at_once[:, :, 50:].isnan().all()

    finite = lse.isfinite()
    assert (low.abs() <= high.abs() * 2**-24)[finite].all()
    assert torch.equal(high[finite], (high.double() + low).float()[finite])
    assert (high[:, 0] == -torch.inf).all() and (high[:, 1] == torch.inf).all() and not low[:, :2].any()
    assert high[:, 2].isnan().all() and low[:, 2].isnan().all()

    several = torch.full((2, 2, 50), torch.nan)
    pieces = sums.split(3, dim=2)
    for k, piece in enumerate(pieces):
        _C.fold(piece.contiguous(), several, first=k == 0, last=k == len(pieces) - 1)
    assert_close(several.double().sum(1), lse, 2e-6, relative=False)


def test_what_a_float_loses_of_a_log_sum_exp_is_its_low_part():
    """At |s| = 1e4 one float32 is off by 5e-4."""
    top, total = torch.linspace(-1e4, 1e4, 999), torch.rand(999) + 1
    out = torch.empty(1, 2, 999)
    _C.fold(torch.stack([top, total])[None, :, None].contiguous(), out, first=True, last=True)
    want = log_sum_exp(top, total)
    assert (out[0].double().sum(0) - want).abs().max() < 2e-11 < 1e-4 < (out[0, 0] - want).abs().max()


def raw_grad(p, weight, lse):
    """G by the kernel from coefficients as they are, (1, whole tiles) of the rows and perhaps of the columns."""
    (N, M), (tiles_n, tiles_m) = (len(p.x), len(p.y)), (-(-len(v) // TILE) for v in (p.x, p.y))
    g = torch.full((tiles_n * TILE, tiles_m * TILE), torch.nan, dtype=p.x.dtype)
    sides = dict(row_weight=weight[0], row_lse=lse[0])
    if len(weight) == 2:
        sides |= dict(col_weight=weight[1], col_lse=lse[1])
    _C.grad(_C.Block(p.x, p.y, p.logit_scale), **sides, g=g)
    assert not g[N:].any() and not g[:, M:].any()
    return g[:N, :M].double()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("spread", [1, 30], ids=["one exp", "two exps"])
def test_lines_without_pairs_have_no_gradient_whatever_their_weight(sides, spread):
    """Their log-sum-exp is -inf, and says nothing of how close those of the tile are."""
    p = problem(200, 300, 16, scale=0.2)
    lse = [torch.full((1, n), 3.0) + spread * torch.rand(1, n) for n in (256, 384)[:sides]]
    weight = [torch.rand(1, v.shape[1]) + 0.5 for v in lse]
    empty = [[0, 33, 199], [5, 131, 299]][:sides]
    for v, w, lines, size in zip(lse, weight, empty, (200, 300)):
        v[0, lines] = -torch.inf
        w[0, lines] = torch.tensor([torch.nan, torch.inf, 3.0])
        v[0, size:], w[0, size:] = torch.nan, torch.nan  # past the edge: looked at by nobody
    s = 0.2 * p.x.double() @ p.y.double().T
    parts = [(s - v[0, :n].double().reshape(shape)).exp() * w[0, :n].double().reshape(shape)
             for v, w, n, shape in zip(lse, weight, (200, 300), ((-1, 1), (1, -1)))]  # fmt: skip
    parts[0][empty[0]] = 0
    if sides == 2:
        parts[1][:, empty[1]] = 0
    got, want = raw_grad(p, weight, lse), sum(parts)
    assert got.isfinite().all() and ((got - want).abs() <= 2**-8 * want.abs() + 1e-30).all()


def test_log_sum_exps_that_are_not_finite_stay_in_their_lines():
    """Of no line, some lines or all lines of a tile; +inf, where a logit is; NaN."""
    p = problem(128, 128, 8, scale=0.2)
    s = 0.2 * p.x.double() @ p.y.double().T
    finite, third = torch.full((1, 128), 2.0), torch.arange(128) == 3
    some = [torch.where(third, value, finite) for value in (-torch.inf, torch.inf, torch.nan)]
    lines, ones = [finite, torch.full((1, 128), -torch.inf), *some], [torch.ones(1, 128)] * 2
    for rows in lines:
        for cols in lines:
            row, col = (torch.where(v == -torch.inf, torch.inf, v).double() for v in (rows, cols))
            want = (s - row.T).exp() + (s - col).exp()
            assert_close(raw_grad(p, ones, [rows, cols]), want, 2**-8)


# ---- rows ----------------------------------------------------------------------------------------------------------------


ROWS = [(1, 1, 1, 0), (1, 1, 24, 5), (5, 7, 8, 3), (7, 5, 300, -2), (33, 33, 13, 32), (9, 40, 257, 39), (3, 3, 1000, 1)]


def rows_of(n, d, dtype, how, seed=0):
    """(n, d) side by side, with gaps between the rows, at an odd address, or one row n times."""
    wide = torch.randn(n, d + 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return dict(
        contiguous=wide[:, :d].contiguous(),
        strided=torch.cat([wide, wide[:, :5]], 1)[:, :d] if d % 8 else wide[:, :d],
        shifted=wide[:, 3 : d + 3],
        expanded=wide[:1, :d].expand(n, d),
    )[how]


LAYOUTS = ["contiguous", "strided", "shifted", "expanded"]


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_partner_products(dtype, how):
    for N, M, D, shift in ROWS:
        x, y = rows_of(N, D, dtype, how), rows_of(M, D, dtype, "contiguous", seed=1)
        out = torch.full((N,), torch.nan, dtype=torch.float64)
        _C.partner_products(x, y, shift, out)
        partner = (torch.arange(N) + shift) % M
        want = (x.double() * y.double()[partner]).sum(1)
        assert (out - want).abs().max() <= 1e-14 * D  # products of 16 bits are exact in float32


def test_partner_products_of_rows_that_are_not_finite():
    x, y = torch.randn(2, 40, 20).bfloat16()
    x[3, 19], y[7, 0], x[11, 2] = torch.nan, torch.inf, -torch.inf
    out = torch.empty(40, dtype=torch.float64)
    _C.partner_products(x, y, 1, out)
    want = (x.double() * y.double().roll(-1, 0)).sum(1)
    assert_close(out, want, 1e-14)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [3, 6, 11]
    _C.partner_products(x[:0], y, 1, out)  # nothing to do


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("to", [*DTYPES, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finish(dtype, to, how):
    for R, C, D, shift in ROWS:
        acc, other = torch.randn(R, D), rows_of(C, D, dtype, how)
        for n in {R, R // 2}:
            weight, scale = torch.randn(n), torch.tensor([-0.7])
            out = torch.full((R, D + 8), torch.nan, dtype=to)
            _C.finish(acc, other, weight, shift, scale, out[:, :D])
            want = acc.double()
            want[:n] += weight.double()[:, None] * other.double()[(torch.arange(n) + shift) % C]
            want *= scale.double()
            size = acc.double().abs() + (want / scale.double() - acc.double()).abs()  # of what is added
            assert ((out[:, :D].double() - want).abs() <= torch.finfo(to).eps / 2 * want.abs() + 2e-7 * size + 1e-7).all()
            assert out[:, D:].isnan().all()


def test_finish_in_place_without_partners_and_with_rows_that_are_not_finite():
    acc, other, scale = torch.randn(20, 12), torch.randn(9, 12).bfloat16(), torch.tensor([2.0])
    before, weight = acc.clone(), torch.randn(12)
    weight[5], other[(3 + 4) % 9] = torch.nan, torch.inf
    _C.finish(acc, other, weight, 4, scale, acc)
    want = before.double()
    want[:12] += weight.double()[:, None] * other.double()[(torch.arange(12) + 4) % 9]
    assert_close(acc, want * 2, 1e-6)
    assert (~acc.isfinite()).any(1).nonzero().flatten().tolist() == [3, 5]

    out = torch.empty(20, 12, dtype=torch.float16)
    _C.finish(before, None, None, 0, scale, out)
    assert torch.equal(out, (before * 2).half())
    _C.finish(before[:0], other, weight[:0], 3, scale, out[:0])
    _C.finish(before, other[:0], weight[:0], 0, scale, out)
    assert torch.equal(out, (before * 2).half())


def test_rows_are_checked():
    x, y, one = torch.zeros(4, 8).bfloat16(), torch.zeros(5, 8).bfloat16(), torch.ones(1)
    acc, wide = torch.zeros(4, 8), torch.zeros(4, dtype=torch.float64)
    for wrong, what in (
        (dict(x=acc, y=torch.zeros(5, 8)), "16-bit"),
        (dict(x=x.half()), "16-bit"),
        (dict(y=y[:, :7]), "columns of x"),
        (dict(y=y[:0]), "and rows"),
        (dict(x=torch.zeros(8, 4).bfloat16().T), "contiguous"),
        (dict(out=wide[:3]), "fewer elements"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.partner_products(**dict(x=x, y=y, shift=0, out=wide) | wrong)
    for wrong, what in (
        (dict(acc=x), "acc must be float32"),
        (dict(out=x[:3]), "shape of acc"),
        (dict(other=acc), "other must be"),
        (dict(weight=torch.ones(5)), "no more rows"),
        (dict(weight=None), "comes with"),
        (dict(out=torch.zeros(4, 8, dtype=torch.float64)), "out must be"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.finish(**dict(acc=acc, other=y, weight=torch.ones(4), shift=0, scale=one, out=x) | wrong)


@pytest.mark.parametrize("lowest", [TILE, 2048], ids=["low strips", "one strip"])
@pytest.mark.parametrize("workspace", [2**29, TILE * TILE * 2], ids=["one block", "blocks"])
@pytest.mark.parametrize("program", CLASSES)
def test_triangular(program, workspace, lowest, monkeypatch):
    """Half of S is computed, all of it counts: 1 to 5 tiles along the diagonal, odd and even, ragged and not."""
    monkeypatch.setattr(backend, "_LOWEST_STRIP", lowest)
    for N in (1, 127, 128, 200, 300, 512, 600):
        p = problem(N, N, 8, program=program, triangular=True)
        check_sweep(p, workspace=workspace)
        check_grad(p, softmax(p), workspace=workspace)


@pytest.mark.parametrize("program", ["different", "by_label"])
def test_triangular_in_strips_lower_than_blocks(program):
    """Blocks of 4 x 4 tiles: strips of one tile on the diagonal, whole blocks, which are larger, beside it."""
    p = problem(1000, 1000, 16, program=program, triangular=True)
    sizes = [backend._whole(i) * backend._whole(j) for i, j in backend._strips(p, (4 * TILE) ** 2)]
    assert sizes[0] < max(sizes)
    check_grad(p, softmax(p), workspace=2 * (4 * TILE) ** 2)


@pytest.mark.parametrize("workspace", [2**29, 1024], ids=["one block", "blocks"])
def test_deviations_of_the_positives_from_a_center(workspace):
    """Logits of 1e4: the deviation keeps what their sum would round away."""
    for N, M in ((1, 1), (31, 31), (140, 140), (300, 300), (140, 300), (257, 31)):
        p = problem(N, M, 16, program="by_label", triangular=N == M, scale=300.0)
        s = p.x.double() @ p.y.double().T * 300
        positive = (p.rows[1][:, None] == p.cols[1]) & (p.rows[0][:, None] != p.cols[0])
        center, col_center = (
            (s.masked_fill(~positive, 0).sum(k) / positive.sum(k).clamp(min=1)).float() for k in (1, 0)
        )
        p = dataclasses.replace(p, center=center, col_center=None if p.triangular else col_center)
        got, ref = check_sweep(p, workspace=workspace)
        assert got.deviation.dtype == torch.float64 and (got.col_deviation is None) == p.triangular
        allowed = 1e-6 * max(N, M) * s.abs().max().item()
        assert_close(got.deviation, ref.deviation, allowed, "rows", relative=False)
        if not p.triangular:
            assert_close(got.col_deviation, ref.col_deviation, allowed, "columns", relative=False)


def test_the_self_check_passes_and_would_not_pass_anything(monkeypatch):
    device = torch.device("cpu")
    assert all(error <= allowed for _, error, allowed in backend.self_check(device))
    pad = tiled.pad
    monkeypatch.setattr(tiled, "pad", lambda v, tile, value=None: pad(v.roll(1, -1), tile, value))  # a wrong index map
    assert not any(error <= allowed for _, error, allowed in backend.self_check(device))


def test_the_self_check_minds_no_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            checked = backend.self_check(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert all(error <= allowed for _, error, allowed in checked)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_unusable():
    assert "CUDA devices, not on cpu" in backend.unusable(torch.device("cpu"), torch.bfloat16)


def test_tensors_come_by_either_way_of_dlpack():
    """PyTorch's by its table of C functions, if it has one; those of other libraries, and of older versions, by __dlpack__."""
    tops = torch.randn(1, 2, 3, 256).abs()
    out, other = torch.empty(1, 2, 200), numpy.empty((1, 2, 200), numpy.float32)
    _C.fold(tops, out, first=True, last=True)
    _C.fold(tops.numpy(), other, first=True, last=True)
    assert torch.equal(out, torch.from_numpy(other))
    for wrong in (tops.double(), tops[..., ::2], tops[0], torch.nn.functional.pad(tops, (0, 1))[..., 1:], tops.numpy()[0], None, 3):
        with pytest.raises((TypeError, ValueError)):
            _C.fold(wrong, out, first=True, last=True)
    read_only = numpy.zeros((1, 2, 200), numpy.float32)
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        _C.fold(tops, read_only, first=True, last=True)


def test_arguments_are_checked():
    x, one = torch.zeros(4, 8).bfloat16(), torch.ones(1)
    for wrong, what in (
        (dict(x=x[:, :4]), "multiple of 8"),
        (dict(x=torch.zeros(4, 20).bfloat16()[:, 4:12]), "16-byte"),
        (dict(x=x.half()), "dtype"),
        (dict(y=torch.zeros(4, 16).bfloat16()), "columns of x"),
        (dict(x=x[:0]), "rows"),
        (dict(row_bias=torch.zeros(4)), "row_bias has fewer elements"),
        (dict(row_id=torch.zeros(128, dtype=torch.int32)), "ranges"),
        (dict(triangular=True), "one x"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.Block(**dict(x=x, y=x.clone(), logit_scale=one) | wrong)
    with pytest.raises(TypeError):
        _C.Block(x, x, one.double())  # never converted behind one's back
    with pytest.raises(TypeError):
        _C.Block(x, x, one, row_id=torch.zeros(128, dtype=torch.int64))
    with pytest.raises(ValueError, match="of positives"):
        _C.sweep(_C.Block(x, x, one), torch.zeros(1, 2, 1, 128), torch.zeros(128), torch.zeros(1, 128))
    with pytest.raises(ValueError, match="row_sums has fewer elements"):
        _C.sweep(_C.Block(x, x, one), torch.zeros(1, 2, 1, 127))


# ---- the losses ----------------------------------------------------------------------------------------------------------


REGIMES = ["init", "converged", "saturated", "cone", "t=0.005", "t=10", "large", "duplicates"]


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(backend, "unusable", lambda device, dtype: None)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(dtype, loss, regime, usable, request):
    """The numeric contract of every loss, on the cases that every backend has to pass."""
    if (dtype, loss, regime) == (torch.bfloat16, "sup_con", "duplicates"):
        why = "a bfloat16 G along rows that are copies of each other: 1.2 x the tight bound, as of the triton backend"
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=why))
    assert violations(case(loss, regime, n=40), dtype, backend="cuda", device="cpu") == []


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_of_several_tiles(dtype, loss, usable):
    assert violations(case(loss, "init", n=200, m=300, d=24), dtype, backend="cuda", device="cpu") == []


def cut_off_sum(u, v):
    """<u, v> of each row, 16 terms at a time, toward zero: (N,) float64"""
    total = numpy.zeros(len(u), numpy.float32)
    for k in range(0, u.shape[1], 16):
        wide = total + (u[:, k : k + 16] * v[:, k : k + 16]).sum(1)
        total = wide.astype(numpy.float32)
        total = numpy.where(abs(total) > abs(wide), numpy.nextafter(total, numpy.float32(0)), total)
    return torch.from_numpy(total).double()


@pytest.mark.parametrize("N, shift, step", [(1, 0, 1), (200, 0, 1), (300, 100, 1), (1500, 0, 2)])
def test_what_tiles_cut_off_of_products_is_measured(N, shift, step):
    """ops.tile_ratio: on average, of the partners on the right, and of every step-th row where there are many."""
    x, y = (1 + 0.3 * torch.randn(N, 512, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    x, y = x.half(), y.half()
    got = ops.tile_ratio(x, y, backend.partner_products(x, y, shift), shift, backend="cuda")
    u, v = (w.double().numpy() for w in (x[: N - shift : step], y[shift::step]))
    exact, in_tiles = (torch.from_numpy(u) * torch.from_numpy(v)).sum(1), cut_off_sum(u, v)
    expected = (in_tiles / exact).mean()
    assert 2e-7 < 1 - expected < 2e-6  # of 32 steps, half a unit in the last place of a part of the sum each
    assert got.shape == (1,) and abs(got.item() - expected) < 1.5e-8 + 6e-8 / N**0.5  # products are in bits, and rounded


def test_nothing_is_cut_off_where_there_is_nothing():
    x = torch.zeros(3, 8, dtype=torch.bfloat16)
    x[2] = torch.inf
    for rows in range(4):
        products = backend.partner_products(x[:rows], x, 0)
        assert ops.tile_ratio(x[:rows], x, products, 0, backend="cuda").item() == 1.0


@pytest.mark.parametrize("loss", ["info_nce", "sup_con"])
def test_the_scale_does_not_feel_that_tensor_cores_cut_off_sums(loss, usable, kernels):
    """Of embeddings with a large mean, products in tiles are 1e-6 too small, and what a temperature gains by them cancels."""
    if kernels == "ptx":
        pytest.skip("slow there, and it cuts off what the emulation does")
    found = check(case(loss, "cone", n=256, d=768), torch.float16, backend="cuda", device="cpu")
    (of_scale,) = (f for f in found if f.quantity in ("grad temperature", "grad logit_scale") and f.bound == "tight")
    assert of_scale.error < 0.2 * of_scale.allowed


def nearly_balanced():
    """SigLIP near the optimum of its bias, where negatives and positives cancel; of embeddings with a large mean."""
    c = case("siglip", "cone", n=256, d=768)
    return dataclasses.replace(c, tensors=c.tensors | dict(logit_bias=torch.tensor(-18.4, dtype=torch.float64)))


def test_siglip_makes_up_for_what_tensor_cores_cut_off(usable, kernels):
    """Logits 1e-5 too small would be a quarter of the bounds."""
    if kernels == "ptx":
        pytest.skip("slow there, and it cuts off what the emulation does")
    found = check(nearly_balanced(), torch.bfloat16, backend="cuda", device="cpu")
    assert [f for f in found if not f.holds] == []
    cancel = [f for f in found if f.quantity in ("grad logit_bias", "grad logit_scale") and f.bound == "tight"]
    assert len(cancel) == 2 and all(f.error < 0.05 * f.allowed for f in cancel)


def siglip_of_a_rank(rank, world):
    """Its gradients of the scale and of the bias: those of the whole batch are the mean over ranks."""
    backend.unusable = lambda device, dtype: None
    c = nearly_balanced().to(torch.bfloat16)
    leaves = {k: v[rank::world] if v.dim() == 2 else v.requires_grad_() for k, v in c.tensors.items()}
    flashcl.siglip(**leaves, backend="cuda", group=torch.distributed.group.WORLD).backward()
    return [leaves[k].grad.item() for k in ("logit_scale", "logit_bias")]


def test_siglip_makes_up_for_it_over_ranks(kernels):
    if kernels == "ptx":
        pytest.skip("the emulation is what other processes load")
    got = torch.tensor(run_world(2, siglip_of_a_rank)).mean(0)
    truth = evaluate(flashcl.reference.siglip, nearly_balanced().to(torch.bfloat16).to(torch.float64))
    for value, name in zip(got, ("logit_scale", "logit_bias")):
        assert abs(value - truth[f"grad {name}"]) < 4e-6  # 1.3e-5 with the products as they are
