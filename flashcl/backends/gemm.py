"""Matrix products for which torch.mm is not enough: a wide accumulator for operands of 16 bits, and speed on some CPUs."""

import torch
from torch import Tensor

from flashcl.backends import onednn

# PyTorch >= 2.8 hands cuBLAS a float32 output for 16-bit operands, on CUDA only.
_WIDE_OUTPUT = hasattr(torch.ops.aten.addmm, "dtype_out")


def _wide_output(a: Tensor, out: Tensor) -> bool:
    # PyTorch refuses it for float16 where the user lets cuBLAS accumulate in float16.
    narrow_sums = a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return out.is_cuda and _WIDE_OUTPUT and not narrow_sums


def mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out (R, C) = a (R, K) @ b (K, C). `out` may be wider than a and b: float32 for 16-bit operands."""
    if a.dtype != out.dtype and _wide_output(a, out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if onednn.faster(a, b):
        onednn.mm(a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def addmm_(acc: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """acc (R, C) += a (R, K) @ b (K, C), accumulated in the dtype of acc whatever that of a and b.

    first: what is in acc does not count.
    """
    if first:
        mm(a, b, out=acc)
        return
    if a.dtype != acc.dtype and _wide_output(a, acc):
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
        return
    a, b = a.to(acc.dtype), b.to(acc.dtype)
    if onednn.faster(a, b):
        onednn.addmm_(acc, a, b)
    else:
        acc.addmm_(a, b)
