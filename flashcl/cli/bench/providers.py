"""Who is measured: one function per provider, from a workload and its inputs to a function of the same tensors.

Each is called the way its own documentation tells a user to, with its exact mode where it has an approximate one, and
without its own normalisation, since the inputs are unit vectors. `Unavailable` says why a provider does not take part.
The adapters of other packages were written for the versions in WRITTEN_FOR; those of open_clip,
quack and flex-attention have not run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

import flashcl
from flashcl import reference
from flashcl.cli.bench.suites import Workload
from flashcl.contract import Case
from flashcl.engine import dispatch

Loss = Callable[..., Tensor]  # of the tensors of a case, by name


class Unavailable(Exception):
    """This provider takes no part, for the reason in the message."""


WRITTEN_FOR = {
    "open_clip_torch": "3.3.0",
    "memeff": "0.3.1",
    "siglip-kernel": "0.1.2",
    "inf-cl": "1.2.1",
    "cut-cross-entropy": "25.1.1",
    "quack-kernels": "0.6.5",
}


def _import(module: str, package: str) -> ModuleType:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"not installed (pip install {package})") from None
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that does not load here says so in many ways
        raise Unavailable(f"does not import: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _on_gpu(case: Case) -> None:
    if case.device.type != "cuda":
        raise Unavailable("runs on a CUDA GPU only")


def _expresses(work: Workload, *losses: str) -> None:
    if work.loss not in losses:
        raise Unavailable(f"has no {work.loss}")


def _both_ways(work: Workload, one_way: Loss) -> Loss:
    """Symmetric InfoNCE by a loss that has one direction."""
    if work.loss == "info_nce one-way":
        return one_way
    return lambda x, y, logit_scale: (one_way(x, y, logit_scale) + one_way(y, x, logit_scale)) / 2


# ---- flashcl ---------------------------------------------------------------------------------------------------------


def _flashcl(backend: str) -> Callable[[Workload, Case], Loss]:
    def provider(work: Workload, case: Case) -> Loss:
        if reason := dispatch.unusable(backend, case.device, getattr(torch, work.dtype)):
            raise Unavailable(reason)
        function = getattr(flashcl, case.function)
        return lambda **tensors: function(**tensors, **case.options, backend=backend)

    return provider


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def dense(work: Workload, case: Case) -> Loss:
    function = getattr(reference, case.function)
    return lambda **tensors: function(**tensors, **case.options)


def compiled(work: Workload, case: Case) -> Loss:
    torch._dynamo.reset()  # one graph per workload, specialised to its shape, as in training
    return torch.compile(dense(work, case), dynamic=False)


def flex_attention(work: Workload, case: Case) -> Loss:
    """The log-sum-exps of FlexAttention, with a value nobody reads; the positives beside it."""
    _on_gpu(case)  # on a CPU it has no backward
    _expresses(work, "info_nce", "info_nce one-way", "nt_xent", "sup_con")
    from torch.nn.attention import flex_attention as flex

    attend = torch.compile(flex.flex_attention, dynamic=False)

    def without_self(score, batch, head, i, j):
        return torch.where(i == j, -math.inf, score)

    def row_lse(x, y, scale, score_mod=None):
        q, k = (x * scale).to(x.dtype)[None, None], y[None, None]
        value = torch.zeros(1, 1, len(y), 16, dtype=y.dtype, device=y.device)
        if hasattr(flex, "AuxRequest"):
            return attend(q, k, value, score_mod, scale=1.0, return_aux=flex.AuxRequest(lse=True))[1].lse[0, 0]
        return attend(q, k, value, score_mod, scale=1.0, return_lse=True)[1][0, 0]

    def one_way(x, y, logit_scale):
        return (row_lse(x, y, logit_scale) - logit_scale * (x.float() * y.float()).sum(1)).mean()

    def nt_xent(z1, z2, temperature):
        z = torch.cat([z1, z2])
        positive = (z.float() * z.roll(len(z1), 0).float()).sum(1) / temperature
        return (row_lse(z, z, 1 / temperature, without_self) - positive).mean()

    if work.loss == "sup_con":
        labels = case.options["labels"]
        classes, count = int(labels.max()) + 1, labels.bincount()[labels] - 1

    def sup_con(z, temperature):
        wide = z.float()
        sums = torch.zeros(classes, z.shape[1], device=z.device).index_add(0, labels, wide)[labels]
        positive = (wide * (sums - wide)).sum(1) / temperature / count.clamp(min=1)
        loss = row_lse(z, z, 1 / temperature, without_self) - positive
        return (loss * (count > 0)).sum() / (count > 0).sum()

    return {"nt_xent": nt_xent, "sup_con": sup_con}.get(work.loss) or _both_ways(work, one_way)


# ---- other packages --------------------------------------------------------------------------------------------------


def open_clip(work: Workload, case: Case) -> Loss:
    losses = _import("open_clip.loss", "open_clip_torch")
    _expresses(work, "info_nce", "siglip")
    loss = losses.ClipLoss() if work.loss == "info_nce" else losses.SigLipLoss()
    return lambda x, y, **scales: loss(x, y, **scales)


def memeff(work: Workload, case: Case) -> Loss:
    """Its temperature is a number: no gradient. stable=True, the default, would scale the gradients by sqrt(N T)."""
    _on_gpu(case)
    package = _import("memeff", "memeff")
    _expresses(work, "info_nce", "info_nce one-way")
    options = dict(temperature=1 / case.tensors["logit_scale"].item(), normalized_inputs=True, stable=False)
    if work.loss == "info_nce":
        loss = package.MemoryEfficientCLIPLoss(**options)
    else:
        loss = package.MemoryEfficientQwen3Loss(**options, margin=3.0)  # from 2 on, no negative is masked
    return lambda x, y, logit_scale: loss(x, y)


def siglip_kernel(work: Workload, case: Case) -> Loss:
    _on_gpu(case)
    loss = _import("siglip_kernel", "siglip-kernel").fused_siglip_loss
    _expresses(work, "siglip")
    return lambda x, y, logit_scale, logit_bias: loss(x, y, logit_scale.log(), logit_bias)


def inf_cl(work: Workload, case: Case) -> Loss:
    """In float32 (TF32 products) whatever comes; heads of at most 256 features."""
    _on_gpu(case)
    loss = _import("inf_cl", "inf-cl").cal_flash_loss
    _expresses(work, "info_nce", "info_nce one-way")
    head = math.gcd(work.d, 256)
    return _both_ways(work, lambda x, y, logit_scale: loss(x, y, scale=logit_scale, head_dim=head).mean())


def cut_cross_entropy(work: Workload, case: Case) -> Loss:
    """The rows of y as vocabulary. Without its gradient filter, which is made for the few likely words of a language
    model: here every probability is below its threshold."""
    _on_gpu(case)
    loss = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    _expresses(work, "info_nce", "info_nce one-way")
    own = torch.arange(work.n, device=case.device)
    return _both_ways(work, lambda x, y, logit_scale: loss((x * logit_scale).to(x.dtype), y, own, filter_eps=None))


def quack(work: Workload, case: Case) -> Loss:
    """The rows of y as vocabulary."""
    _on_gpu(case)
    loss = _import("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    _expresses(work, "info_nce", "info_nce one-way")
    own = torch.arange(work.n, device=case.device)
    return _both_ways(work, lambda x, y, logit_scale: loss((x * logit_scale).to(x.dtype), y, own))


PROVIDERS: dict[str, Callable[[Workload, Case], Loss]] = {
    "flashcl-cuda": _flashcl("cuda"),
    "flashcl-triton": _flashcl("triton"),
    "flashcl-torch": _flashcl("torch"),
    "dense": dense,
    "torch.compile": compiled,
    "flex-attention": flex_attention,
    "open_clip": open_clip,
    "memeff": memeff,
    "siglip-kernel": siglip_kernel,
    "inf-cl": inf_cl,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
}
