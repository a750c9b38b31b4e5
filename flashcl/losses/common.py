"""What every loss does before and after the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flashcl.checks import one_of
from flashcl.dtypes import to_statistic_dtype
from flashcl.engine import distributed
from flashcl.engine.dispatch import Execution
from flashcl.engine.ranks import Group

REDUCTIONS = ("mean", "sum", "none")
P = ParamSpec("P")  # each on a line of its own: type checkers take no other
R = TypeVar("R")


def eager_over_ranks(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorator: with a group, the loss leaves the graph of torch.compile, and runs between two.

    A compiler may drop a collective whose result a rank does not need, and move one before another, on one rank and not on
    the next: then ranks wait for each other for ever.
    """

    @functools.wraps(loss)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if options.get("group") is not None and torch.compiler.is_compiling():
            return torch.compiler.disable(loss)(*args, **options)
        return loss(*args, **options)

    return call


def prepare(
    *embeddings: Tensor, normalize: bool, backend: str, group: Group | None, **same: object
) -> tuple[Execution, list[Tensor]]:
    """How the engine is to compute, and the embeddings as it takes them: of unit length if asked for. It rounds them itself.

    `same`: other arguments in which the ranks of a group must agree.
    """
    one_of("normalize", normalize, (True, False))
    how = Execution.of(embeddings[0], backend, group, normalize=normalize, **same)
    if group is not None and group.rules.towers_over_ranks:
        embeddings = [_ScaleGradient.apply(x, 1 / group.process_group.size()) for x in embeddings]
    if normalize:  # in float32 at least: a norm may be beyond float16, and its square is
        embeddings = [F.normalize(to_statistic_dtype(x, x), dim=1) for x in embeddings]
    return how, list(embeddings)


def parameter(value: Tensor, group: Group | None) -> Tensor:
    """logit_scale or logit_bias as the engine takes it, with the gradient that the convention of the group gives it."""
    if group is not None and group.rules.scalars_times_ranks:
        return _ScaleGradient.apply(value, group.process_group.size())
    return value


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.factor, None


def from_negatives(neg: Tensor, pos: Tensor) -> Tensor:
    """-log softmax of the positive, log(e^pos + e^neg) - pos, exact also where the positive has nearly all the mass."""
    # A softmax over an infinite logit is NaN, and so are its gradients; softplus alone would return 0 or inf. inf * 0 is NaN.
    largest = torch.maximum(neg, pos).detach()
    return F.softplus(torch.add(neg - pos, largest, alpha=0.0), threshold=50.0)


def reduce(loss: Tensor, reduction: str, x: Tensor, group: Group | None, count: Tensor | None = None) -> Tensor:
    """The reduced loss, in the dtype of results for embeddings like x.

    loss, float64: (N,) one for each row; (C, N) of which the mean over C is that of a row (rows and columns of InfoNCE); ()
        their sum already. count: how many rows the mean divides by, () or a number; None: all rows of x.
    """
    kinds = loss.shape[0] if loss.dim() == 2 else 1
    if reduction == "none":
        return to_statistic_dtype(loss if kinds == 1 else loss.mean(0), x)
    if reduction == "mean" and group is None:  # in few operations: each is a launch, forward and backward
        if count is None:
            return to_statistic_dtype(loss.mean() if loss.dim() else loss / x.shape[0], x)
        return to_statistic_dtype(loss.sum() / count.clamp(min=1), x)
    loss = loss.sum() if loss.dim() else loss
    loss = loss if kinds == 1 else loss / kinds
    count = x.shape[0] if count is None else count
    return to_statistic_dtype(loss if reduction == "sum" else _mean_over_ranks(loss, count, group), x)


def _mean_over_ranks(own: Tensor, count: Tensor | int, group: Group) -> Tensor:
    """What a rank returns as its mean: `Group` says what that is in each convention."""
    name = group.encode()
    one = torch.ones_like(own.detach())
    count, ranks = distributed.sum_over_ranks(torch.stack([one * count, one]), name, met=True).unbind()
    own = own * (ranks / count.clamp(min=1))
    if not group.rules.global_mean:
        return own
    value = distributed.sum_over_ranks(own.detach().reshape(1), name, met=True)[0]  # W times the global mean
    if not group.rules.scalars_times_ranks:
        value = value / ranks
    return own + (value - own.detach())
