"""SigLIP: every pair is a binary classification of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine import dispatch
from flashcl.engine.autograd import Pairs, softplus_sum
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, parameter, prepare, reduce


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

    x, y: (N, D), same dtype and device; y[i] is the positive of x[i]. Taken as given unless normalize=True. logit_scale
    and logit_bias: a float or a one-element tensor each.
    Returns: float32 (float64 for float64 input), nats: () for reduction "mean" (over rows, not over pairs) and "sum",
    (N,) for "none".
    Gradients: x, y, logit_scale, logit_bias, first order. Memory O(N D) and a bounded workspace; 6 N^2 D FLOPs forward
    and backward, as gradients are made in the forward pass (8 N^2 D with reduction "none").
    group: ranks whose rows are one batch, a ProcessGroup or flashcl.Group: `flashcl.Group` says what comes back.
    Raises: ValueError or TypeError naming the argument; NotImplementedError for double backward; RuntimeError on every
    rank where ranks disagree or one does not answer.
    Numerics: within twice the error of the dense formula in the same dtype.
    Source: Zhai et al. 2023, algorithm 1.
    """
    checks.embeddings(group, x=x, y=y)
    checks.same_rows("x", x, "y", y, "each row has one positive")
    checks.one_of("reduction", reduction, REDUCTIONS)
    group = Group.of(group, reduction)
    scale = parameter(checks.scalar("logit_scale", logit_scale, x), group)
    bias = parameter(checks.wide(checks.scalar("logit_bias", logit_bias, x), x), group)
    x, y = prepare(normalize, group, x, y)

    row = torch.arange(len(x), dtype=torch.int32, device=x.device)
    pairs = Pairs("different", (row,), (row,), partner=0, group=Group.name(group))
    loss = softplus_sum(
        x, y, scale, bias.expand(len(x)), pairs, per_row=reduction == "none", backend=dispatch.choose(backend, x)
    )
    return reduce(loss, reduction, x, group)
