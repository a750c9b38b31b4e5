"""All that a backend gives for a block of logits, to be compared: on a GPU, on a simulated one, on the CPU."""

import dataclasses
import math

import torch

from flashcl.engine.problem import Needs, Problem, Sigmoid, Softmax

# (N, M, D): one tile to 9, ragged or not, D below, at and beyond the 64 of a step.
SHAPES = [(1, 1, 8), (128, 128, 64), (129, 127, 72), (255, 300, 8), (300, 280, 136)]


def problem(N, M, D, program="all", triangular=False, *, dtype=torch.bfloat16, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def vectors(size, first):
        ids = torch.arange(size, dtype=torch.int32) + first
        labels = torch.randint(9, (size,), generator=g, dtype=torch.int32)
        return tuple(v.to(device) for v in (ids, labels)[: {"all": 0, "different": 1, "by_label": 2}[program]])

    x = torch.randn(N, D, generator=g).to(device, dtype)
    y = x if triangular else torch.randn(M, D, generator=g).to(device, dtype)
    rows = vectors(N, 0)
    cols = rows if triangular else vectors(M, 3)
    scale = torch.full((1,), 2 / math.sqrt(D), device=device)
    return Problem(x, y, scale, None, None, program, rows, cols, triangular=triangular)


def wide(p):
    """The same problem in float64."""
    x = p.x.double()
    return dataclasses.replace(p, x=x, y=x if p.triangular else p.y.double(), logit_scale=p.logit_scale.double())


def everything(backend, p):
    """Statistics and gradients, as named tensors."""
    s = backend.sweep(p, need_cols=True, keep=False)
    col = s.row if p.triangular else s.col
    halves = [torch.full_like(v.top, 0.5) for v in (s.row, col)]
    c = Softmax(halves[0], s.row.top, *(() if p.triangular else (halves[1], col.top)))
    out = dict(row=s.row.value(), col=col.value())
    coefficients = [c] if p.classes == 2 or p.triangular else [c, Sigmoid(torch.ones(len(p.x), device=p.x.device))]
    for c in coefficients:
        g = backend.grad(p, c, Needs(x=True, y=True, row_bias=not p.triangular, col_bias=not p.triangular, scale=True))
        out |= {f"{type(c).__name__} {k}": v for k, v in vars(g).items() if v is not None}
    return out


def assert_near(got, want, of_logits=1e-6):
    """They differ in exp, in the order within a product and in the order of the GEMMs, by little."""
    assert got.keys() == want.keys()
    for name, v in want.items():
        of_g = 5e-3 if name.endswith((" dx", " dy")) else 2e-5  # rounded, and not
        tolerance = of_logits if name in ("row", "col", "Sigmoid row_sum") else of_g
        v, out = v.double(), got[name].cpu().double()
        finite = v.isfinite()
        torch.testing.assert_close(out[~finite], v[~finite], rtol=0, atol=0, equal_nan=True)
        error = (out - v)[finite].abs().max() if finite.any() else torch.zeros(())
        assert error <= tolerance * max(v[finite].abs().max().item() if finite.any() else 0, 1e-3), f"{name}: {error:.1e}"
