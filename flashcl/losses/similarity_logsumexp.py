"""The building block of the softmax family, for losses that are not here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine import dispatch
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import prepare


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

    x: (N, D). y: (M, D), same dtype and device. row_bias: (N,), col_bias: (M,), floating. logit_scale: a float or a
    one-element tensor. exclude="diagonal" drops the pairs i = j.
    Returns: (row_lse (N,), col_lse (M,)) for axis "both", one of them for "rows" or "cols"; float32 (float64 for float64
    input), nats. A row without pairs gives -inf.
    Gradients: x, y, logit_scale, row_bias, col_bias, first order. Memory O((N + M) D) and a bounded workspace; 8 N M D
    FLOPs forward and backward.
    group: ranks whose rows are one batch, a ProcessGroup or flashcl.Group: `flashcl.Group` says what comes back.
    Raises: ValueError or TypeError naming the argument; NotImplementedError for double backward; RuntimeError on every
    rank where ranks disagree or one does not answer.
    Numerics: within twice the error of the dense formula in the same dtype.
    Source: extra negatives, queues and several blocks with one denominator are logaddexp of several of these.
    """
    checks.embeddings(group, x=x, y=y)
    checks.vector("row_bias", row_bias, len(x), x)
    checks.vector("col_bias", col_bias, len(y), x)
    checks.one_of("exclude", exclude, (None, "diagonal"))
    checks.one_of("axis", axis, ("both", "rows", "cols"))
    group = Group.of(group, reduction="none")
    scale = checks.scalar("logit_scale", logit_scale, x)
    x, y = prepare(False, group, x, y)
    if axis == "cols":  # the columns of S are the rows of its transpose
        x, y, row_bias, col_bias = y, x, col_bias, row_bias

    pairs = Pairs(group=Group.name(group))
    if exclude == "diagonal":
        row_id, col_id = (torch.arange(len(v), dtype=torch.int32, device=x.device) for v in (x, y))
        pairs = Pairs("different", (row_id,), (col_id,), group=Group.name(group))
    s = log_sum_exp(
        x, y, scale, row_bias, col_bias, pairs, need_cols=axis == "both", backend=dispatch.choose(backend, x)
    )
    row = checks.wide(s.row_neg, x)
    return (row, checks.wide(s.col_neg, x)) if axis == "both" else row
