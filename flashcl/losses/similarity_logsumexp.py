"""The building block of the softmax family, for losses that are not here."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.dtypes import statistic_dtype
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import eager_over_ranks, prepare


# For type checkers: what comes back depends on the axis.
@overload
def similarity_logsumexp(
    x: Tensor, y: Tensor, *, logit_scale: float | Tensor = ..., row_bias: Tensor | None = ..., col_bias: Tensor | None = ...,
    exclude: str | None = ..., axis: Literal["both"] = ..., group: ProcessGroup | Group | None = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def similarity_logsumexp(
    x: Tensor, y: Tensor, *, logit_scale: float | Tensor = ..., row_bias: Tensor | None = ..., col_bias: Tensor | None = ...,
    exclude: str | None = ..., axis: Literal["rows", "cols"], group: ProcessGroup | Group | None = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@eager_over_ranks
def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    exclude: str | None = None,
    axis: str = "both",
    group: ProcessGroup | Group | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """row_lse_i = log sum_j exp(s_ij), col_lse_j = log sum_i exp(s_ij), s_ij = logit_scale <x_i, y_j> + row_bias_i + col_bias_j.

    Extra negatives, queues and several blocks with one denominator are logaddexp of several of these.

    x: (N, D), used as it is. Inside torch.autocast x and y are rounded to its dtype (not float64).
    y: (M, D), same dtype and device.
    logit_scale: a float or a one-element tensor.
    row_bias, col_bias: (N,) and (M,), floating.
    exclude: "diagonal" drops the pairs i = j; with a group, of the rows and columns of one rank.
    axis: "both", "rows" or "cols".
    group: a ProcessGroup or `flashcl.Group`: ranks whose rows are one batch. A rank gets the row_lse of its own rows over the
        columns of all ranks, and the col_lse of its own columns over the rows of all.
    backend: "auto" (`flashcl.explain` says which that is), "torch", "triton" or "cuda".

    Returns: (row_lse (N,), col_lse (M,)) for axis "both", one of them for "rows" or "cols"; float32 (float64 for float64
        input), nats. A row without pairs gives -inf.
    Gradients: x, y, logit_scale, row_bias, col_bias.
    Cost: memory O((N + M) D) and a bounded workspace; 8 N M D FLOPs forward and backward.
    Raises: ValueError or TypeError naming the argument; RuntimeError if the backend cannot serve it, and on every rank if ranks
        disagree or, over gloo, one does not answer; NotImplementedError for second derivatives.
    Accuracy: the contract of flashcl.contract (README, "Accuracy").
    """
    checks.embeddings(group, x=x, y=y)
    checks.vector("row_bias", row_bias, x.shape[0], x)
    checks.vector("col_bias", col_bias, y.shape[0], x)
    checks.one_of("exclude", exclude, (None, "diagonal"))
    checks.one_of("axis", axis, ("both", "rows", "cols"))
    group = Group.of(group, reduction=None)
    scale = checks.scalar("logit_scale", logit_scale, x)
    how, (x, y) = prepare(x, y, normalize=False, backend=backend, group=group, loss="similarity_logsumexp", axis=axis)
    if axis == "cols":  # the columns of S are the rows of its transpose
        x, y, row_bias, col_bias = y, x, col_bias, row_bias

    pairs = Pairs()
    if exclude == "diagonal":
        row_id, col_id = (torch.arange(v.shape[0], dtype=torch.int32, device=x.device) for v in (x, y))
        pairs = Pairs("different", (row_id,), (col_id,))
    s = log_sum_exp(x, y, scale, row_bias, col_bias, pairs, how, need_cols=axis == "both")
    # Copied in float64, too: the engine returns views, to which the caller could not write.
    row, col = (None if v is None else v.to(statistic_dtype(x), copy=True) for v in (s.row_neg, s.col_neg))
    return (row, col) if axis == "both" else row
