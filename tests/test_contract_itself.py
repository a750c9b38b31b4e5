"""The contract itself (flashcl/contract.py): a check that cannot fail is a defect.

Implementations with faults to order must break it, the truth must hold, and its arithmetic is done once by hand.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calls import BF16, DOUBLE, HALF, REDUCED, SINGLE, each_of, per_row

import flashcl
from flashcl import contract, reference
from flashcl.contract import LOSSES, REGIMES, case, evaluate, violations


def dense(c):
    return getattr(reference, c.function)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, v, factor):
        ctx.factor = factor
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class CommonUpstream(torch.autograd.Function):
    """The identity, which takes the upstream gradient of row 0 for that of all rows."""

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return g[:1].expand_as(g)


def in_float64(c, value_factor=1.0, **gradient_factors):
    """A nearly perfect implementation, with faults to order."""

    def function(**arguments):
        for name, v in c.tensors.items():
            arguments[name] = Scaled.apply(arguments[name].double(), gradient_factors.get(name, 1.0))
        return tuple(Scaled.apply((v * value_factor).float(), 1 / value_factor) for v in each_of(dense(c)(**arguments)))

    return function


@pytest.mark.parametrize("loss", ["info_nce", "siglip", "nt_xent", "sup_con"])
@pytest.mark.parametrize("dtype, of_value, of_gradient", [(BF16, 2e-3, 8e-3), (HALF, 5e-4, 2e-3)])
def test_the_tight_bound_is_what_the_readme_says(dtype, of_value, of_gradient, loss):
    c = case(loss, "init", n=40)

    def found(**factors):
        return {f.quantity for f in violations(c, dtype, function=in_float64(c, **factors)) if f.bound == "tight"}

    assert found(value_factor=1 + 2 * of_value) == {"value"} and found(value_factor=1 + 0.5 * of_value) == set()
    for name in c.tensors:
        assert found(**{name: 1 + 2 * of_gradient}) == {f"grad {name}"} and found(**{name: 1 + 0.5 * of_gradient}) == set()


def test_the_backend_that_is_named_is_judged():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
        contract.check(case("info_nce", "init", n=3), SINGLE, backend="cuda")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF])
def test_the_contract_accepts_the_truth(dtype, loss):
    for regime in REGIMES:
        c = case(loss, regime, n=13)
        assert violations(c, dtype, function=in_float64(c)) == [], regime
        assert dtype != SINGLE or violations(c, dtype, function=dense(c)) == [], regime


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype, off", [(SINGLE, 1e-4), (HALF, 1e-2), (BF16, 3e-2)])
def test_the_contract_sees_a_wrong_factor_in_each_quantity(dtype, off, loss):
    c = case(loss, "init", n=13)
    assert violations(c, dtype, function=in_float64(c, value_factor=1 + off))
    for name in c.tensors:
        found = violations(c, dtype, function=in_float64(c, **{name: 1 + off}))
        assert found and all(finding.quantity == f"grad {name}" for finding in found)


@pytest.mark.parametrize("dtype", [SINGLE, BF16])
@pytest.mark.parametrize("loss", REDUCED)
def test_the_contract_sees_a_common_upstream_gradient(dtype, loss):
    c = per_row(loss, n=13)
    found = violations(c, dtype, function=lambda **k: CommonUpstream.apply(dense(c)(**k)))
    assert {finding.quantity for finding in found} >= {f"grad {k}" for k, v in c.tensors.items() if v.dim() == 2}


def test_the_contract_sees_a_padded_column():
    """exp(0) = 1 too many in each sum, invisible where all other terms are larger."""
    c = case("logsumexp", "t=1", n=40, m=40)

    def padded(x, y, logit_scale, row_bias, col_bias, exclude):
        y, col_bias = F.pad(y, (0, 0, 0, 1)), F.pad(col_bias, (0, 1))
        rows, cols = reference.similarity_logsumexp(x, y, logit_scale=logit_scale, row_bias=row_bias, col_bias=col_bias)
        return rows, cols[:-1]

    for dtype in (SINGLE, BF16):
        assert {"value", "grad x"} <= {finding.quantity for finding in violations(c, dtype, function=padded)}


def test_the_contract_sees_a_dropped_row_and_a_bf16_accumulator():
    c = case("info_nce one-way", "t=0.01", n=40, d=64)

    def dropped(x, y, temperature, symmetric):
        x = torch.cat([x[:-1], x[-1:].detach()])
        return reference.info_nce(x, y, temperature=temperature, symmetric=symmetric)

    assert violations(c, SINGLE, function=dropped) and violations(c, BF16, function=dropped)
    found = {finding.quantity for finding in violations(c, BF16, function=dense(c))}
    assert found >= {"grad x", "grad y"}, "logits rounded to bfloat16 must not pass the tight bound"


def test_the_contract_sees_nan_and_missing_infinity():
    truth = contract.Truth(torch.tensor([1.0, math.nan, -math.inf, 2.0], dtype=DOUBLE))
    no_error = [torch.zeros(4, dtype=DOUBLE)]

    def judge(*out):
        found = contract.judge("value", torch.tensor(out), truth, no_error)
        return [finding.bound for finding in found if not finding.holds]

    assert judge(1, math.nan, -math.inf, 2) == []
    assert judge(1, math.nan, math.inf, 2) == ["non-finite"]
    assert judge(1, 0, -math.inf, 2) == ["non-finite"]
    assert judge(math.nan, math.nan, -math.inf, 2) == ["non-finite"]
    assert judge(1, math.nan, -math.inf, 2.001) == ["max", "rms"]
    with pytest.raises(AssertionError, match="shape"):
        contract.judge("value", torch.ones(3), truth, no_error)


def test_the_bounds_by_hand():
    ref = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE)
    out, truth = torch.tensor([1.0, 2.0, 4.5]), contract.Truth(ref)
    max_, rms, tight = contract.judge("value", out, truth, [ref * 0.25], [ref * 0.125], tight=0.125)[1:]
    half_ulp = 2.0**-24
    assert (max_.error, max_.allowed) == (0.5, 2 * 1.0 + 2 * half_ulp * 4)
    assert rms.error == pytest.approx(math.sqrt(0.25 / 3))
    assert rms.allowed == pytest.approx((2 * 0.25 + 2 * half_ulp) * math.sqrt(21 / 3))
    assert (tight.error, tight.allowed) == (0.5, pytest.approx((0.125 + 4 * 0.125) * math.sqrt(21)))
    alike = contract.judge("value", out, truth, [ref * 0.25] * 16, [ref * 0.125] * 16, tight=0.125)[1:]
    assert alike == [max_, rms, tight]  # the largest error of all orders, not their sum
    assert contract.judge("value", out, truth, [ref * math.nan])[1].allowed == math.inf  # a dense formula overflowed
    lost = torch.tensor([1e-9], dtype=DOUBLE)  # what float16 cannot hold at all is rounding, to 0
    assert contract.judge("grad x", torch.zeros(1).half(), contract.Truth(lost), [0 * lost])[1].holds
    assert not contract.judge("grad x", torch.full((1,), 1e-7).half(), contract.Truth(lost), [0 * lost])[1].holds
    vanishing = contract.judge("grad x", out, truth, [ref * 0.25], [ref * 0.5], tight=0.125)
    assert [finding.bound for finding in vanishing] == ["non-finite", "max", "rms"]
    beyond = contract.Truth(torch.tensor([1.0, 2.0, 7e4], dtype=DOUBLE))  # the last is inf in float16, and must be
    for third, broken in ((math.inf, []), (65504.0, ["non-finite"]), (-math.inf, ["non-finite"])):
        found = contract.judge("value", torch.tensor([1.0, 2.0, third]).half(), beyond, [0 * beyond.high], [0 * beyond.high], tight=2e-3)
        assert [finding.bound for finding in found if not finding.holds] == broken
    found = contract.judge("value", torch.tensor([-5.0, 900.0, math.inf]).half(), beyond, [0 * ref], [0 * ref], tight=2e-3)
    assert [finding.bound for finding in found if not finding.holds] == ["max", "rms", "tight"]
    longer = contract.Truth(torch.ones(1, dtype=DOUBLE), torch.full((1,), 1e-17, dtype=DOUBLE))
    assert longer.error(torch.ones(1, dtype=DOUBLE)).item() == -1e-17


def test_the_worst_error_is_nan_where_one_is():
    one = contract.Truth(torch.ones(2, dtype=DOUBLE))
    yardstick = contract.Yardstick(None, SINGLE, {"value": one, "grad x": one}, [], None)
    assert yardstick.worst({"value": torch.full((2,), 1e-7), "grad x": torch.full((2,), 1e-3)}) == pytest.approx(1e-3)
    for quantity in ("value", "grad x"):
        errors = {"value": torch.full((2,), 1e-7), "grad x": torch.full((2,), 1e-7)}
        assert math.isnan(yardstick.worst(errors | {quantity: torch.tensor([0.0, math.nan])}))


@pytest.mark.parametrize("regime", ["init", "converged", "t=10"])
@pytest.mark.parametrize("loss", LOSSES)
def test_both_oracles_agree(loss, regime):
    """The dense float64 formula and the others, which share nothing."""
    vectors = [dict(axis=axis) for axis in ("both", "rows", "cols")]
    scalars = [dict(reduction=r, normalize=n) for r in ("none", "sum", "mean") for n in (False, True)]
    for options in scalars if loss in REDUCED else vectors:
        c = case(loss, regime, n=13, **options)
        truth, results = contract.truth_of(c), evaluate(dense(c), c)
        assert truth.keys() == results.keys()
        for quantity, v in results.items():
            assert truth[quantity].error(v).abs().max() < 1e-11, (quantity, options)
    assert any(t.low.abs().max() > 0 for t in truth.values()), "no digits beyond float64: is longdouble only a double?"


@pytest.mark.parametrize("loss", ["info_nce", "info_nce one-way", "nt_xent"])
def test_losses_below_the_rounding_of_float64_have_a_truth(loss):
    """In many dimensions a saturated loss is e^-80: 0 to the dense formula in float64, whose lse rounds to the positive."""
    c = case(loss, "saturated", n=40, d=512).to(SINGLE)
    wide = c.to(DOUBLE)
    assert evaluate(dense(wide), wide)["value"] == 0
    truth = contract.truth_of(c)
    assert 1e-38 < truth["value"].high < 1e-30
    for quantity, v in contract.exact_truth(c, np.longdouble).items():
        assert contract.judge(quantity, v.high, truth[quantity], [0 * v.high])[-1].error <= 1e-9 * v.high.abs().max()
    # The contract allows what the dense formula in float32 does, which is 0; flashcl has the digits.
    assert violations(c, SINGLE) == []
    assert evaluate(getattr(flashcl, c.function), c)["value"] == pytest.approx(truth["value"].high.item(), rel=1e-4)


def test_the_tight_bound_knows_underflow():
    """The gradient of 1 / N ends up below float16: what no float16 holds is allowed, and no more."""
    for size in (1e-7, 1e-2):
        ref = size * torch.randn(1000, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        truth, nothing, large = contract.Truth(ref), [0 * ref], [ref]
        bound = contract.judge("grad x", ref.half(), truth, large, nothing, tight=2e-3)[-1]
        assert bound.bound == "tight" and bound.holds
        assert not contract.judge("grad x", (ref + 3e-3 * ref.norm()).half(), truth, large, nothing, tight=2e-3)[-1].holds
    assert contract._underflow(ref, torch.half) == contract._underflow(1e-30 * ref, BF16) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_an_order_changes_nothing_but_rounding(loss):
    for c in (case(loss, "init", n=13), per_row(loss, n=13)):
        for errors in contract.dense_errors(c, contract.truth_of(c)):
            for quantity, error in errors.items():
                assert error.abs().max() < 1e-11, quantity
    c = per_row(loss, n=13).to(SINGLE)
    errors = contract.dense_errors(c, contract.truth_of(c))
    assert any(not torch.equal(errors[0][q], errors[1][q]) for q in errors[0]), "all orders are the same"


def test_regimes_are_what_they_say():
    def probabilities(regime, d=64):
        c = case("info_nce", regime, n=64, d=d)
        x, y, scale = c.tensors.values()
        s = scale * x @ y.T
        return s, s.softmax(dim=1).diagonal(), F.cosine_similarity(x[:, None], y, dim=2)

    assert probabilities("converged")[1].min() > 0.999
    assert 1 - probabilities("saturated")[1].min() < 1e-12
    assert 0.8 < probabilities("cone")[2].min() and probabilities("cone")[2].mean() < 0.95
    assert 5e3 < probabilities("large")[0].abs().max() < 1.001e4
    assert 0 < probabilities("collapsed")[0].std() < 0.2 * probabilities("init")[0].std()
    for name, regime in REGIMES.items():
        if name.startswith("t="):
            assert regime.temperature == float(name[2:])
    s = probabilities("duplicates")[0]
    assert torch.equal(s[2], s[3]) and torch.equal(s[:, 2], s[:, 3]) and not torch.equal(s[1], s[2])
    labels = case("sup_con", "init", n=40).options["labels"]
    sizes = labels.bincount()
    assert 1 in sizes and sizes.max() > 3
