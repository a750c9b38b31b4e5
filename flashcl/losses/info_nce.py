"""InfoNCE: the loss of CLIP, of retrieval models and of sentence encoders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, eager_over_ranks, from_negatives, parameter, prepare, reduce


@eager_over_ranks
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | Group | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE: l_i = log sum_j exp(s_ij) - s_ii, s = logit_scale * x y^T; symmetric: the mean of l over rows and columns.

    x: (N, D) anchors. Inside torch.autocast embeddings are rounded to its dtype (not float64).
    y: (M, D) candidates, same dtype and device; y[i] is the positive of x[i]. M = N if symmetric, else M >= N.
    temperature, logit_scale: exactly one of them, temperature = 1 / logit_scale: a float or a one-element tensor.
    symmetric: the loss of CLIP, in both directions; False: of x against y alone.
    normalize: scale rows to unit length first; otherwise embeddings are used as they are.
    reduction: "mean", "sum" or "none".
    group: a ProcessGroup or `flashcl.Group`: ranks whose rows are one batch. `flashcl.Group` documents what a rank returns.
    backend: "auto" (`flashcl.explain` says which that is), "torch", "triton" or "cuda".

    Returns: float32 (float64 for float64 input), nats: () for "mean" and "sum", (N,) for "none".
    Gradients: x, y, temperature or logit_scale.
    Cost: memory O((N + M) D) and a bounded workspace, never N x M; 8 N M D FLOPs forward and backward.
    Raises: ValueError or TypeError naming the argument; RuntimeError if the backend cannot serve it, and on every rank if ranks
        disagree or, over gloo, one does not answer; NotImplementedError for second derivatives.
    Accuracy: the contract of flashcl.contract (README, "Accuracy"). The positive stays out of the tiles, so that a converged pair
        loses no digits.
    Source: van den Oord et al. 2018, eq. 4; Radford et al. 2021, figure 3.
    """
    checks.embeddings(group, x=x, y=y)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("symmetric", symmetric, (True, False))
    group = Group.of(group, reduction)
    if symmetric:
        checks.same_rows("x", x, "y", y, "each column has a positive; for more candidates than rows pass symmetric=False")
    elif y.shape[0] < x.shape[0]:
        raise ValueError(f"y must have at least the {x.shape[0]} rows of x, a positive for each, got {y.shape[0]}")
    scale = parameter(checks.logit_scale(x, temperature=temperature, logit_scale=logit_scale), group)
    how, (x, y) = prepare(x, y, normalize=normalize, backend=backend, group=group, loss="info_nce", reduction=reduction)

    col_id = torch.arange(y.shape[0], dtype=torch.int32, device=x.device)
    pairs = Pairs("different", (col_id[: x.shape[0]],), (col_id,), partner=0)
    s = log_sum_exp(x, y, scale, None, None, pairs, how, need_cols=symmetric)
    if not symmetric:
        return reduce(from_negatives(s.row_neg, s.row_pos), reduction, x, group)
    loss = from_negatives(torch.stack([s.row_neg, s.col_neg]), s.row_pos)  # (2, N): of the rows and of the columns
    return reduce(loss, reduction, x, group)
