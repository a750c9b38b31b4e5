"""SigLIP: every pair is a binary classification of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.dtypes import to_statistic_dtype
from flashcl.engine.autograd import Pairs, softplus_sum
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, eager_over_ranks, parameter, prepare, reduce


@eager_over_ranks
def siglip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | Group | None = None,
    backend: str = "auto",
) -> Tensor:
    """SigLIP: l_i = sum_j softplus(-z_ij s_ij), s = logit_scale * x y^T + logit_bias, z_ii = 1 and z_ij = -1 otherwise.

    x, y: (N, D), same dtype and device; y[i] is the positive of x[i]. Inside torch.autocast they are rounded to its
        dtype (not float64).
    logit_scale, logit_bias: a float or a one-element tensor each.
    normalize: scale rows to unit length first; otherwise embeddings are used as they are.
    reduction: "mean", "sum" or "none".
    group: a ProcessGroup or `flashcl.Group`: ranks whose rows are one batch. `flashcl.Group` documents what a rank returns.
    backend: "auto" (`flashcl.explain` says which that is), "torch", "triton" or "cuda".

    Returns: float32 (float64 for float64 input), nats: () for "mean" (over rows, not over pairs) and "sum", (N,) for "none".
    Gradients: x, y, logit_scale, logit_bias.
    Cost: memory O(N D) and a bounded workspace; 6 N^2 D FLOPs forward and backward, as gradients are made in
        the forward pass (8 N^2 D with reduction "none").
    Raises: ValueError or TypeError naming the argument; RuntimeError if the backend cannot serve it, and on every rank if ranks
        disagree or, over gloo, one does not answer; NotImplementedError for second derivatives.
    Accuracy: the contract of flashcl.contract (README, "Accuracy").
    Source: Zhai et al. 2023, algorithm 1.
    """
    checks.embeddings(group, x=x, y=y)
    checks.same_rows("x", x, "y", y, "each row has one positive")
    checks.one_of("reduction", reduction, REDUCTIONS)
    group = Group.of(group, reduction)
    scale = parameter(checks.scalar("logit_scale", logit_scale, x), group)
    bias = parameter(to_statistic_dtype(checks.scalar("logit_bias", logit_bias, x), x), group)
    same = dict(loss="siglip", reduction=reduction, logit_bias=bias)
    how, (x, y) = prepare(x, y, normalize=normalize, backend=backend, group=group, **same)

    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    pairs = Pairs("different", (row,), (row,), partner=0)
    loss = softplus_sum(x, y, scale, bias.expand(x.shape[0]), pairs, how, per_row=reduction == "none")
    return reduce(loss, reduction, x, group)
