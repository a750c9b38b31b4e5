"""Every loss against the numeric contract (flashcl/contract.py), and what else a loss owes to its caller.

The torch backend runs as it is and the triton backend in the hardened interpreter, on poisoned memory. Tiles are made
small where a backend would see all rows in one.
"""

import functools
import importlib
import itertools
import math
import mmap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED

import flashcl
from flashcl import contract, reference
from flashcl.contract import LOSSES, REGIMES, case, evaluate, violations

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {"torch": (SINGLE, BF16, HALF, DOUBLE), "triton": (SINGLE, BF16, HALF)}
BACKENDS = [backend for backend in DTYPES if backend == "torch" or INTERPRETED]
EVERY = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}") for backend in BACKENDS for dtype in DTYPES[backend]
]
TWO = [param for param in EVERY if param.values[1] in (SINGLE, BF16)]


@pytest.fixture
def small_tiles(monkeypatch):
    """The torch backend in tiles of 16 x 16, not 1024 x 1024: many of them, and ragged ones at the edges."""
    monkeypatch.setattr(importlib.import_module("flashcl.backends.torch"), "_CPU_TILE", (16, 16))


def per_row(loss, regime="init", **kwargs):
    """A case with a value per row, each of which gets an upstream gradient of its own."""
    none = {} if loss.startswith("logsumexp") else dict(reduction="none")
    return case(loss, regime, **none, **kwargs)


def through(c, backend, before=lambda v: v, after=lambda v: v):
    """flashcl's function for a case, with something done to its embeddings before and to its values after."""

    def function(**arguments):
        arguments = {k: before(v) if k in ("x", "y", "z", "z1", "z2") else v for k, v in arguments.items()}
        return after(getattr(flashcl, c.function)(**arguments, backend=backend))

    return function


def total_of(values):
    return sum(v.sum() for v in values) if isinstance(values, tuple) else values


# ---- the contract


# What does not hold, and why.
KNOWN = {
    ("triton", BF16, "sup_con", "duplicates"): "a bfloat16 G along rows that are copies of each other: 1.2 x the tight bound",
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_regimes(backend, dtype, loss, regime, request):
    if reason := KNOWN.get((backend, dtype, loss, regime)):
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))
    assert violations(case(loss, regime, n=40), dtype, backend=backend) == []


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", ["bf16x6", "tf32x3"])
def test_float32_products_of_a_gpu(precision, loss, regime, monkeypatch):
    """Tensor cores multiply float32 in parts (triton_kernels/config.py); the interpreter would do it exactly."""
    if not INTERPRETED:
        pytest.skip("for the interpreter")
    from flashcl.triton_kernels import config

    entry = config.entry(config.INTERPRETER, "sweep", SINGLE)
    tile, square = (replace(t, precision=precision) for t in (entry.tile, entry.square))
    entries = dict.fromkeys(config._INTERPRETED, config.Entry(tile, square))
    monkeypatch.setitem(config._TABLE, config.INTERPRETER, (entries, entries))
    assert violations(case(loss, regime, n=40), SINGLE, backend="triton") == []


SHAPES = [(1, 4, 5), (2, 2, 1), (3, 7, 2), (17, 19, 3), (33, 70, 17), (64, 65, 64), (31, 33, 100), (20, 23, 512)]


@pytest.mark.parametrize("n, m, d", [*SHAPES, (9, 11, 1152), (96, 95, 8)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", TWO)
def test_shapes(backend, dtype, loss, n, m, d):
    m = max(n, m) if loss == "info_nce one-way" else m  # logsumexp takes M < N as well
    assert violations(case(loss, "init", n=n, m=m, d=d), dtype, backend=backend) == []


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.startswith("logsumexp")])
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_reductions(backend, dtype, loss, reduction):
    assert violations(case(loss, "init", n=37, reduction=reduction), dtype, backend=backend) == []


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.startswith("logsumexp")])
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_normalize(backend, dtype, loss):
    assert violations(case(loss, "unnormalised", n=37, normalize=True), dtype, backend=backend) == []


@pytest.mark.parametrize("loss, regime", [("sup_con", "duplicates"), ("nt_xent", "collapsed"), ("nt_xent", "duplicates")])
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_normalize_takes_gradients_that_are_not_rounded(dtype, loss, regime):
    """Nearly all of them is along the embeddings, which normalizing takes off; the rounding of that part would stay."""
    assert violations(case(loss, regime, n=64, d=128, normalize=True), dtype) == []


class _Rounded(torch.autograd.Function):
    """Rounded to bfloat16; the gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return x.to(BF16).double()

    @staticmethod
    def backward(ctx, upstream):
        return upstream


@pytest.mark.parametrize("regime", ["init", "converged", "cone", "collapsed", "duplicates"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.startswith("logsumexp")])
def test_normalize_is_as_good_as_rounded_unit_vectors_are(loss, regime):
    """Beside float64 with unit vectors that are rounded in the same place: all else is within the bound on a gradient."""
    c = case(loss, regime, n=64, d=128).to(BF16)
    names = [name for name, v in c.tensors.items() if v.dim() == 2]
    ours = {name: v.clone().requires_grad_() for name, v in c.tensors.items()}
    getattr(flashcl, c.function)(**ours, **c.options, normalize=True).backward()
    exact = {name: v.double().requires_grad_() for name, v in c.tensors.items()}
    unit = {name: _Rounded.apply(F.normalize(exact[name], dim=1)) for name in names}
    getattr(reference, c.function)(**(exact | unit), **c.options).backward()
    for name in names:
        error = (ours[name].grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 1e-2, (name, error)


@pytest.mark.parametrize("backend, dtype", EVERY)
def test_normalize_of_great_lengths(backend, dtype):
    c = case("info_nce", "init", normalize=True, reduction="sum")  # of a mean the gradients would be below float16
    c.tensors["y"] *= 2e4 / c.tensors["y"].abs().amax()  # their lengths are beyond float16
    assert violations(c, dtype, backend=backend) == []


@pytest.mark.parametrize("backend, dtype", EVERY)
def test_normalize_of_a_row_of_zeros(backend, dtype):
    """It stays 0; its gradient, divided by a length of 1e-12, may overflow."""
    c = case("info_nce", "init", normalize=True)
    c.tensors["x"][3] = 0.0
    c = c.to(dtype)
    got, expected = evaluate(through(c, backend), c), evaluate(reference.info_nce, c.to(DOUBLE))
    close = {HALF: 2e-2, BF16: 1e-1}.get(dtype, 1e-4)  # gradients go through the rounding of x / |x|
    for name in ("value", "grad y", "grad logit_scale"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=close, atol=close * expected[name].abs().amax())


@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("loss", ["logsumexp", "logsumexp off-diagonal"])
@pytest.mark.parametrize("n, m", [(20, 37), (37, 20)])
def test_one_axis(backend, loss, axis, n, m):
    assert violations(case(loss, "cone", n=n, m=m, axis=axis), SINGLE, backend=backend) == []


def test_without_biases(backend):
    c = case("logsumexp off-diagonal", "init", n=37, m=20)
    for left_out in (["row_bias"], ["col_bias"], ["row_bias", "col_bias"], ["row_bias", "col_bias", "logit_scale"]):
        fewer = replace(c, tensors={k: v for k, v in c.tensors.items() if k not in left_out})
        assert violations(fewer, SINGLE, backend=backend) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_full_tiles(loss, monkeypatch):
    """The torch backend in the tiles that it ships with."""
    monkeypatch.undo()
    assert violations(case(loss, "init", n=1030, m=1050, d=8), SINGLE, backend="torch") == []


def test_one_large_logit(backend, monkeypatch):
    """The lines of its tile must not be counted from it: s - top would be rounded to 57 instead of to the size of s."""
    monkeypatch.undo()
    n, draw = 300, torch.Generator().manual_seed(0)
    x, y = (0.05 * torch.randn(n, 32, generator=draw, dtype=DOUBLE) for _ in range(2))
    x[:, 0], y[:, 0], x[0, 0], y[0, 0] = 0.0, 0.0, 7.5, 7.5
    row_bias = torch.full((n,), -6.8, dtype=DOUBLE).index_fill_(0, torch.tensor([0]), 0.0)
    c = replace(case("logsumexp", "init", axis="rows"), tensors=dict(x=x, y=y, row_bias=row_bias))
    assert violations(c, SINGLE, backend=backend) == []


def test_few_labels(monkeypatch):
    """Sums over 500 rows of one label, which the gradient of the temperature feels."""
    monkeypatch.undo()
    for seed in range(3):
        c = case("sup_con", "cone", n=1024, seed=seed)
        c = replace(c, options=c.options | dict(labels=torch.arange(1024) % 2))
        assert violations(c, SINGLE, backend="torch") == []


LABELS = {
    "few in a tile": torch.arange(70) % 30,
    "many in a tile": torch.arange(70) % 3,
    "both": torch.cat([torch.zeros(35, dtype=torch.int64), torch.arange(1, 36) % 29]),
    "none": torch.arange(70),
}


@pytest.mark.parametrize("regime", ["init", "cone", "large", "t=0.005"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, BF16])
def test_labels(regime, labels, dtype):
    """Of few positives the torch backend lists the pairs, of many it has masks; one row may meet both."""
    c = case("sup_con", regime, n=70)
    c = replace(c, options=c.options | dict(labels=LABELS[labels]))
    assert violations(c, dtype, backend="torch") == []


@pytest.mark.parametrize("regime", ["init", "large"])
@pytest.mark.parametrize("n, m", [(20, 2200), (2200, 20)])
def test_many_tiles_in_a_line(backend, n, m, regime):
    """More tiles in a row, or in a column, than one step of a merge takes."""
    assert violations(case("logsumexp", regime, n=n, m=m, d=4), SINGLE, backend=backend) == []


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the interpreter")
@pytest.mark.parametrize("regime", ["cone", "t=0.005"])
@pytest.mark.parametrize("loss", LOSSES)
def test_many_blocks(loss, regime, monkeypatch):
    """The triton backend with hardly any workspace: S in blocks of one tile, which must add up to the same."""
    plan = importlib.import_module("flashcl.backends.triton").Plan
    of = plan.of
    monkeypatch.setattr(plan, "of", lambda *args: replace(of(*args), workspace=1))
    for dtype in (SINGLE, BF16):
        assert violations(case(loss, regime, n=75, m=140), dtype, backend="triton") == []


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 80.0])
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_closed_form(backend, dtype, scale):
    """Orthogonal pairs: loss = log1p(K e^-scale) of K negatives, down to 1e-33 where the float64 reference says 0."""
    n, wide = 24, DOUBLE if dtype == DOUBLE else SINGLE
    near = 1e-13 if dtype == DOUBLE else 1e-4  # half a unit in the last place of s = 80 is 4e-6
    x, y = (torch.eye(n, dtype=dtype, requires_grad=True) for _ in "xy")
    s = torch.tensor(scale, dtype=wide, requires_grad=True)
    for symmetric in (True, False):
        value = flashcl.info_nce(x, y, logit_scale=s, symmetric=symmetric, backend=backend)
        dx, ds = torch.autograd.grad(value, (x, s))
        odds = (n - 1) * math.exp(-scale)
        p = odds / (1 + odds)  # what is left for the negatives
        assert value.item() == pytest.approx(math.log1p(odds), rel=near, abs=0)
        assert ds.item() == pytest.approx(-p, rel=near, abs=0)
        expected = torch.full((n, n), p * scale / n / (n - 1), dtype=DOUBLE).fill_diagonal_(-p * scale / n)
        rounding = torch.finfo(dtype)  # float16 ends before the gradient does
        torch.testing.assert_close(dx.double(), expected, rtol=near + 3 * rounding.eps, atol=rounding.tiny)
    value = flashcl.nt_xent(x, y, temperature=1 / s, backend=backend)
    assert value.item() == pytest.approx(math.log1p((2 * n - 2) * math.exp(-scale)), rel=near, abs=0)


def test_log_sum_exps_are_two_numbers(backend):
    """All logits are 1e4, exactly: what float32 loses of 1e4 + log K must not show in the loss, log K."""
    z, n = torch.tensor([[100.0, 0.0]]).repeat(24, 1), 24
    options = dict(temperature=1.0, backend=backend)
    for loss, candidates in (
        (flashcl.info_nce(z, z, **options), n),
        (flashcl.nt_xent(z, z, **options), 2 * n - 1),
        (flashcl.sup_con(z, torch.zeros(n, dtype=torch.int64), **options), n - 1),
    ):
        assert loss.item() == pytest.approx(math.log(candidates), rel=1e-6)


@pytest.mark.parametrize("along", ["rows", "cols"])
def test_one_large_logit_and_many_small_tiles(backend, along):
    """Each tile but the first adds less than half a unit in the last place of float32, all of them 46 half units."""
    many, one = torch.full((2200, 1), -20.5, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    many[0] = 0.0
    tensors = dict(x=one, y=many) if along == "rows" else dict(x=many, y=one)
    assert violations(replace(case("logsumexp", "init"), tensors=tensors), SINGLE, backend=backend) == []


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_siglip_of_one_large_logit_and_many_small_tiles(reduction, monkeypatch):
    """Of the 64 tiles of a row, each but the first adds less than half a unit in the last place of the sum, 15.6."""
    monkeypatch.setattr(importlib.import_module("flashcl.backends.torch"), "_CPU_TILE", (1024, 16))
    n, bias = 1024, -17.375
    x, y = torch.eye(n, n + 1, requires_grad=True), torch.eye(n, n + 1)
    with torch.no_grad():
        x.mul_(34.0)[:, n], y[0, n] = 1.0, 33.0  # s_ii = 16.625, s_i0 = 15.625, all others -17.375
    options = dict(logit_scale=1.0, logit_bias=bias, reduction=reduction)
    expected = reference.siglip(x.double(), y.double(), **options)
    got = flashcl.siglip(x, y, **options, backend="torch").double()
    torch.testing.assert_close(got, expected, rtol=4e-7, atol=0)


def test_gradients_of_the_scale_that_cancel():
    """The second half of the rows takes back what the first has given; in float32 5e-5 of it would stay."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=generator) for n in (128, 64))
    scale, sign = torch.ones((), requires_grad=True), torch.tensor([1.0, -1.0]).repeat_interleave(128)
    lse = flashcl.similarity_logsumexp(torch.cat([x, x]), y, logit_scale=scale, axis="rows", backend="torch")
    (d_scale,) = torch.autograd.grad(lse, scale, sign)
    assert d_scale.abs() < 1e-9


def test_the_scale_of_log_sum_exps_of_embeddings_with_a_large_mean():
    """Their products are all near 900; upstream gradients cancel."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=generator) for n in (256, 64))
    x[:, 0], y[:, 0] = 30.0, 30.0
    sign = torch.tensor([1.0, -1.0]).repeat(128)

    def d_scale(module, dtype):
        scale = torch.tensor(1e-3, dtype=dtype, requires_grad=True)
        lse, _ = module.similarity_logsumexp(x.to(dtype), y.to(dtype), logit_scale=scale)
        return torch.autograd.grad(lse, scale, sign.to(dtype))[0].double()

    want = d_scale(reference, DOUBLE)
    assert (d_scale(flashcl, SINGLE) - want).abs() < 1e-4 * want.abs()


def test_softplus_has_no_threshold():
    """PyTorch's default would be off by 2e-9 beyond s = 20."""
    x, y = torch.tensor([[25.0], [24.0]], dtype=DOUBLE), torch.tensor([[-1.0], [1.0]], dtype=DOUBLE)
    got = flashcl.siglip(x, y, logit_scale=1.0, logit_bias=0.0, reduction="none", backend="torch")
    z = 2 * torch.eye(2, dtype=DOUBLE) - 1
    torch.testing.assert_close(got, torch.logaddexp(torch.zeros_like(z), -z * (x @ y.T)).sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bias", ["row_bias", "col_bias"])
def test_no_pair_at_all_has_no_gradient(backend, bias):
    x, y = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    rows, cols = flashcl.similarity_logsumexp(x, y, backend=backend, **{bias: torch.full((3,), -torch.inf)})
    assert rows.isneginf().all() and cols.isneginf().all()
    for g in torch.autograd.grad((rows, cols), (x, y), (torch.ones(3), torch.ones(3))):
        assert torch.equal(g, torch.zeros_like(g))


def test_a_temperature_of_16_bits_is_inverted_in_32(backend):
    x, y = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    t = torch.tensor(0.07, dtype=BF16)
    for loss in (flashcl.info_nce, flashcl.nt_xent):
        assert torch.equal(loss(x, y, temperature=t, backend=backend), loss(x, y, temperature=t.float(), backend=backend))


def test_the_scale_of_converged_classes(backend):
    """G of the positives of a row adds up to 0 but for the last bits of exp. Where it is taken about 0, an exp that errs to one
    side by 1e-8 is 1e-3 of the gradient."""
    c = case("sup_con", "saturated", n=256, d=256).to(SINGLE)
    truth = evaluate(flashcl.reference.sup_con, c.to(DOUBLE))["grad temperature"]
    got = evaluate(through(c, backend), c)["grad temperature"]
    assert abs(got.double() - truth) < 1e-4 * abs(truth)


def test_siglip_of_one_pair(backend):
    """Its gradient is e^-40: 1 - e^(-loss) of a loss of e^-40 would be 0."""
    c = case("siglip", "t=1", n=1, d=1)
    x, y, bias = torch.full((1, 1), 40.0, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    assert violations(replace(c, tensors=c.tensors | dict(x=x, y=y, logit_bias=bias)), SINGLE, backend=backend) == []


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_gradients_of_siglip_are_rounded_once(dtype):
    """Not before the upstream gradient, here 1 / 48, has scaled them: a CPU computes on float32 copies all the same."""
    gradients = []
    for wide in (dtype, SINGLE):
        c = case("siglip", "init").to(dtype).to(wide)
        gradients.append(evaluate(through(c, "torch"), c))
    for name in ("grad x", "grad y"):
        assert torch.equal(gradients[0][name], gradients[1][name].to(dtype))


def test_gradients_of_a_mean_may_be_too_large_as_a_sum(backend):
    x, y = torch.zeros(64, 1, dtype=HALF, requires_grad=True), torch.full((64, 1), 2000.0, dtype=HALF)
    (dx,) = torch.autograd.grad(flashcl.siglip(x, y, logit_scale=1.0, logit_bias=10.0, backend=backend), x)
    torch.testing.assert_close(dx, torch.full_like(dx, 2000 * 63 / 64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    """Finite differences know nothing of any reference."""
    c = per_row(loss, "t=1", n=5, m=7, d=3)
    names, leaves = list(c.tensors), [v.clone().requires_grad_() for v in c.tensors.values()]

    def function(*leaves):
        return getattr(flashcl, c.function)(**dict(zip(names, leaves)), **c.options, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


# ---- NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_rows_come_out_where_the_reference_has_them(backend, loss, bad):
    for c in (per_row(loss, "t=1", n=20), case(loss, "t=1", n=20)):
        c = c.to(SINGLE)
        for name in [name for name, v in c.tensors.items() if v.dim() == 2]:
            broken = c.tensors[name].clone()
            broken[3, 1] = bad
            broken = replace(c, tensors=c.tensors | {name: broken})
            expected = evaluate(getattr(reference, c.function), broken)
            results = evaluate(through(c, backend), broken)
            assert any(not v.isfinite().all() for v in expected.values())
            for quantity in expected:
                assert torch.equal(results[quantity].isfinite(), expected[quantity].isfinite()), (name, quantity)


@pytest.mark.parametrize("third", [[], [[0.0, 0.5]]])
def test_positives_of_minus_infinity_are_no_missing_positives(backend, third):
    """Two rows of one label whose product overflows, alone and beside a third: their loss is inf, as that of the dense formula."""
    z = torch.tensor([[1e20, 0.0], [-1e20, 0.0], [0.0, 1.0], [0.0, 1.0], *third])
    labels = torch.tensor([0, 0, 1, 1, 0][: len(z)])
    got = flashcl.sup_con(z, labels, temperature=1.0, reduction="none", backend=backend)
    want = flashcl.reference.sup_con(z, labels, temperature=1.0, reduction="none")
    assert want[:2].isposinf().all()
    torch.testing.assert_close(got, want)
    assert flashcl.sup_con(z, labels, temperature=1.0, backend=backend).isposinf()


def test_rows_that_are_padding_harm_no_other(backend):
    """Blocks without a pair for a row are put together by logaddexp, whose gradient at -inf is NaN."""
    padding = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    grads = []
    for of in (functools.partial(flashcl.similarity_logsumexp, backend=backend), reference.similarity_logsumexp):
        x, y = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (4, 9))
        row_bias, scale = padding.clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
        parts = [of(x, part, logit_scale=scale, row_bias=row_bias, axis="rows") for part in (y[:4], y[4:])]
        torch.where(padding.isinf(), 0.0, torch.logaddexp(*parts)).sum().backward()
        grads.append([x.grad, y.grad, row_bias.grad, scale.grad])
    assert all(v.isfinite().all() for v in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_a_bad_line_stays_alone_where_the_others_are_not_used(backend, used):
    """Of two outputs one is used, and not where it is NaN."""
    bad, grads = 3, []
    for of in (functools.partial(flashcl.similarity_logsumexp, backend=backend), reference.similarity_logsumexp):
        x, y = (torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
        (x, y)[used][bad] = math.nan
        grads.append(torch.autograd.grad(of(x, y.requires_grad_())[used][torch.arange(6) != bad].sum(), y)[0])
        assert grads[-1].isnan().any(1).tolist() == [used == 0 or j == bad for j in range(6)], of
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---- layouts


LAYOUTS = {
    "transposed": lambda v: v.T.contiguous().T,
    "columns of a wider matrix": lambda v: F.pad(v, (3, 5), value=math.nan)[:, 3:-5],
    "every other row": lambda v: torch.stack([v, torch.full_like(v, math.nan)], dim=1).flatten(0, 1)[::2],
    "every other column": lambda v: torch.stack([v, torch.full_like(v, math.nan)], dim=2).flatten(1)[:, ::2],
    "rows of a longer matrix": lambda v: F.pad(v, (0, 0, 7, 9), value=math.nan)[7:-9],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts(backend, loss, layout):
    c = case(loss, "init", n=21)
    for dtype in (SINGLE, BF16):
        assert violations(c, dtype, function=through(c, backend, before=LAYOUTS[layout])) == []


@pytest.mark.parametrize("n, stride", [(4, 2**30), (400, 2**23 - 16)])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "nt_xent"])  # which works on a copy
def test_rows_far_apart(backend, loss, n, stride):
    """Offsets beyond 2^31, within a tile and from tile to tile, in memory that is never touched."""
    c = case(loss, "init", n=n, m=n).to(BF16)

    def spread(v):
        v = v.detach()
        no_reserve = 0x4000  # MAP_NORESERVE of Linux, which Python names since 3.13
        nowhere = mmap.mmap(-1, 2 * stride * len(v), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        far = torch.frombuffer(nowhere, dtype=BF16).as_strided(v.shape, (stride, 1))
        far.copy_(v)
        return far

    leaves = {k: (spread(v) if v.dim() == 2 else v).requires_grad_() for k, v in c.tensors.items()}
    values = through(c, backend)(**leaves, **c.options)
    values = values if isinstance(values, tuple) else (values,)
    gradients = torch.autograd.grad(values, list(leaves.values()), [contract._upstream(v, None) for v in values])
    plain = evaluate(through(c, backend), c)
    assert torch.equal(values[0], plain["value"])
    for name, g in zip(leaves, gradients):
        assert torch.equal(g, plain[f"grad {name}"])


@pytest.mark.parametrize("loss", LOSSES)
def test_expanded_inputs(backend, loss):
    """Rows with stride 0, and a bias that is one number for all rows."""
    c = per_row(loss, "collapsed", n=21).to(SINGLE)
    copies = {name: v[:1].repeat(len(v), 1) if v.dim() == 2 else v for name, v in c.tensors.items()}
    expected = evaluate(getattr(reference, c.function), replace(c, tensors=copies).to(DOUBLE))
    leaves = {}
    for name, v in c.tensors.items():
        leaves[name] = (v[:1].expand_as(v) if v.dim() == 2 else v.clone()).detach().requires_grad_()
    values = through(c, backend)(**leaves, **c.options)
    values = values if isinstance(values, tuple) else (values,)
    gradients = torch.autograd.grad(values, list(leaves.values()), [contract._upstream(v, None) for v in values])
    torch.testing.assert_close(values[0].double(), expected["value"], rtol=1e-5, atol=1e-5)
    for name, g in zip(leaves, gradients):
        assert g.shape == leaves[name].shape
        largest = expected[f"grad {name}"].abs().max().item()
        torch.testing.assert_close(g.double(), expected[f"grad {name}"], rtol=0, atol=1e-4 * (largest + 1))


UPSTREAM = {
    "sum": lambda v: v.sum(),  # an upstream gradient of stride 0
    "strided": lambda v: v[::2].sum() + v[1::2].sum(),
    "expanded": lambda v: v[:, None].expand(-1, 3).sum() / 3,
    "concatenated": lambda v: torch.cat([v, v]).sum() / 2,
    "of one row": lambda v: (v * F.one_hot(torch.tensor(3), len(v))).sum(),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_layouts(backend, loss, upstream):
    c = per_row(loss, "init", n=21, **(dict(axis="rows") if loss.startswith("logsumexp") else {})).to(SINGLE)
    expected = evaluate(lambda **k: UPSTREAM[upstream](getattr(reference, c.function)(**k)), c)
    results = evaluate(through(c, backend, after=UPSTREAM[upstream]), c)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=2e-4, atol=2e-5)


# ---- autograd


@pytest.mark.parametrize("regime", ["cone", "converged"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_subset_of_gradients(backend, loss, regime):
    c = case(loss, regime, n=21).to(SINGLE)
    everything = evaluate(through(c, backend), c)
    for size in range(len(c.tensors)):
        for wanted in itertools.combinations(c.tensors, size):
            leaves = {name: v.clone().requires_grad_(name in wanted) for name, v in c.tensors.items()}
            values = through(c, backend)(**leaves, **c.options)
            values = values if isinstance(values, tuple) else (values,)
            assert torch.equal(values[0], everything["value"])
            assert values[0].requires_grad == bool(wanted)
            if wanted:
                torch.autograd.backward(values, [contract._upstream(v, None) for v in values])
            for name, leaf in leaves.items():
                if name not in wanted:
                    assert leaf.grad is None
                    continue
                full = everything[f"grad {name}"]
                torch.testing.assert_close(leaf.grad, full, rtol=1e-4, atol=1e-5 * full.abs().max().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_no_grad(backend, loss):
    c = case(loss, "init", n=21).to(BF16)
    leaves = {name: v.clone().requires_grad_() for name, v in c.tensors.items()}
    with torch.no_grad():
        values = through(c, backend)(**leaves, **c.options)
    for value in values if isinstance(values, tuple) else (values,):
        assert not value.requires_grad and value.dtype == SINGLE


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_dtypes_of_results(backend, dtype, loss):
    c = case(loss, "init", n=5).to(dtype)
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    for name, v in evaluate(through(c, backend), c).items():
        if name.startswith("grad"):
            leaf = c.tensors[name.removeprefix("grad ")]
            assert (v.dtype, v.shape) == (leaf.dtype, leaf.shape)
        else:
            assert v.dtype == wide


@pytest.mark.parametrize("other", [SINGLE, DOUBLE, BF16])
def test_scalars_of_any_dtype_and_form(backend, other):
    """A scale is a number, 0-d or of one element, in any dtype: its gradient has its dtype and shape."""
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    expected = flashcl.siglip(x, y, logit_scale=2.0, logit_bias=-0.5, backend=backend)
    for shape in ((), (1,), (1, 1)):
        t, b = (torch.full(shape, v, dtype=other, requires_grad=True) for v in (2.0, -0.5))
        loss = flashcl.siglip(x, y, logit_scale=t, logit_bias=b, backend=backend)
        dt, db = torch.autograd.grad(loss, (t, b))
        assert torch.equal(loss, expected)
        assert (dt.dtype, dt.shape, db.dtype, db.shape) == (other, shape, other, shape)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", TWO)
def test_same_bits_twice(backend, dtype, loss):
    torch.use_deterministic_algorithms(False)  # what poisons memory must not be what makes the bits the same
    c = case(loss, "init", n=37).to(dtype)
    first, second = evaluate(through(c, backend), c), evaluate(through(c, backend), c)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_on_two_threads(loss, monkeypatch):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    c = case(loss, "init", n=600, d=64).to(SINGLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (evaluate(through(c, "torch"), c) for _ in range(6))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can run programs in another order")
@pytest.mark.parametrize("loss", LOSSES)
def test_program_order_does_not_matter(loss):
    import interpreter

    c = case(loss, "init", n=70, m=75).to(BF16)
    forward = evaluate(through(c, "triton"), c)
    with interpreter.reversed_programs():
        backward = evaluate(through(c, "triton"), c)
    for name in forward:
        assert torch.equal(forward[name], backward[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice(backend, loss):
    """A retained graph gives the same gradient again, twice the upstream twice the gradient; .grad accumulates."""
    c = case(loss, "init", n=21).to(SINGLE)
    leaves = {name: v.clone().requires_grad_() for name, v in c.tensors.items()}
    values = through(c, backend)(**leaves, **c.options)
    total = total_of(values)
    once = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    kept = [g.clone() for g in once]
    doubled = torch.autograd.grad(2 * total, list(leaves.values()), retain_graph=True)
    total.backward(retain_graph=True)
    total.backward()
    for g, k, d, leaf in zip(once, kept, doubled, leaves.values()):
        assert torch.equal(g, k), "a gradient that was handed out changed later"
        assert torch.equal(d, 2 * k)
        assert torch.equal(leaf.grad, 2 * k)


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_are_left_alone(backend, loss):
    c = case(loss, "init", n=21).to(SINGLE)
    leaves = {name: v.clone().requires_grad_() for name, v in c.tensors.items()}
    values = through(c, backend)(**leaves, **c.options)
    total_of(values).backward()
    for name, leaf in leaves.items():
        assert leaf._version == 0 and torch.equal(leaf, c.tensors[name])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "siglip"])
def test_edits_between_forward_and_backward_are_detected(backend, loss):
    c = case(loss, "init", n=21).to(SINGLE)
    for edited in [name for name, v in c.tensors.items() if v.dim() == 2]:
        leaves = {name: v.clone().requires_grad_() for name, v in c.tensors.items()}
        # A product of the leaf, since a leaf that needs a gradient cannot be edited.
        inputs = leaves | {edited: leaves[edited] * 1}
        values = through(c, backend)(**inputs, **c.options)
        if loss == "nt_xent":  # works on a copy, [z1; z2]: nothing to detect, and nothing goes wrong
            expected = evaluate(through(c, backend), c)[f"grad {edited}"]
            inputs[edited].data.mul_(2)
            assert torch.equal(torch.autograd.grad(values, leaves[edited])[0], expected)
            continue
        inputs[edited].detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total_of(values).backward()


def test_autocast_of_towers_of_two_dtypes(backend):
    """A tower under autocast beside cached float32 embeddings: both are cast, as x @ y.T would cast them."""
    x, y = (v.float() for v in case("info_nce", "init").tensors.values() if v.dim() == 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
        of_views = flashcl.nt_xent(x.half(), y.bfloat16(), temperature=0.1, backend=backend)
    assert torch.equal(got, flashcl.info_nce(x.bfloat16(), y.bfloat16(), temperature=0.1, backend=backend))
    assert torch.equal(of_views, flashcl.nt_xent(x.half().bfloat16(), y.bfloat16(), temperature=0.1, backend=backend))
    with pytest.raises(TypeError, match="y must have the dtype of x"):
        flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
    y = y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
    (dy,) = torch.autograd.grad(loss, y)
    assert not torch.equal(dy, dy.bfloat16().float())


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(backend, loss):
    """Inside autocast float32 embeddings are computed on in bfloat16; gradients come back in float32, and not rounded."""
    c = case(loss, "init", n=21).to(SINGLE)

    def inside(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return through(c, backend)(**arguments)

    outside = evaluate(through(c, backend), c.to(BF16))
    for name, v in evaluate(inside, c).items():
        assert v.dtype == SINGLE
        torch.testing.assert_close(v.to(outside[name].dtype), outside[name], rtol=0, atol=0)
        assert v.numel() == 1 or not name.startswith("grad") or not torch.equal(v, v.to(BF16).float())


def test_unusable_backends_say_why():
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        flashcl.info_nce(x, x, temperature=1.0, backend="cuda")
    with pytest.raises(RuntimeError, match="'triton' cannot serve torch.float64"):
        flashcl.info_nce(x.double(), x.double(), temperature=1.0, backend="triton")


def test_labels_are_any_integers(backend):
    """Of any integer dtype, beyond int32, and equal modulo 2^32: they are only compared."""
    c = case("sup_con", "init", n=21).to(SINGLE)
    labels, z = c.options["labels"], c.tensors["z"]
    expected = flashcl.sup_con(z, labels, backend=backend)
    for other in (labels.int(), labels.short(), labels.to(torch.uint8), labels * 2**40 - 7, labels * 2**33 - 2**34, -labels):
        assert torch.equal(flashcl.sup_con(z, other, backend=backend), expected)


def test_labels_may_be_edited_after_the_forward(backend):
    c = case("sup_con", "init", n=21).to(SINGLE)
    labels, z = c.options["labels"], c.tensors["z"].clone().requires_grad_()
    expected = torch.autograd.grad(flashcl.sup_con(z, labels, backend=backend), z)
    loss = flashcl.sup_con(z, labels, backend=backend)
    labels.copy_(torch.arange(21) % 4)
    assert torch.equal(torch.autograd.grad(loss, z)[0], expected[0])
