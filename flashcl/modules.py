"""The losses as modules that own their temperature (and bias), with the published initialisations.

Each holds the logarithm of its scale, log(1 / temperature), as `log_logit_scale`, (): a parameter if it is learnable (give it to
the optimizer), else a buffer. They return what their functions do: float32 (float64 for float64 embeddings), nats, () or with
reduction="none" one for each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.engine import dispatch
from flashcl.engine.ranks import Group
from flashcl.losses.common import REDUCTIONS
from flashcl.losses.info_nce import info_nce
from flashcl.losses.nt_xent import nt_xent
from flashcl.losses.siglip import siglip
from flashcl.losses.sup_con import sup_con


def _positive(name: str, value: float) -> float:
    if not 0 < checks.number(name, value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def _inverse(temperature: float) -> float:
    return _positive("1 / temperature", 1 / _positive("temperature", temperature))


class _AtMost(torch.autograd.Function):
    """min(value, limit), with a gradient that leads a value beyond the limit back and never further."""

    @staticmethod
    def forward(ctx, value: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(value > limit)
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond, upstream.clamp(min=0.0), upstream), None


class _WithLogitScale(nn.Module):
    """Holds log(logit_scale), learnable or fixed; a learnable one acts as at most log(max_logit_scale)."""

    log_logit_scale: Tensor  # ()

    def __init__(self, logit_scale: float, learnable: bool, max_logit_scale: float | None, options: dict):
        super().__init__()
        checks.one_of("reduction", options["reduction"], REDUCTIONS)
        for name in {"normalize", "symmetric"} & set(options):
            checks.one_of(name, options[name], (True, False))
        checks.one_of("learnable", learnable, (True, False))
        checks.one_of("backend", options["backend"], ("auto", *dispatch.BACKENDS))
        self.max_logit_scale = max_logit_scale if learnable else None
        if self.max_logit_scale is not None and not logit_scale <= checks.number("max_logit_scale", max_logit_scale):
            raise ValueError(
                f"max_logit_scale must be at least the scale to begin with, {logit_scale:.4g}, got {max_logit_scale}: "
                "raise it, or pass max_logit_scale=None for no bound"
            )
        self._initial: dict[str, float] = {}
        self._hold("log_logit_scale", math.log(logit_scale), learnable)
        self.options = options | dict(group=Group.of(options["group"], options["reduction"]))

    def _hold(self, name: str, value: float, learnable: bool) -> None:
        """A number of its own, (): a parameter or a buffer."""
        self._initial[name] = value
        tensor = torch.tensor(float(value))
        if learnable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def reset_parameters(self) -> None:
        """Sets its numbers, the fixed ones too, to what they were at first: also after a beginning on "meta" and to_empty()."""
        for name, value in self._initial.items():
            nn.init.constant_(getattr(self, name), value)

    @property
    def logit_scale(self) -> Tensor:
        """The current scale of the logits, 1 / temperature: () float, with gradient if learnable."""
        if self.max_logit_scale is None:
            return self.log_logit_scale.exp()
        return _AtMost.apply(self.log_logit_scale, math.log(self.max_logit_scale)).exp()

    def extra_repr(self) -> str:
        value = "?" if self.log_logit_scale.is_meta else f"{self.logit_scale.item():.4g}"
        kind = "learnable" if self.log_logit_scale.requires_grad else "fixed"
        return ", ".join([f"logit_scale={value} ({kind})", *(f"{k}={v!r}" for k, v in self.options.items())])


class InfoNCELoss(_WithLogitScale):
    """`flashcl.info_nce` with CLIP's learnable temperature: 0.07 at first, logit_scale at most 100.

    Call with x (N, D), y (M, D).

    temperature: the one to begin with.
    learnable: whether `log_logit_scale` is a parameter, to be given to the optimizer ([*model.parameters(),
        *criterion.parameters()]), or a buffer.
    max_logit_scale: the largest value that a learnable scale takes effect with; None: no bound.
    The other options are those of the function.
    The property `logit_scale`, (), is the scale that takes effect now, for a log.
    Source: Radford et al. 2021, section 2.5.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        max_logit_scale: float | None = 100.0,
        symmetric: bool = True,
        normalize: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | Group | None = None,
        backend: str = "auto",
    ):
        options = dict(symmetric=symmetric, normalize=normalize, reduction=reduction, group=group, backend=backend)
        super().__init__(_inverse(temperature), learnable, max_logit_scale, options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, logit_scale=self.logit_scale, **self.options)


class SigLIPLoss(_WithLogitScale):
    """`flashcl.siglip` with learnable scale and bias.

    Call with x (N, D), y (N, D).

    logit_scale, logit_bias: those to begin with.
    learnable: whether `log_logit_scale` and `logit_bias` are parameters, to be given to the optimizer, or buffers.
    The other options are those of the function.
    The property `logit_scale`, (), is the scale that takes effect now, for a log.
    Source: Zhai et al. 2023, algorithm 1.
    """

    logit_bias: Tensor  # ()

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        learnable: bool = True,
        normalize: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | Group | None = None,
        backend: str = "auto",
    ):
        options = dict(normalize=normalize, reduction=reduction, group=group, backend=backend)
        super().__init__(_positive("logit_scale", logit_scale), learnable, None, options)
        self._hold("logit_bias", checks.number("logit_bias", logit_bias), learnable)

    def extra_repr(self) -> str:
        bias = "?" if self.logit_bias.is_meta else f"{self.logit_bias.item():.4g}"
        return f"{super().extra_repr()}, logit_bias={bias}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return siglip(x, y, logit_scale=self.logit_scale, logit_bias=self.logit_bias, **self.options)


class NTXentLoss(_WithLogitScale):
    """`flashcl.nt_xent` with SimCLR's fixed temperature, 0.5.

    Call with z1 (N, D), z2 (N, D).

    temperature: the fixed one, or the one to begin with.
    learnable: whether `log_logit_scale` is a parameter, to be given to the optimizer, or a buffer.
    The other options are those of the function.
    The property `logit_scale`, (), is the scale that takes effect now, for a log.
    Source: Chen et al. 2020, eq. 1.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable: bool = False,
        normalize: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | Group | None = None,
        backend: str = "auto",
    ):
        options = dict(normalize=normalize, reduction=reduction, group=group, backend=backend)
        super().__init__(_inverse(temperature), learnable, None, options)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, temperature=1 / self.logit_scale, **self.options)


class SupConLoss(_WithLogitScale):
    """`flashcl.sup_con` with a fixed temperature, 0.07.

    Call with z (N, D), labels (N,).

    temperature: the fixed one, or the one to begin with.
    learnable: whether `log_logit_scale` is a parameter, to be given to the optimizer, or a buffer.
    The other options are those of the function.
    The property `logit_scale`, (), is the scale that takes effect now, for a log.
    Source: Khosla et al. 2020, eq. 2.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        normalize: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | Group | None = None,
        backend: str = "auto",
    ):
        options = dict(normalize=normalize, reduction=reduction, group=group, backend=backend)
        super().__init__(_inverse(temperature), learnable, None, options)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(z, labels, temperature=1 / self.logit_scale, **self.options)
