"""NT-Xent: the loss of SimCLR, two views of each item, every other view a negative."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, eager_over_ranks, from_negatives, parameter, prepare, reduce


@eager_over_ranks
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | Group | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent: l_i = log sum_{j != i} exp(s_ij) - s_ip, s = z z^T / temperature, z = [z1; z2], p the other view of i.

    z1, z2: (N, D), same dtype and device; z1[i] and z2[i] are two views of one item. Inside torch.autocast they are
        rounded to its dtype (not float64).
    temperature: a float or a one-element tensor.
    normalize: scale rows to unit length first; otherwise embeddings are used as they are.
    reduction: "mean", "sum" or "none".
    group: a ProcessGroup or `flashcl.Group`: ranks whose rows are one batch. `flashcl.Group` documents what a rank returns.
    backend: "auto" (`flashcl.explain` says which that is), "torch", "triton" or "cuda".

    Returns: float32 (float64 for float64 input), nats: () for "mean" (over 2N anchors) and "sum", (2N,) for "none", in the
        order of z.
    Gradients: z1, z2, temperature.
    Cost: memory O(N D) and a bounded workspace; 16 N^2 D FLOPs forward and backward: S is symmetric, half of its tiles
        are computed.
    Raises: ValueError or TypeError naming the argument; RuntimeError if the backend cannot serve it, and on every rank if ranks
        disagree or, over gloo, one does not answer; NotImplementedError for second derivatives.
    Accuracy: the contract of flashcl.contract (README, "Accuracy").
    Source: Chen et al. 2020, eq. 1 (there with normalize=True).
    """
    checks.embeddings(group, z1=z1, z2=z2)
    checks.same_rows("z1", z1, "z2", z2, "they are views of the same items")
    checks.one_of("reduction", reduction, REDUCTIONS)
    group = Group.of(group, reduction)
    scale = parameter(checks.inverse_temperature(temperature, z1), group)
    how, views = prepare(z1, z2, normalize=normalize, backend=backend, group=group, loss="nt_xent", reduction=reduction)
    # Inside autocast the views may differ, and torch.cat takes no float16 where autocast is of bfloat16, nor the reverse.
    wider = functools.reduce(torch.promote_types, [v.dtype for v in views], how.dtype)
    z = torch.cat([v.to(wider) for v in views])

    # Ids are equal for the anchor itself and for its positive: neither is a negative.
    item = torch.arange(z1.shape[0], dtype=torch.int32, device=z.device).repeat(2)
    pairs = Pairs("different", (item,), (item,), partner=z1.shape[0])
    s = log_sum_exp(z, None, scale, None, None, pairs, how, need_cols=False)
    return reduce(from_negatives(s.row_neg, s.row_pos), reduction, z, group)
