"""What a loss owes to autograd: which gradients are made, again and again, and what may happen to inputs in between."""

import itertools
import weakref

import pytest
import torch
from calls import BF16, DOUBLE, SINGLE, each_of, through, total_of
from conftest import EVERY

import flashcl
from flashcl import contract
from flashcl.contract import LOSSES, case, evaluate
from flashcl.engine import ops

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


def leaves_of(c):
    return {name: v.clone().requires_grad_() for name, v in c.tensors.items()}


@pytest.mark.parametrize("regime", ["cone", "converged"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_subset_of_gradients(backend, loss, regime):
    c = case(loss, regime, n=21).to(SINGLE)
    everything = evaluate(through(c, backend), c)
    for size in range(len(c.tensors)):
        for wanted in itertools.combinations(c.tensors, size):
            leaves = {name: v.clone().requires_grad_(name in wanted) for name, v in c.tensors.items()}
            values = each_of(through(c, backend)(**leaves, **c.options))
            assert torch.equal(values[0], everything["value"])
            assert values[0].requires_grad == bool(wanted)
            if wanted:
                torch.autograd.backward(values, [contract.upstream(v) for v in values])
            for name, leaf in leaves.items():
                if name not in wanted:
                    assert leaf.grad is None
                    continue
                full = everything[f"grad {name}"]
                torch.testing.assert_close(leaf.grad, full, rtol=1e-4, atol=1e-5 * full.abs().max().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_no_grad(backend, loss):
    c = case(loss, "init", n=21).to(BF16)
    with torch.no_grad():
        values = through(c, backend)(**leaves_of(c), **c.options)
    for value in each_of(values):
        assert not value.requires_grad and value.dtype == SINGLE


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice(backend, loss):
    """A retained graph gives the same gradient again, twice the upstream twice the gradient; .grad accumulates."""
    c = case(loss, "init", n=21).to(SINGLE)
    leaves = leaves_of(c)
    total = total_of(through(c, backend)(**leaves, **c.options))
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
    leaves = leaves_of(c)
    total_of(through(c, backend)(**leaves, **c.options)).backward()
    for name, leaf in leaves.items():
        assert leaf._version == 0 and torch.equal(leaf, c.tensors[name])


def after_edits(c, backend):
    """The leaves and the loss, for each matrix of embeddings: it is edited between the forward and the backward."""
    for edited in [name for name, v in c.tensors.items() if v.dim() == 2]:
        leaves = leaves_of(c)
        # A product of the leaf, since a leaf that needs a gradient cannot be edited.
        inputs = leaves | {edited: leaves[edited] * 1}
        total = total_of(through(c, backend)(**inputs, **c.options))
        inputs[edited].detach().mul_(2)
        yield leaves, total


# The losses that read their embeddings again in the backward.
READ_AGAIN = {loss: {} for loss in LOSSES if loss not in ("nt_xent", "siglip")} | {"siglip": dict(reduction="none")}


@pytest.mark.parametrize("loss", READ_AGAIN)
def test_edits_between_forward_and_backward_are_detected(backend, loss):
    c = case(loss, "init", n=21, **READ_AGAIN[loss]).to(SINGLE)
    for _, total in after_edits(c, backend):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def assert_edits_are_harmless(c, backend):
    expected = evaluate(through(c, backend), c)
    for leaves, total in after_edits(c, backend):
        for name, g in zip(leaves, torch.autograd.grad(total, list(leaves.values()))):
            assert torch.equal(g, expected[f"grad {name}"])


def test_edits_are_harmless_to_nt_xent(backend):
    """It works on a copy of its views, [z1; z2]."""
    assert_edits_are_harmless(case("nt_xent", "init", n=21).to(SINGLE), backend)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_edits_are_harmless_to_siglip(backend, reduction):
    """Its gradients are made in the forward, but for those of reduction "none"."""
    assert_edits_are_harmless(case("siglip", "init", n=21, reduction=reduction).to(SINGLE), backend)


def test_labels_may_be_edited_after_the_forward(backend):
    c = case("sup_con", "init", n=21).to(SINGLE)
    labels, z = c.options["labels"], c.tensors["z"].clone().requires_grad_()
    expected = torch.autograd.grad(flashcl.sup_con(z, labels, backend=backend), z)
    loss = flashcl.sup_con(z, labels, backend=backend)
    labels.copy_(torch.arange(21) % 4)
    assert torch.equal(torch.autograd.grad(loss, z)[0], expected[0])


@pytest.mark.parametrize("backend, dtype", [param for param in EVERY if param.values[1] in (SINGLE, DOUBLE)])
@pytest.mark.parametrize("loss", LOSSES)
def test_results_may_be_written_to(backend, loss, dtype):
    c = case(loss, "init", n=5).to(dtype)
    values = each_of(through(c, backend)(**leaves_of(c), **c.options))
    before = [v.detach().clone() for v in values]
    for v, was in zip(values, before):
        v += 1
        assert torch.equal(v.detach(), was + 1)


@pytest.mark.parametrize("loss", ["info_nce", "logsumexp"])
def test_a_wide_gradient_is_given_back_before_the_other_is_rounded(loss, monkeypatch):
    """Both of a million rows would be a tenth of the memory of a step."""
    wide, alive = [], []

    def finish(acc, *args, real=ops.finish, **options):
        alive.append(sum(v() is not None for v in wide))
        wide.append(weakref.ref(acc))
        return real(acc, *args, **options)

    monkeypatch.setattr(ops, "finish", finish)
    c = case(loss, "init").to(BF16)
    evaluate(getattr(flashcl, c.function), c)
    assert alive == [0, 0]
