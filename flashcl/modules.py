"""The losses as modules that own their temperature (and bias), with the published initialisations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashcl.losses.info_nce import info_nce
from flashcl.losses.nt_xent import nt_xent
from flashcl.losses.siglip import siglip
from flashcl.losses.sup_con import sup_con


class _WithLogitScale(nn.Module):
    """Holds log(logit_scale), learnable or fixed, kept at or below log(max_logit_scale)."""

    def __init__(self, init_logit_scale: float, learnable: bool, max_logit_scale: float | None, options: dict):
        super().__init__()
        log_scale = torch.tensor(math.log(init_logit_scale))
        if learnable:
            self.log_logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_logit_scale", log_scale)
        self.max_logit_scale = max_logit_scale
        self.options = options

    @property
    def logit_scale(self) -> Tensor:
        """The current scale of the logits, 1 / temperature: () float, with gradient if learnable."""
        if self.max_logit_scale is not None and isinstance(self.log_logit_scale, nn.Parameter):
            # The parameter itself is clamped, as CLIP's trainer does after each step: a clamp of its value alone would
            # stop the gradient that could bring it back.
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(self.max_logit_scale))
        return self.log_logit_scale.exp()

    def extra_repr(self) -> str:
        kind = "learnable" if isinstance(self.log_logit_scale, nn.Parameter) else "fixed"
        return f"logit_scale={self.log_logit_scale.exp().item():.4g} ({kind}), " + ", ".join(
            f"{k}={v!r}" for k, v in self.options.items()
        )


class InfoNCELoss(_WithLogitScale):
    """`flashcl.info_nce` with CLIP's learnable temperature: 1 / 0.07 at first, logit_scale at most 100.

    Call with x (N, D), y (M, D). options: symmetric, normalize, reduction, group, backend.
    Source: Radford et al. 2021, section 2.5.
    """

    def __init__(
        self, temperature: float = 0.07, *, learnable: bool = True, max_logit_scale: float | None = 100.0, **options
    ):
        super().__init__(1 / temperature, learnable, max_logit_scale, options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, logit_scale=self.logit_scale, **self.options)


class SigLIPLoss(_WithLogitScale):
    """`flashcl.siglip` with learnable temperature and bias: t = 10 and b = -10 at first.

    Call with x (N, D), y (N, D). options: normalize, reduction, group, backend.
    Source: Zhai et al. 2023, algorithm 1.
    """

    def __init__(self, logit_scale: float = 10.0, logit_bias: float = -10.0, *, learnable: bool = True, **options):
        super().__init__(logit_scale, learnable, None, options)
        bias = torch.tensor(float(logit_bias))
        if learnable:
            self.logit_bias = nn.Parameter(bias)
        else:
            self.register_buffer("logit_bias", bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return siglip(x, y, logit_scale=self.logit_scale, logit_bias=self.logit_bias, **self.options)


class NTXentLoss(_WithLogitScale):
    """`flashcl.nt_xent` with SimCLR's fixed temperature, 0.5 (learnable=True learns it).

    Call with z1 (N, D), z2 (N, D). options: normalize, reduction, group, backend.
    Source: Chen et al. 2020, eq. 1.
    """

    def __init__(self, temperature: float = 0.5, *, learnable: bool = False, **options):
        super().__init__(1 / temperature, learnable, None, options)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, temperature=1 / self.logit_scale, **self.options)


class SupConLoss(_WithLogitScale):
    """`flashcl.sup_con` with a fixed temperature, 0.07 (learnable=True learns it).

    Call with z (N, D), labels (N,). options: normalize, reduction, group, backend.
    Source: Khosla et al. 2020, eq. 2.
    """

    def __init__(self, temperature: float = 0.07, *, learnable: bool = False, **options):
        super().__init__(1 / temperature, learnable, None, options)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(z, labels, temperature=1 / self.logit_scale, **self.options)
