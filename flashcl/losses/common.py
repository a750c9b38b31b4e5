"""What every loss does before and after the engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flashcl.checks import wide

REDUCTIONS = ("mean", "sum", "none")


def prepare(normalize: bool, *embeddings: Tensor) -> list[Tensor]:
    """Embeddings as the engine takes them: of unit length if asked for, in the autocast dtype inside autocast."""
    if normalize:
        embeddings = [F.normalize(x, dim=1) for x in embeddings]
    device = embeddings[0].device.type
    if torch.is_autocast_enabled(device) and embeddings[0].dtype != torch.float64:
        embeddings = [x.to(torch.get_autocast_dtype(device)) for x in embeddings]
    return list(embeddings)


def from_negatives(neg: Tensor, pos: Tensor) -> Tensor:
    """-log softmax of the positive, log(e^pos + e^neg) - pos, exact also where the positive has nearly all the mass."""
    # A softmax over an infinite logit is NaN, and so are its gradients: softplus alone would return 0 or inf.
    undefined = (neg == torch.inf) | (pos == torch.inf)
    return F.softplus((neg - pos) * torch.where(undefined, torch.nan, 1.0), threshold=50.0)


def reduce(loss: Tensor, reduction: str, x: Tensor) -> Tensor:
    """The float64 losses of the rows, reduced, in the dtype of results for embeddings like x."""
    match reduction:
        case "mean":
            loss = loss.mean()
        case "sum":
            loss = loss.sum()
    return wide(loss, x)
