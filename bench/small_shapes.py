"""Every loss of a kernel backend on small odd shapes, forward and backward: what compute-sanitizer watches."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from dataclasses import replace
from unittest import mock

import torch

import flashcl
from flashcl import contract
from flashcl.backends import gemm, tiled
from flashcl.engine import dispatch

# (N, D); M > N where a loss takes it. The last is the smallest that gives CTAs of the CUDA kernels several tiles, so that
# both of their consumers work and the stages of a pipeline are filled more than once.
SHAPES = [(1, 1), (67, 40), (131, 72), (1300, 264)]


def float32_products() -> contextlib.AbstractContextManager:
    """racecheck ends in an error of its own in cuBLAS kernels of 16 bits (bench/NOTES.md); those of float32 it can follow."""

    def addmm_(acc, a, b, *, first=False):
        gemm.addmm_(acc, a.float(), b.float(), first=first)

    return mock.patch.object(tiled, "addmm_", addmm_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=[name for name in dispatch.BACKENDS if name != "torch"])
    parser.add_argument("dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--float32-products", action="store_true", help="cuBLAS multiplies G in float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with float32_products() if args.float32_products else contextlib.nullcontext():
        for loss in contract.LOSSES:
            for n, d in SHAPES:
                c = contract.case(loss, "init", n=n, d=d).to(dtype, "cuda")
                c = replace(c, options=c.options | dict(backend=args.backend))
                contract.evaluate(getattr(flashcl, c.function), c)
                torch.cuda.synchronize()
            print(f"{args.backend} {loss} {dtype}", flush=True)
    print("all shapes done", flush=True)
    # What autograd's thread still holds of a graph, it may release while Python shuts down, and abort: seen under the sanitizer.
    gc.collect()
    time.sleep(2)


if __name__ == "__main__":
    main()
