"""Small float64 inputs for the tests of flashcl.reference, and when two results are one formula."""

import torch

DIM = 3
SIZES = range(1, 8)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed, dtype=torch.float64, grad=False):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


def assert_equal(actual, expected, rtol=1e-12, atol=1e-13):
    """Same shape, and close enough to be the same float64 formula; `expected` may be a (nested) list of numbers."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=rtol, atol=atol)
