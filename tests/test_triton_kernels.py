"""What the Triton kernels have beside the sweep and grad of every backend (test_kernels.py): tiles, descriptors, thresholds, rows."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("these tests are for the interpreter", allow_module_level=True)

from interpreter import reversed_programs
from kernels import assert_close, assert_grads, assert_sweeps, problem, softmax, softplus_sums

from flashcl.backends import triton as backend
from flashcl.engine.problem import CLASSES, Needs, Sigmoid
from flashcl.triton_kernels import grad as grad_module
from flashcl.triton_kernels import sweep as sweep_module
from flashcl.triton_kernels.config import Tile
from flashcl.triton_kernels.tile import operands

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POINTERS, DESCRIPTORS = Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1, tma=True)
WIDE, TALL = Tile(16, 64, 16, 4, 1, tma=True, GROUP=2), Tile(64, 16, 64, 4, 1, GROUP=3)

pytestmark = pytest.mark.usefixtures("poison")


def plan(tile=POINTERS, workspace=2**20):
    return backend.Plan(tile, dataclasses.replace(tile, BN=32, BM=32), workspace)


def check_sweep(p, tile=POINTERS, **options):
    return assert_sweeps(backend, p, plan=plan(tile), **options)


def check_grad(p, c, tile=POINTERS, **options):
    return assert_grads(backend, p, c, plan=plan(tile), **options)


class Spy:
    """Counts the calls of a device function."""

    def __init__(self, monkeypatch, module, name):
        self.calls, original = 0, getattr(module, name)

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)


# ---- tiles and loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [DESCRIPTORS, WIDE, TALL], ids=["descriptors", "wide", "tall"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_tiles(program, dtype, tile):
    for N, M, D in ((1, 1, 1), (1, 70, 8), (33, 31, 5), (70, 45, 40), (64, 96, 200)):
        p = problem(N, M, D, program, dtype=dtype, bias=D == 40)
        check_sweep(p, tile)
        check_grad(p, softmax(p), tile, need_bias=D == 40)
        if program == "all":
            assert_close(backend.sweep_softplus(p, plan=plan(tile)), softplus_sums(p), 1e-6)
            check_grad(p, Sigmoid(torch.randn(N)), tile, need_bias=True)


def test_which_tensors_descriptors_can_load():
    def through_descriptors(x):
        return operands(x, x, DESCRIPTORS)[2]

    x = torch.zeros(64, 24)
    assert through_descriptors(x) and through_descriptors(x[:, 4:20]) and through_descriptors(x[1:])
    assert not through_descriptors(x[:, 1:21])  # base
    assert not through_descriptors(torch.zeros(64, 5))  # row length
    assert not through_descriptors(x[:1].expand(64, 24))  # stride 0
    assert not operands(x, x, POINTERS)[2]


def test_strides_of_descriptors():
    """Transposed, sliced, shifted and broadcast inputs are what their elements are."""
    base = problem(40, 50, 24, "different", dtype=torch.float32)
    wide = torch.randn(40, 80)
    views = torch.randn(24, 40).T, wide[:, 3:27], wide[:, ::2][:, :24], torch.randn(1, 24).expand(40, 24), wide[:, 16:40]
    for x in views:
        p = dataclasses.replace(base, x=x, rows=(torch.arange(80, dtype=torch.int32)[::2],))
        check_sweep(p, DESCRIPTORS)
        check_grad(p, softmax(p), DESCRIPTORS)


def test_rows_beyond_int32():
    """Row offsets of 2^31 elements and more, in memory that is never touched in between."""
    stride = 2**21
    x = torch.empty(0, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # nobody fills 4 GiB with NaN
    x = torch.empty(1050 * stride, dtype=torch.float16).as_strided((1050, 16), (stride, 1))
    x[:] = torch.randn(1050, 16)
    p = problem(1050, 8, 16, dtype=torch.float16)
    p = dataclasses.replace(p, x=x)
    assert backend._loadable(p).x is x
    check_sweep(p, Tile(256, 16, 16, 4, 1))


def test_triangular_walks_half_of_the_tiles(monkeypatch):
    tiles = Spy(monkeypatch, sweep_module, "product")
    check_sweep(problem(160, 160, 16, triangular=True))
    assert tiles.calls == 5 * 6 // 2


@pytest.mark.parametrize("program", CLASSES)
def test_programs_in_any_order_give_the_same_bits(program):
    small = plan(workspace=4096)

    def everything():
        out = []
        for triangular in (False, True):
            p = problem(70, 70, 16, program, triangular)
            stats = backend.sweep(p, need_cols=True, plan=plan(workspace=4096))
            out += [v for lse in (stats.row, stats.col) if lse is not None for v in (lse.top, lse.rest)]
            got = backend.grad(p, softmax(p), Needs(x=True, y=True, row_bias=not triangular, col_bias=not triangular, scale=True), plan=small)
            out += [got.dx, got.dy, got.g_rows, got.g_cols, got.d_scale]
        return [t for t in out if t is not None]

    forward = everything()
    with reversed_programs():
        backward = everything()
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_unusable():
    assert backend.unusable(torch.device("cpu"), torch.float32) is None
    assert "float64" in backend.unusable(torch.device("cpu"), torch.float64)


# ---- one exp or several --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", CLASSES)
def test_one_exp_where_it_is_safe(program, monkeypatch):
    """Logits of ordinary size never need the careful branches; the positives that most lines lack are no reason either."""
    own = Spy(monkeypatch, sweep_module, "own_sums")
    apart = Spy(monkeypatch, grad_module, "weighted_exp")
    p = problem(96, 96, 32, program, scale=0.2, classes=20)
    check_sweep(p)
    check_grad(p, softmax(p))
    assert own.calls == 0 and apart.calls == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", CLASSES)
def test_several_exps_for_wild_logits(program, dtype, monkeypatch):
    own = Spy(monkeypatch, sweep_module, "own_sums")
    apart = Spy(monkeypatch, grad_module, "weighted_exp")
    p = problem(70, 50, 16, program, dtype=dtype, scale=30.0)
    p = dataclasses.replace(p, x=(p.x * torch.logspace(-3, 1.4, 70)[:, None]).to(dtype))
    check_sweep(p)
    check_grad(p, softmax(p), tolerance=8e-3)
    assert own.calls > 0 and apart.calls > 0


@pytest.mark.parametrize("dtype, shared, apart", [(torch.bfloat16, 55, 70), (torch.float32, 10, 20)], ids=str)
def test_threshold_of_the_shared_shift(dtype, shared, apart, monkeypatch):
    """Rows from 0 to 120 nats below the rest of their tile: right on both sides of the threshold, and both are seen."""
    own = Spy(monkeypatch, sweep_module, "own_sums")
    taken = {}
    for depth in (0, 10, 20, 40, 55, 62, 63, 70, 86, 88, 100, 104, 120, 1000):
        p = problem(32, 32, 16, dtype=dtype, scale=0.5)
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
        p = problem(32, 32, 16, dtype=torch.float32)
        p = dataclasses.replace(p, row_bias=torch.where(torch.arange(32) < 16, -float(depth), 0.0))
        before = apart.calls
        check_grad(p, softmax(p), need_bias=True)
        taken.append(apart.calls > before)
    assert taken == [False, False, True, True, True]


# ---- rows ----------------------------------------------------------------------------------------------------------------


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
