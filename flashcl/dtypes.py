"""In which dtypes embeddings come, are multiplied, and are summed up."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def computed_dtype(x: Tensor) -> torch.dtype:
    """What the engine gets x in: inside torch.autocast its dtype, but for float64."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta
        return x.dtype
    return torch.get_autocast_dtype(device)


def to_statistic_dtype(value: Tensor, like: Tensor) -> Tensor:
    """In the dtype of the statistics of embeddings."""
    return value.to(statistic_dtype(like))


def statistic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 embeddings, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
