"""A backend's sweep and grad beside the formulas of engine/problem.py in dense float64: on a GPU, a simulated one, or the CPU."""

import dataclasses
import math

import torch
from torch.nn.functional import softplus

from flashcl.dtypes import statistic_dtype
from flashcl.engine.problem import Needs, Problem, Sigmoid, Softmax

# (N, M, D): one tile to 9 of the CUDA kernels, ragged or not, D below, at and beyond the 64 of a step.
SHAPES = [(1, 1, 8), (128, 128, 64), (129, 127, 72), (255, 300, 8), (300, 280, 136)]


def problem(
    N, M, D, program="all", triangular=False, *,
    dtype=torch.bfloat16, device="cpu", scale=None, bias=False, seed=0, classes=4,
):  # fmt: skip
    """A block of random embeddings, with vectors for the program; scale: 2 / sqrt(D)."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g)

    def vectors(size, first):
        ids = torch.arange(size, dtype=torch.int32) + first
        labels = torch.randint(classes, (size,), generator=g, dtype=torch.int32) * 2**28 - 2**29  # any int32
        return tuple(v.to(device) for v in (ids, labels)[: {"all": 0, "different": 1, "by_label": 2}[program]])

    x = random(N, D).to(device, dtype)
    y = x if triangular else random(M, D).to(device, dtype)
    rows = vectors(N, 0)
    cols = rows if triangular else vectors(M, 3)
    wide = statistic_dtype(x)
    scale = torch.full((1,), 2 / math.sqrt(D) if scale is None else scale, dtype=wide, device=device)
    row_bias, col_bias = (random(N).to(device, wide), random(1).to(device, wide).expand(M)) if bias else (None, None)
    return Problem(x, y, scale, row_bias, col_bias, program, rows, cols, triangular=triangular)


def in_float64(p):
    """The same problem, without biases, in float64."""
    x = p.x.double()
    return dataclasses.replace(p, x=x, y=x if p.triangular else p.y.double(), logit_scale=p.logit_scale.double())


# ---- the formulas --------------------------------------------------------------------------------------------------------


def logits(p):
    """s (N, M) float64 with -inf where a pair is dropped; which pairs are dropped, and which are positives, (N, M)."""
    s = p.x.double() @ p.y.double().T * p.logit_scale.double()
    if p.row_bias is not None:
        s = s + p.row_bias.double()[:, None]
    if p.col_bias is not None:
        s = s + p.col_bias.double()
    no_pair = torch.zeros(s.shape, dtype=torch.bool)
    dropped = p.rows[0][:, None] == p.cols[0] if p.rows else no_pair
    positive = (p.rows[1][:, None] == p.cols[1]) & ~dropped if p.program == "by_label" else no_pair
    return s.masked_fill(dropped, -torch.inf), dropped, positive


def log_sum_exps(p):
    """Of the rows (K, N) and of the columns (K, M)."""
    s, _, positive = logits(p)
    classes = [s] if p.classes == 1 else [s.masked_fill(positive, -torch.inf), s.masked_fill(~positive, -torch.inf)]
    return torch.stack([s.logsumexp(1) for s in classes]), torch.stack([s.logsumexp(0) for s in classes])


def softplus_sums(p):
    """(N,)"""
    return softplus(logits(p)[0], threshold=50).sum(1)


def dense_g(p, c, size=False):
    """G (N, M), of a triangular problem G + G^T. size: what its terms add up to if none cancels another."""
    s, dropped, positive = logits(p)
    if isinstance(c, Sigmoid):
        return c.row_weight.double()[:, None] * s.sigmoid()
    row = c.row_weight, c.row_top, c.row_offset
    col = row if p.triangular else (c.col_weight, c.col_top, c.col_offset)
    g = torch.zeros_like(s)
    for k, member in enumerate([~positive, positive][: p.classes]):
        for (weight, top, offset), axis in ((row, 1), (col, 0)):
            if weight is None:
                continue
            weight, top = weight[k].double().unsqueeze(axis), top[k].double().unsqueeze(axis)
            terms = [torch.where(top == -torch.inf, 0.0, weight * (s - top).exp())]
            if k == 1 and offset is not None:
                terms.append(-offset.double().unsqueeze(axis))
            g += torch.where(member, sum(v.abs() if size else v for v in terms), 0.0)
    return g.masked_fill(dropped, 0.0)


def gradients(p, c):
    """All that `grad` gives, {name: float64}, and the size that d_scale would have if nothing cancelled."""
    x, y, g = p.x.double(), p.y.double(), dense_g(p, c)
    terms = g * (x @ y.T - (0 if isinstance(c, Sigmoid) or c.about is None else c.about.double()))
    out = dict(dx=g @ y, g_rows=g.sum(1), g_cols=g.sum(0), d_scale=terms.sum() / (2 if p.triangular else 1))
    if not p.triangular:
        out["dy"] = g.T @ x
    if isinstance(c, Sigmoid):
        out["row_sum"] = c.row_weight.double() * softplus_sums(p)
    size = terms.abs().sum() / (2 if p.triangular else 1)
    return out, torch.minimum(size, (out["dx"].abs() * x.abs()).sum() + 1e-30)


def softmax(p, *, cols=True, seed=1, weight=1.0):
    """Coefficients with random weights, some of them 0, and the true log-sum-exps."""
    g = torch.Generator().manual_seed(seed)
    row_top, col_top = (lse.to(p.stat_dtype) for lse in log_sum_exps(p))

    def random(*shape):
        w = torch.randn(shape, generator=g, dtype=p.stat_dtype) * weight
        return torch.where(torch.rand(shape, generator=g) < 0.2, 0.0, w)

    N, M, K = len(p.x), len(p.y), p.classes
    row_weight, col_weight, about = random(K, N), random(K, M), torch.tensor([0.3], dtype=p.stat_dtype)
    row_offset, col_offset = (0.1 * random(N), 0.1 * random(M)) if K == 2 else (None, None)
    if p.triangular or not cols:
        return Softmax(row_weight, row_top, row_offset=row_offset, about=about)
    return Softmax(row_weight, row_top, col_weight, col_top, row_offset, col_offset, about)


# ---- comparisons ---------------------------------------------------------------------------------------------------------


def assert_close(out, ref, tolerance, what="", relative=True):
    """The same infinities and NaNs, and elsewhere an error below the tolerance (relative: of the largest value)."""
    assert out.shape == ref.shape, what
    assert torch.equal(out.isnan(), ref.isnan()), f"{what}: NaN elsewhere than in the reference"
    infinite = ref.isinf()
    assert torch.equal(out.isinf(), infinite) and torch.equal(out[infinite].sign(), ref[infinite].to(out.dtype).sign()), what
    finite = ref.isfinite()
    if finite.any():
        error = (out.double() - ref)[finite].abs().max().item()
        bound = tolerance * (max(ref[finite].abs().max().item(), 1e-30) if relative else 1)
        assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


def assert_sweeps(backend, p, *, need_cols=True, tolerance=2e-6, rounding=0.0, **options):
    """Statistics are right. tolerance: of the largest log-sum-exp of the rows, and of the columns; of float64 that is 1e-13.

    rounding: an error beside it, of logits whose terms cancel.
    """
    tolerance = 1e-13 if p.stat_dtype == torch.float64 else tolerance
    got = backend.sweep(p, need_cols=need_cols, keep=False, **options)
    assert (got.col is None) == (p.triangular or not need_cols)
    for out, ref in zip((got.row, got.col), log_sum_exps(p)):
        if out is None:
            continue
        assert out.top.dtype == out.rest.dtype == p.stat_dtype
        assert torch.equal(out.top == -torch.inf, ref == -torch.inf)
        assert (out.rest.abs() <= torch.finfo(p.stat_dtype).eps / 2 * out.top.abs()).logical_or(~ref.isfinite()).all()
        largest = max([1.0, *ref[ref.isfinite()].abs().flatten().tolist()])
        assert_close(out.value(), ref, tolerance * largest + rounding, relative=False)
    return got


# What rounding G does to dx and dy, relative to their largest element.
ROUNDED = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}


def assert_grads(backend, p, c, *, need_bias=False, tolerance=None, **options):
    """Gradients are right. tolerance: of the largest element of dx and dy; None: that of their dtype, and 2e-5 for sums of G."""
    of_products = ROUNDED[p.x.dtype] if tolerance is None else tolerance
    of_sums, of_scale = (2e-5, 2e-5) if tolerance is None else (tolerance / 20, tolerance)  # added up before G is rounded
    of_softplus = 2e-6
    if p.stat_dtype == torch.float64:
        of_products = of_sums = of_scale = of_softplus = 1e-11
    wanted = Needs(x=True, y=True, row_bias=need_bias, col_bias=need_bias, scale=True)
    got, (ref, size) = backend.grad(p, c, wanted, **options), gradients(p, c)
    given = {name: v for name, v in vars(got).items() if v is not None}
    assert given.keys() == ref.keys() - (set() if need_bias else {"g_rows", "g_cols"})
    d_scale, allowed = given.pop("d_scale"), dict(dx=of_products, dy=of_products, row_sum=of_softplus)
    for name, v in given.items():
        assert_close(v, ref[name], allowed.get(name, of_sums), name)
    if ref["d_scale"].isfinite():  # half of its terms may cancel the others
        assert abs(d_scale - ref["d_scale"]) <= of_scale * size + 1e-30, "d_scale"
    else:
        assert not d_scale.isfinite()
    return got


# ---- one backend beside another ------------------------------------------------------------------------------------------


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
