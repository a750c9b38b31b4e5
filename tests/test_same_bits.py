"""The same inputs give the same bits."""

import pytest
import torch
from calls import BF16, SINGLE, through
from conftest import INTERPRETED, TWO

from flashcl.contract import LOSSES, case, evaluate

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


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
