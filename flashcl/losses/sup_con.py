"""SupCon: supervised contrast, every other row of one's label is a positive."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, eager_over_ranks, from_negatives, parameter, prepare, reduce


@eager_over_ranks
def sup_con(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | Group | None = None,
    backend: str = "auto",
) -> Tensor:
    """SupCon, "out" form: l_i = log sum_{j != i} exp(s_ij) - mean_{p in P(i)} s_ip, s = z z^T / temperature.

    z: (N, D). Inside torch.autocast it is rounded to its dtype (not float64).
    labels: (N,) integers or bools, same device; P(i) are the other rows with the label of i.
    temperature: a float or a one-element tensor.
    normalize: scale rows to unit length first; otherwise embeddings are used as they are.
    reduction: "mean", "sum" or "none".
    group: a ProcessGroup or `flashcl.Group`: ranks whose rows are one batch. `flashcl.Group` documents what a rank returns.
    backend: "auto" (`flashcl.explain` says which that is), "torch", "triton" or "cuda".

    Returns: float32 (float64 for float64 input), nats: () for "mean" and "sum", (N,) for "none". Anchors without a positive
        have loss 0 and do not count in the mean; without any anchor the mean is 0.
    Gradients: z, temperature.
    Cost: memory O(N D) and a bounded workspace; 4 N^2 D FLOPs forward and backward: S is symmetric, half of its tiles
        are computed.
    Raises: ValueError or TypeError naming the argument; RuntimeError if the backend cannot serve it, and on every rank if ranks
        disagree or, over gloo, one does not answer; NotImplementedError for second derivatives.
    Accuracy: the contract of flashcl.contract (README, "Accuracy"). l_i = softplus(negatives - positives) + the spread of the
        positives, log sum_p exp(s_ip) - mean_p s_ip, which keeps the digits of a converged anchor.
    Source: Khosla et al. 2020, eq. 2.
    """
    checks.embeddings(group, z=z)
    checks.labels(labels, z.shape[0], z)
    checks.one_of("reduction", reduction, REDUCTIONS)
    group = Group.of(group, reduction)
    scale = parameter(checks.inverse_temperature(temperature, z), group)
    how, (z,) = prepare(z, normalize=normalize, backend=backend, group=group, loss="sup_con", reduction=reduction)

    row = torch.arange(z.shape[0], dtype=torch.int32, device=z.device)
    labels = labels.to(torch.int64).contiguous()
    pairs = Pairs("by_label", (row,), (row,), labels=labels)
    s = log_sum_exp(z, None, scale, None, None, pairs, how, need_cols=False)
    alone = s.alone
    # Filled before the arithmetic, not after: inf - inf of an anchor that does not count would make its gradient NaN.
    pos, gap = s.row_pos.masked_fill(alone, 0.0), s.row_gap.masked_fill(alone, 0.0)
    loss = (from_negatives(s.row_neg, pos) + gap).masked_fill(alone, 0.0)
    return reduce(loss, reduction, z, group, count=(~alone).sum())
