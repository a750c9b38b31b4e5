"""What is measured: a workload is one loss at one size, a suite is a list of workloads.

N counts the rows of the logits S everywhere: `nt_xent` gets N / 2 pairs of views, so that the same N is the same work.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from flashcl.cli.arguments import UsageError
from flashcl.contract import Case

LOSSES = ("info_nce", "info_nce one-way", "siglip", "nt_xent", "sup_con")
MODES = ("forward", "backward", "full")
TEMPERATURE, BIAS = 0.07, -10.0

# Useful FLOPs in units of N^2 D, (forward alone, forward and backward): the fewest known that need no N x N memory. A
# product of (N, D) with (D, N) has 2. Symmetric InfoNCE must know all normalisers before it can weigh one pair, so it
# makes S twice; SigLIP needs none, and a softmax in one direction can be scaled row by row later: S once. nt_xent and
# sup_con have S = S^T and half of the tiles.
USEFUL = {"info_nce": (2, 8), "info_nce one-way": (2, 6), "siglip": (2, 6), "nt_xent": (1, 4), "sup_con": (1, 4)}


@dataclass(frozen=True)
class Workload:
    loss: str  # one of LOSSES
    n: int  # rows and columns of S
    d: int
    dtype: str  # "float32", ...

    def __post_init__(self):
        if self.loss == "nt_xent" and self.n % 2:
            raise UsageError(f"nt_xent has two rows for each pair: N must be even, got {self.n}")

    def __str__(self) -> str:
        return f"{self.loss} {self.n:,} x {self.d} {self.dtype}"

    def flops(self, mode: str) -> float:
        """Useful FLOPs. Where a loss makes its gradients in the forward pass, "backward" looks short: judge "full"."""
        forward, full = USEFUL[self.loss]
        return {"forward": forward, "backward": full - forward, "full": full}[mode] * float(self.n) ** 2 * self.d

    def compulsory_bytes(self) -> int:
        """Every embedding read once, every gradient written once."""
        towers = 1 if self.loss in ("nt_xent", "sup_con") else 2
        return 2 * towers * self.n * self.d * getattr(torch, self.dtype).itemsize

    def inputs(self, device: torch.device) -> Case:
        """Unit vectors in mid-training: partners at a cosine of 1/2, so that positives and negatives both count."""
        generator = torch.Generator(device).manual_seed(0)
        wide = torch.float64 if self.dtype == "float64" else torch.float32
        draw = dict(generator=generator, device=device, dtype=wide)
        number = dict(device=device, dtype=wide)
        scale, temperature = torch.tensor(1 / TEMPERATURE, **number), torch.tensor(TEMPERATURE, **number)

        def directions(rows):
            return F.normalize(torch.randn(rows, self.d, **draw), dim=1)

        def views(of, noise):
            return F.normalize(of + noise * directions(len(of)), dim=1).to(getattr(torch, self.dtype))

        if self.loss == "sup_con":
            labels = torch.randint(math.ceil(self.n / 8), (self.n,), generator=generator, device=device)
            z = views(directions(math.ceil(self.n / 8))[labels], 1.0)
            return Case("sup_con", dict(z=z, temperature=temperature), dict(labels=labels))
        x = directions(self.n // 2 if self.loss == "nt_xent" else self.n)
        x, y = views(x, 0.0), views(x, math.sqrt(3))
        match self.loss:
            case "info_nce":
                return Case("info_nce", dict(x=x, y=y, logit_scale=scale), {})
            case "info_nce one-way":
                return Case("info_nce", dict(x=x, y=y, logit_scale=scale), dict(symmetric=False))
            case "siglip":
                bias = torch.tensor(BIAS, **number)
                return Case("siglip", dict(x=x, y=y, logit_scale=scale, logit_bias=bias), {})
            case "nt_xent":
                return Case("nt_xent", dict(z1=x, z2=y, temperature=temperature), {})


KEY = tuple(field.name for field in fields(Workload))


def grid(losses, sizes, dims, dtypes) -> list[Workload]:
    """All combinations, the small ones first: what is left out at the end of the time is what costs most."""
    return [Workload(loss, n, d, dtype) for n, d, dtype, loss in itertools.product(sizes, dims, dtypes, losses)]


SUITES = {
    # minutes on two CPU cores
    "quick": grid(("info_nce", "siglip", "nt_xent", "sup_con"), (1024, 2048), (128,), ("float32",)),
    # the table of the README without a GPU
    "cpu": grid(("info_nce", "siglip", "nt_xent", "sup_con"), (1024, 2048, 4096, 8192, 16_384), (512,), ("float32",)),
    # the table of the README, in the order of what it cannot do without
    "core": [
        Workload("info_nce", 65_536, 512, "bfloat16"),
        Workload("siglip", 65_536, 768, "bfloat16"),
        Workload("nt_xent", 65_536, 512, "bfloat16"),
        Workload("info_nce", 65_536, 768, "bfloat16"),
        Workload("info_nce", 65_536, 1024, "bfloat16"),
        Workload("siglip", 65_536, 1152, "bfloat16"),
        Workload("sup_con", 65_536, 512, "bfloat16"),
        Workload("info_nce", 16_384, 512, "bfloat16"),
        Workload("info_nce", 4096, 512, "bfloat16"),
        Workload("info_nce", 65_536, 2048, "bfloat16"),
        Workload("info_nce one-way", 65_536, 512, "bfloat16"),
        Workload("info_nce", 65_536, 512, "float32"),
    ],
    "sizes": grid(LOSSES, (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072), (512,), ("bfloat16",)),
    "widths": grid(LOSSES, (65_536,), (256, 384, 512, 768, 1024, 1152, 2048, 4096), ("bfloat16",)),
    "dtypes": grid(LOSSES, (32_768,), (768,), ("float16", "float32")),
    "million": [Workload("info_nce", 1_048_576, 512, "bfloat16")],
}


def part(workloads: list, k: int, n: int) -> list:
    """The k-th of n shares, 1 <= k <= n: every n-th item, so that the shares cost about the same."""
    return workloads[k - 1 :: n]
