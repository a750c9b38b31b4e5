"""Every loss against the numeric contract (flashcl/contract.py): regimes, shapes, options, and numbers that are easily lost.

The torch backend runs as it is and the triton backend in the hardened interpreter, on poisoned memory. Tiles are made
small where a backend would see all rows in one.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import BF16, DOUBLE, HALF, KNOWN, REDUCED, SINGLE, per_row, through
from conftest import EVERY, INTERPRETED, TWO

import flashcl
from flashcl import reference
from flashcl.backends import torch as torch_backend
from flashcl.contract import LOSSES, REGIMES, case, evaluate, violations

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


# ---- regimes, shapes, options


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_regimes(backend, dtype, loss, regime, request):
    if backend != "torch" and (reason := KNOWN.get((loss, regime, dtype))):
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
@pytest.mark.parametrize("loss", REDUCED)
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_reductions(backend, dtype, loss, reduction):
    assert violations(case(loss, "init", n=37, reduction=reduction), dtype, backend=backend) == []


@pytest.mark.parametrize("loss", REDUCED)
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
@pytest.mark.parametrize("loss", REDUCED)
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


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("regime", ["cone", "t=0.005"])
@pytest.mark.parametrize("loss", LOSSES)
def test_many_blocks(loss, regime, monkeypatch):
    """The triton backend with hardly any workspace: S in blocks of one tile, which must add up to the same."""
    from flashcl.backends.triton import Plan

    of = Plan.of
    monkeypatch.setattr(Plan, "of", lambda *args: replace(of(*args), workspace=1))
    for dtype in (SINGLE, BF16):
        assert violations(case(loss, regime, n=75, m=140), dtype, backend="triton") == []


# ---- numbers that are easily lost


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
    monkeypatch.setattr(torch_backend, "_CPU_TILE", (1024, 16))
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


@pytest.mark.parametrize("axis", ["both", "rows"])
def test_the_scale_of_log_sum_exps_of_long_embeddings(axis):
    """Their products fit float32, the sum of all products does not."""
    c = case("logsumexp", "cone", n=600, m=600, d=8, axis=axis)
    c = replace(c, tensors=c.tensors | dict(x=c.tensors["x"] * 1e17, y=c.tensors["y"] * 1e17, logit_scale=torch.tensor(1e-33)))
    got = evaluate(through(c.to(SINGLE), "torch"), c.to(SINGLE))["grad logit_scale"]
    want = evaluate(reference.similarity_logsumexp, c.to(DOUBLE))["grad logit_scale"]
    assert got.isfinite() and abs(got / want - 1) < 1e-4


def test_softplus_has_no_threshold():
    """PyTorch's default would be off by 2e-9 beyond s = 20."""
    x, y = torch.tensor([[25.0], [24.0]], dtype=DOUBLE), torch.tensor([[-1.0], [1.0]], dtype=DOUBLE)
    got = flashcl.siglip(x, y, logit_scale=1.0, logit_bias=0.0, reduction="none", backend="torch")
    z = 2 * torch.eye(2, dtype=DOUBLE) - 1
    torch.testing.assert_close(got, torch.logaddexp(torch.zeros_like(z), -z * (x @ y.T)).sum(1), rtol=1e-14, atol=0)


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
