"""Matrix products whose operands are of 16 bits and whose accumulator is not."""

import torch
from torch import Tensor

# PyTorch hands cuBLAS a float32 output for 16-bit operands, on CUDA only: of mm since 2.8; of addmm with a float32 sum to add to
# since pytorch #167931, of November 2025 (2.11 has it, 2.9 has not).
_WIDE_OUTPUT = hasattr(torch.ops.aten.mm, "dtype_out")
_WIDE_SUM = torch.__version__ >= (2, 11)


def mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out (R, C) = a (R, K) @ b (K, C). `out` may be wider than a and b: float32 for 16-bit operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and _WIDE_OUTPUT:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc (R, C) += a (R, K) @ b (K, C), accumulated in the dtype of acc whatever that of a and b."""
    if a.dtype == acc.dtype:
        acc.addmm_(a, b)
    elif acc.is_cuda and _WIDE_SUM:
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    elif acc.is_cuda and _WIDE_OUTPUT:
        acc += torch.mm(a, b, out_dtype=acc.dtype)
    else:
        acc.addmm_(a.to(acc.dtype), b.to(acc.dtype))
