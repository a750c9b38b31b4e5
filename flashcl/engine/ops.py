"""The operations of every backend as registered operators, so that torch.compile sees them as one node each.

    flashcl::sweep, flashcl::sweep_softplus             statistics of a block of logits
    flashcl::grad                                       its gradients, given the coefficients of G
    flashcl::partner_products, ::finish and ::finish_   what is O(N D) about a positive that each row has, forward and backward
    flashcl::tile_ratio                                 such products as tiles have them, relative to what they are

With a group (ranks.py) the block is this rank's share of the world's, and no graph is being made (losses/common.py); without
one, group is "".

Operators know tensors, numbers and strings; the dataclasses of problem.py are taken apart and put together here.
A triangular problem goes without y. An absent output is a tensor without elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from flashcl.engine import dispatch, distributed
from flashcl.engine.dispatch import Execution
from flashcl.engine.problem import CLASSES, Grads, LogSumExp, Needs, Problem, Sigmoid, Softmax, Statistics

_library = torch.library.Library("flashcl", "FRAGMENT")


def operator(name: str, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Registers a function as the operator flashcl::name; `fake` makes empty outputs from the same arguments.

    What torch.library.custom_op does, less its autograd and its checks of every call: they cost the host more than a small
    operation does (bench/NOTES.md), and no call needs a gradient: all are made inside autograd functions or of detached numbers.
    """

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _counting(function, mutates) if mutates else function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flashcl::{name}", fake, lib=_library)
        return getattr(torch.ops.flashcl, name).default

    return register


def _counting(function: Callable, mutates: tuple[str, ...]) -> Callable:
    """Counts what it writes to: below autograd nothing else does, and who keeps such a tensor would not notice."""
    places = [list(inspect.signature(function).parameters).index(name) for name in mutates]

    def call(*args) -> None:
        function(*args)
        for v in (args[place] for place in places):
            if not v.is_inference():
                torch.autograd.graph.increment_version(v)

    return call


def sweep(problem: Problem, how: Execution, *, need_cols: bool, keep: bool) -> Statistics:
    """`problem.py` says what comes back."""
    row, col, deviation, kept = _sweep(*_unpack(problem), problem.center, need_cols, keep, how.backend, how.group)
    has_cols = need_cols and not problem.triangular
    return Statistics(
        LogSumExp(row),
        LogSumExp(col) if has_cols else None,
        None if problem.center is None else deviation,
        kept=kept if keep else None,
    )


def sweep_softplus(problem: Problem, how: Execution, *, tile_scale: Tensor | None, keep: bool) -> Tensor:
    """`problem.py` says what comes back; keep: whether there will be a backward, in which the ranks of a group must agree.

    tile_scale: what tiles take for logit_scale, which all ranks have alike; None: the same.
    """
    assert not problem.triangular
    return _sweep_softplus(*_unpack(problem), tile_scale, keep, how.backend, how.group)


def grad(
    problem: Problem,
    c: Softmax | Sigmoid,
    needs: Needs,
    how: Execution,
    *,
    tile_scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> Grads:
    """`problem.py` says what comes back; tile_scale: as of sweep_softplus."""
    assert not (problem.triangular and isinstance(c, Sigmoid))
    vectors = [getattr(c, field.name) for field in fields(c)]
    out = _grad(*_unpack(problem), vectors, tile_scale, kept, list(needs), how.backend, how.group)
    dx, dy, g_rows, g_cols, d_scale, row_sum = out
    return Grads(
        dx if needs.x else None,
        dy if needs.y and not problem.triangular else None,
        g_rows if needs.row_bias else None,
        g_cols if needs.col_bias else None,
        d_scale if needs.scale else None,
        row_sum if isinstance(c, Sigmoid) else None,
    )


def finish(
    acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, dtype: torch.dtype, *, backend: str
) -> Tensor:
    """scale (acc_i + weight_i other_j), j = (i + shift) mod C, (R, D) in that dtype: in place of acc where it is that of acc."""
    if acc.dtype == dtype:
        _finish_(acc, other, weight, shift, scale, backend)
        return acc
    out = torch.empty_like(acc, dtype=dtype)
    _finish(acc, other, weight, shift, scale, out, backend)
    return out


@operator("partner_products", fake=lambda x, y, shift, backend: x.new_empty(x.shape[0], dtype=torch.float64))
def partner_products(x: Tensor, y: Tensor, shift: int, backend: str) -> Tensor:
    """<x_i, y_j> with j = (i + shift) mod M, (N,) float64"""
    return dispatch.load(backend).partner_products(x, y, _to_the_right(shift, y))


@operator("tile_ratio", fake=lambda x, y, products, shift, backend: products.new_empty(1))
def tile_ratio(x: Tensor, y: Tensor, products: Tensor, shift: int, backend: str) -> Tensor:
    """Products as tiles have them, relative to the exact `products` (partner_products of the same): (1,) float64, about 1."""
    found = dispatch.load(backend).products_in_tiles(x, y, _to_the_right(shift, y)) if len(x) and len(y) else None
    if found is None:
        return torch.ones(1, dtype=products.dtype, device=products.device)
    rows, in_tiles = found
    products = products[rows]
    # Cutting off makes every product smaller by about the same share: the slope of the line through 0 that fits them best.
    slope = torch.dot(in_tiles, products).div_(torch.dot(products, products))
    return slope.nan_to_num_(1.0, 1.0, 1.0).reshape(1)  # of nothing but zeros, or of what is not finite


@operator("finish", fake=lambda *_: None, mutates=("acc", "out"))
def _finish(
    acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, out: Tensor, backend: str
) -> None:
    dispatch.load(backend).finish(acc, other, weight, _to_the_right(shift, other), scale, out)


@operator("finish_", fake=lambda *_: None, mutates=("acc",))
def _finish_(acc: Tensor, other: Tensor | None, weight: Tensor | None, shift: int, scale: Tensor, backend: str) -> None:
    dispatch.load(backend).finish(acc, other, weight, _to_the_right(shift, other), scale, acc)


def _to_the_right(shift: int, other: Tensor | None) -> int:
    """The same shift modulo the rows of other, as backends take it: 0 or more."""
    return 0 if other is None else shift % max(len(other), 1)


def _unpack(p: Problem) -> tuple:
    y = None if p.triangular else p.y
    return (p.x, y, p.logit_scale, p.row_bias, p.col_bias, p.program, list(p.rows), list(p.cols))


def _present(*tensors: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if v is None else v for v in tensors)


def _empty_statistics(x, y, logit_scale, row_bias, col_bias, program, rows, cols, center, need_cols, keep, backend, group):
    new, k, has_cols = logit_scale.new_empty, CLASSES[program], need_cols and y is not None
    row, col = (k, 2, x.shape[0]), (k, 2, y.shape[0]) if has_cols else (0,)
    deviation = new(0) if center is None else new(x.shape[0], dtype=torch.float64)
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols, center)
    kept = dispatch.load(backend).kept_elements(problem) if keep and not group else 0
    return new(row), new(col), deviation, new(kept)


@operator("sweep", fake=_empty_statistics)
def _sweep(
    x: Tensor,
    y: Tensor | None,
    logit_scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    program: str,
    rows: list[Tensor],
    cols: list[Tensor],
    center: Tensor | None,
    need_cols: bool,
    keep: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols, center)
    module = dispatch.load(backend)
    if group:
        s = distributed.sweep(module, problem, group, need_cols=need_cols, keep=keep)
    else:
        s = module.sweep(problem, need_cols=need_cols, keep=keep)
    return _present(s.row.parts, None if s.col is None else s.col.parts, s.deviation, s.kept, like=logit_scale)


@operator("sweep_softplus", fake=lambda x, y, logit_scale, *_: logit_scale.new_empty(x.shape[0]))
def _sweep_softplus(
    x: Tensor,
    y: Tensor | None,
    logit_scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    program: str,
    rows: list[Tensor],
    cols: list[Tensor],
    tile_scale: Tensor | None,
    keep: bool,
    backend: str,
    group: str,
) -> Tensor:
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols)
    module = dispatch.load(backend)
    if group:
        return distributed.sweep_softplus(module, problem, group, tile_scale=tile_scale, keep=keep)
    return module.sweep_softplus(_scaled(problem, tile_scale))


def _scaled(problem: Problem, tile_scale: Tensor | None) -> Problem:
    return problem if tile_scale is None else replace(problem, logit_scale=tile_scale)


def _coefficients(vectors: list[Tensor | None]) -> Softmax | Sigmoid:
    return Softmax(*vectors) if len(vectors) == len(fields(Softmax)) else Sigmoid(*vectors)


def _empty_grads(x, y, logit_scale, row_bias, col_bias, program, rows, cols, vectors, tile_scale, kept, needs, backend, group):
    new, needs, c = logit_scale.new_empty, Needs(*needs), _coefficients(vectors)
    return (
        new(x.shape if needs.x else 0),
        new(y.shape if needs.y and y is not None else 0),
        new(x.shape[0] if needs.row_bias else 0),
        new((x if y is None else y).shape[0] if needs.col_bias else 0),
        new((), dtype=torch.float64) if needs.scale else new(0),
        new(x.shape[0] if isinstance(c, Sigmoid) else 0),
    )


@operator("grad", fake=_empty_grads)
def _grad(
    x: Tensor,
    y: Tensor | None,
    logit_scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    program: str,
    rows: list[Tensor],
    cols: list[Tensor],
    vectors: list[Tensor | None],
    tile_scale: Tensor | None,
    kept: Tensor | None,
    needs: list[bool],
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(x, y, logit_scale, row_bias, col_bias, program, rows, cols)
    module, c, needs = dispatch.load(backend), _coefficients(vectors), Needs(*needs)
    if group:
        g = distributed.grad(module, problem, c, needs, group, tile_scale=tile_scale)
    else:
        g = module.grad(_scaled(problem, tile_scale), c, needs, kept=kept)
    return _present(g.dx, g.dy, g.g_rows, g.g_cols, g.d_scale, g.row_sum, like=logit_scale)
