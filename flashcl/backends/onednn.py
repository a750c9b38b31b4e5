"""float32 products on AMD's Zen 5, by oneDNN.

PyTorch multiplies float32 with MKL, which takes AVX2 on AMD's CPUs. Zen 5 is more than twice as fast in AVX-512, which oneDNN
takes: 450 GFLOP/s on two cores where MKL has 200 (bench/NOTES.md, which also says why Zen 4 stays with MKL). PyTorch
has no public product by oneDNN in float32; this is the operator that torch.compile puts in the place of linear layers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# As in PyTorch 2.7 and 2.13. It is not public: where it is another one, MKL multiplies.
_SCHEMA = "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"

# MKL adds the K products of an element in blocks of 192, so the dense formula does; oneDNN adds them one after the other, with
# a rounding that grows with K (at K = 512 1.7 times MKL's, 2.6 times if x and y have a mean), outside the contract. In
# these blocks it is at most MKL's; blocks of 256 were outside the contract, too.
_LONGEST_SUM = 192

# Below this many multiplications a call costs as much as it saves, and each new shape costs 0.3 ms more. With fewer rows or
# columns than this the copies of blocks cost as much (5 x 4096 x 4096: 1.2 times MKL's time, 512 x 9000 x 3: 2.2 times).
_LEAST_WORK, _NARROWEST = 2**22, 64


def faster(a: Tensor, b: Tensor) -> bool:
    """Whether `product` takes less time for a (R, K) @ b (K, C) than torch.mm.

    `torch.backends.mkldnn.flags(enabled=False)` keeps oneDNN out of it, as it does in PyTorch.
    """
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.numel() * b.shape[1] >= _LEAST_WORK
        and min(a.shape[0], b.shape[1]) >= _NARROWEST
        and _available()
        and torch._C._get_mkldnn_enabled()
    )


@functools.cache
def _available() -> bool:
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    known = operator is not None and str(operator.default._schema) == _SCHEMA
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_zen5(processor())


def _is_zen5(fields: dict[str, str]) -> bool:
    return fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == "26"


def processor() -> dict[str, str]:
    """What Linux says of the first core, nothing on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    first = cpuinfo.read_text().partition("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (R, K) @ b (K, C)"""
    if not a.is_contiguous() and b.shape[1] < a.shape[0]:
        return product(b.T, a.T).T  # oneDNN gets a contiguous copy of its first operand: let that be the smaller one
    total, blocks = None, -(-a.shape[1] // _LONGEST_SUM)
    for a_block, b_block in zip(a.tensor_split(blocks, 1), b.tensor_split(blocks)):  # (R, BK), (BK, C)
        part = multiply(a_block, b_block)
        total = part if total is None else total.add_(part)
    return total


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (R, K) @ b (K, C), each element summed up from the first product to the last"""
    weight = b.T
    if not (weight.is_contiguous() or b.is_contiguous()):
        weight = weight.contiguous()  # with other strides oneDNN takes its reference loops, 500 times as long
    return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
