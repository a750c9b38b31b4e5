"""float32 products on AMD's Zen 5, by oneDNN.

By default PyTorch multiplies float32 with MKL, which takes AVX2 on AMD's CPUs. Zen 5 is more than twice as fast in AVX-512, which
oneDNN takes: 450 GFLOP/s on two cores where MKL has 200 (family 26, model 2; bench/NOTES.md, which also says why Zen 4
stays with MKL). PyTorch has no function for it that is public and leaves its global settings alone; this is the operator
that torch.compile puts in the place of linear layers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# As in PyTorch 2.7 and 2.13. It is not public: where it is another one, MKL multiplies.
_SCHEMA = "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"

# MKL adds the K products of an element in blocks of up to 192, so the dense formula does; oneDNN adds them one after the other,
# with a rounding that grows with K (at K = 512 1.7 times MKL's, 2.6 times if x and y have a mean), outside the contract. In
# equal blocks of at most this it is that of MKL; blocks of 256 were outside the contract, too.
_LONGEST_SUM = 192

# oneDNN keeps the code that it makes for each shape, 460 MiB of it where the number of rows changes from step to step. So it
# gets multiples of this of rows, columns and terms, and MKL the edges: then there are few shapes, in at most 30 MiB. Less
# than this gains little, too.
_GRAIN = 128


def faster(a: Tensor, b: Tensor) -> bool:
    """Whether `mm` and `addmm_` take less time here for a (R, K) @ b (K, C) than torch's.

    `torch.backends.mkldnn.flags(enabled=False)` keeps oneDNN out of it, as it does in PyTorch.
    """
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and min(*a.shape, b.shape[1]) >= _GRAIN
        and _available()
        and torch.backends.mkldnn.enabled
    )


@functools.cache
def _available() -> bool:
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    known = operator is not None and str(operator.default._schema) == _SCHEMA
    is_zen5 = torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_zen5(processor())
    return known and is_zen5 and torch.backends.mkl.is_available()  # with another library PyTorch may be as fast


def _is_zen5(fields: dict[str, str]) -> bool:
    return fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == "26"


def processor() -> dict[str, str]:
    """What Linux says of the first core, by its own names; nothing on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:  # not Linux, or not for us to read
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out (R, C) = a (R, K) @ b (K, C)"""
    if any(size % _GRAIN for size in (*a.shape, b.shape[1])):
        addmm_(out.zero_(), a, b)
    else:  # one pass over out less
        out.copy_(product(a, b))


def addmm_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc (R, C) += a (R, K) @ b (K, C)"""
    (R, K), C = a.shape, b.shape[1]
    r, k, c = (size - size % _GRAIN for size in (R, K, C))
    acc[:r, :c].add_(product(a[:r, :k], b[:k, :c]))
    if k < K:
        acc[:r, :c].addmm_(a[:r, k:], b[k:, :c])
    if c < C:
        acc[:r, c:].addmm_(a[:r], b[:, c:])
    if r < R:
        acc[r:].addmm_(a[r:], b)


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
