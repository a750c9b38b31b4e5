"""The two operations of every backend as registered operators, so that torch.compile sees them as one node each.

    flashcl::sweep   statistics of a block of logits
    flashcl::grad    its gradients, given the coefficients of G

Operators know tensors, numbers and strings; `Problem`, `Softmax` and `Sigmoid` are taken apart and put together here.
A triangular problem goes without y. An absent output is a tensor without elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcl.engine import dispatch
from flashcl.engine.problem import CLASSES, Grads, Problem, Sigmoid, Softmax


def sweep(problem: Problem, reduction: str, *, need_cols: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """`problem.py` says what comes back: (row (K, N), col (K, M) or None)."""
    row, col = _sweep(*_unpack(problem), reduction, need_cols, backend)
    return row, col if need_cols and not problem.triangular else None


def grad(
    problem: Problem, c: Softmax | Sigmoid, *, need_x: bool, need_y: bool, need_bias: bool, backend: str
) -> Grads:
    """`problem.py` says what comes back."""
    if isinstance(c, Sigmoid):
        vectors = [c.row_weight, None, None, None, None, None]
    else:
        vectors = [c.row_weight, c.row_lse, c.col_weight, c.col_lse, c.row_offset, c.col_offset]
    dx, dy, g_rows, g_cols, row_sum = _grad(*_unpack(problem), *vectors, need_x, need_y, need_bias, backend)
    need_y = need_y and not problem.triangular
    return Grads(
        dx if need_x else None,
        dy if need_y else None,
        g_rows if need_bias else None,
        g_cols if need_bias else None,
        row_sum if isinstance(c, Sigmoid) else None,
    )


def _unpack(p: Problem) -> tuple:
    y = None if p.triangular else p.y
    return (p.x, y, p.logit_scale, p.row_bias, p.col_bias, p.program, list(p.rows), list(p.cols))


@torch.library.custom_op("flashcl::sweep", mutates_args=())
def _sweep(
    x: Tensor,
    y: Tensor | None,
    logit_scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    program: str,
    rows: list[Tensor],
    cols: list[Tensor],
    reduction: str,
    need_cols: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols)
    row, col = dispatch.load(backend).sweep(problem, reduction, need_cols=need_cols)
    return row, row.new_empty(0) if col is None else col


@_sweep.register_fake
def _(x, y, logit_scale, row_bias, col_bias, program, rows, cols, reduction, need_cols, backend):
    classes = CLASSES[program] if reduction == "logsumexp" else 1
    row = logit_scale.new_empty(classes, x.shape[0])
    has_cols = need_cols and y is not None and reduction == "logsumexp"
    return row, logit_scale.new_empty(classes, y.shape[0]) if has_cols else logit_scale.new_empty(0)


@torch.library.custom_op("flashcl::grad", mutates_args=())
def _grad(
    x: Tensor,
    y: Tensor | None,
    logit_scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    program: str,
    rows: list[Tensor],
    cols: list[Tensor],
    row_weight: Tensor,
    row_lse: Tensor | None,
    col_weight: Tensor | None,
    col_lse: Tensor | None,
    row_offset: Tensor | None,
    col_offset: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols)
    if row_lse is None:
        c = Sigmoid(row_weight)
    else:
        c = Softmax(row_weight, row_lse, col_weight, col_lse, row_offset, col_offset)
    g = dispatch.load(backend).grad(problem, c, need_x=need_x, need_y=need_y, need_bias=need_bias)
    absent = logit_scale.new_empty
    return tuple(absent(0) if v is None else v for v in (g.dx, g.dy, g.g_rows, g.g_cols, g.row_sum))


@_grad.register_fake
def _(x, y, logit_scale, row_bias, col_bias, program, rows, cols, row_weight, row_lse, col_weight, col_lse,
      row_offset, col_offset, need_x, need_y, need_bias, backend):  # fmt: skip
    new = logit_scale.new_empty
    return (
        new(x.shape if need_x else 0),
        new(y.shape if need_y and y is not None else 0),
        new(x.shape[0] if need_bias else 0),
        new((x if y is None else y).shape[0] if need_bias else 0),
        new(x.shape[0] if row_lse is None else 0),
    )
