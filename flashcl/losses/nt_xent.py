"""NT-Xent: the loss of SimCLR, two views of each item, every other view a negative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine import dispatch
from flashcl.engine.autograd import Pairs, log_sum_exp
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS, from_negatives, parameter, prepare, reduce


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

    z1, z2: (N, D), same dtype and device; z1[i] and z2[i] are two views of one item. Taken as given unless
    normalize=True. temperature: a float or a one-element tensor.
    Returns: float32 (float64 for float64 input), nats: () for reduction "mean" (over 2N anchors) and "sum", (2N,) for
    "none": the rows of z1, then those of z2.
    Gradients: z1, z2, temperature, first order. Memory O(N D) and a bounded workspace; 16 N^2 D FLOPs forward and
    backward: S is symmetric, half of its tiles are computed.
    group: ranks whose rows are one batch, a ProcessGroup or flashcl.Group: `flashcl.Group` says what comes back.
    Raises: ValueError or TypeError naming the argument; NotImplementedError for double backward; RuntimeError on every
    rank where ranks disagree or one does not answer.
    Numerics: within twice the error of the dense formula in the same dtype.
    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    checks.embeddings(group, z1=z1, z2=z2)
    checks.same_rows("z1", z1, "z2", z2, "they are views of the same items")
    checks.one_of("reduction", reduction, REDUCTIONS)
    group = Group.of(group, reduction)
    scale = parameter(checks.inverse_temperature(temperature, z1), group)
    z = torch.cat(prepare(normalize, group, z1, z2))

    # Ids are equal for the anchor itself and for its positive: neither is a negative.
    item = torch.arange(z1.shape[0], dtype=torch.int32, device=z.device).repeat(2)
    pairs = Pairs("different", (item,), (item,), partner=z1.shape[0], group=Group.name(group))
    s = log_sum_exp(z, None, scale, None, None, pairs, need_cols=False, backend=dispatch.choose(backend, z))
    return reduce(from_negatives(s.row_neg, s.row_pos), reduction, z, group)
