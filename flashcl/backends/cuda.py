"""The CUDA backend: its place. csrc/ has no kernels yet, and this module says so to whoever asks for it."""

from __future__ import annotations

import torch


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return "csrc/ holds no kernels yet"
