"""Embeddings, biases and upstream gradients as they may lie in memory: strided, expanded, far apart."""

import math
import mmap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import BF16, DOUBLE, REDUCED, SINGLE, each_of, per_row, through

from flashcl import contract, reference
from flashcl.contract import LOSSES, case, evaluate, violations

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


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


def results_of(c, backend, leaves):
    """As `evaluate`, which would copy the leaves: the first value, and the gradient of each leaf."""
    values = each_of(through(c, backend)(**leaves, **c.options))
    gradients = torch.autograd.grad(values, list(leaves.values()), [contract.upstream(v) for v in values])
    return values[0], dict(zip(leaves, gradients))


@pytest.mark.parametrize("n, stride", [(4, 2**30), (264, 2**23 - 16)])
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
    value, gradients = results_of(c, backend, leaves)
    plain = evaluate(through(c, backend), c)
    assert torch.equal(value, plain["value"])
    for name, g in gradients.items():
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
    value, gradients = results_of(c, backend, leaves)
    torch.testing.assert_close(value.double(), expected["value"], rtol=1e-5, atol=1e-5)
    for name, g in gradients.items():
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
    c = per_row(loss, "init", n=21, **({} if loss in REDUCED else dict(axis="rows"))).to(SINGLE)
    expected = evaluate(lambda **k: UPSTREAM[upstream](getattr(reference, c.function)(**k)), c)
    results = evaluate(through(c, backend, after=UPSTREAM[upstream]), c)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=2e-4, atol=2e-5)
