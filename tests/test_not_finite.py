"""NaN and infinity in the inputs, and rows without any pair: what comes out, and that nothing else is spoilt."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from calls import SINGLE, per_row, through

import flashcl
from flashcl import reference
from flashcl.contract import LOSSES, case, evaluate

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


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
    """Two rows of one label whose product overflows, alone and beside a third: their loss is inf, as in the dense formula."""
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


@pytest.mark.parametrize("bias", ["row_bias", "col_bias"])
def test_no_pair_at_all_has_no_gradient(backend, bias):
    x, y = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    rows, cols = flashcl.similarity_logsumexp(x, y, backend=backend, **{bias: torch.full((3,), -torch.inf)})
    assert rows.isneginf().all() and cols.isneginf().all()
    for g in torch.autograd.grad((rows, cols), (x, y), (torch.ones(3), torch.ones(3))):
        assert torch.equal(g, torch.zeros_like(g))
