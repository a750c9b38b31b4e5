"""The Triton kernels, compiled for a GPU that is not here and run by one that is a program (ptx/). In a process of its own:

    python tests/triton_ptx.py 90 bfloat16

The host code of the triton backend runs as it is, on CPU tensors; only the launch is replaced. What the interpreter of Triton
cannot show is in it: the compiled code, with its layouts, its wgmma, mma.sync, TMA and cp.async, and its alignment hints.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ptx
from compile_budget import AbsentGPU
from kernels import everything, problem, wide

from flashcl.backends import torch as reference, triton as backend
from flashcl.contract import LOSSES, REGIMES, case, violations
from flashcl.engine.problem import CLASSES

SWIZZLES = (0, 32, 64, 128)  # bytes, as Triton numbers them


class Launches:
    """Within the `with` every launch runs the PTX that Triton compiles for `arch`."""

    def __init__(self, arch, machine):
        self.arch, self.machine, self.kernels = arch, machine, set()

    def __enter__(self):
        self.run = JITFunction.run
        driver.set_active(AbsentGPU(self.arch))

        def launch(kernel, *args, grid, warmup, **options):
            binary = self.run(kernel, *args, grid=grid, warmup=True, **options)
            values = dict(zip(kernel.arg_names, args)) | options
            meta = list(binary.metadata.tensordesc_meta or ())
            params = [p for name, kind in binary.src.signature.items() for p in parameters(kind, values.get(name), meta, self.machine)]
            threads = 32 * binary.metadata.num_warps
            self.kernels.add(binary.metadata.name)
            self.machine.launch(binary.asm["ptx"], binary.metadata.name, grid, threads, binary.metadata.shared, params)

        JITFunction.run = launch
        return self

    def __exit__(self, *_):
        JITFunction.run = self.run


def parameters(kind, value, meta, machine):
    """What the launcher of Triton hands to a kernel for an argument."""
    if isinstance(kind, tuple):
        return [p for k, v in zip(kind, value) for p in parameters(k, v, meta, machine)]
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [ctypes.c_uint64(value.data_ptr())]
    if kind.startswith("tensordesc"):
        at = meta.pop(0)
        tensor_map = machine.tensor_map(
            value.base.data_ptr(), at["elem_size"], SWIZZLES[at["swizzle"]], at["block_size"], value.shape, value.strides
        )
        return [tensor_map, *map(ctypes.c_int32, value.shape), *map(ctypes.c_int64, value.strides)]
    return [{"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind](value)]


# (N, M, D, triangular): 1 to 3 tiles a side, ragged and whole; columns that a copy pads, that end within a step and with one.
PROBLEMS = [(300, 280, 136, False), (256, 384, 64, False), (300, 300, 72, True)]


def main(arch, dtype):
    """One JSON line per problem, with its largest relative errors, and one per case of the contract, with its violations."""
    machine = ptx.machine()
    backend._arch = lambda device: arch
    backend.unusable = lambda device, dtype: None
    with Launches(arch, machine) as launches:
        for program in CLASSES:
            for N, M, D, triangular in PROBLEMS:
                p = problem(N, M, D, program, triangular, dtype=dtype)
                got, want = everything(backend, p), everything(reference, wide(p))
                errors = {k: ((got[k] - v).abs().max() / v.abs().max()).item() for k, v in want.items()}
                say(problem=f"{program} {N} x {M} x {D}", errors=errors)
        for loss in LOSSES:
            for regime in REGIMES:
                found = violations(case(loss, regime, n=40), dtype, backend="triton", device="cpu")
                say(case=f"{loss} {regime}", violations=[str(v) for v in found])
    say(kernels=sorted(launches.kernels))


def say(**what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
