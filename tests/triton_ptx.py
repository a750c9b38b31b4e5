"""The Triton kernels, compiled for a GPU that is not here and run by a simulated one (ptx/). In a process of its own:

    python tests/triton_ptx.py 90 bfloat16

The host code of the triton backend runs as it is, on CPU tensors; only the launch is replaced. What the interpreter of Triton
cannot show is in it: the compiled code, with its layouts, its wgmma, mma.sync, TMA and cp.async, and its alignment hints.
"""

from __future__ import annotations

import ctypes
import json
import sys
from unittest import mock

import torch
from triton.backends.nvidia.compiler import CUDABackend

import ptx
from compile_budget import launches
from kernels import everything, in_float64, problem

from flashcl.backends import torch as reference, triton as backend
from flashcl.contract import LOSSES, REGIMES, case, violations
from flashcl.engine.problem import CLASSES

SWIZZLES = (0, 32, 64, 128)  # bytes, as Triton numbers them


def on(machine, used):
    """What takes the place of a launch: the PTX runs on the machine. `used` learns the name of the kernel."""

    def run(binary, grid, arguments):
        meta = binary.metadata
        descriptors = list(meta.tensordesc_meta or ())
        kinds = binary.src.signature.items()
        params = [p for name, kind in kinds for p in parameters(kind, arguments.get(name), descriptors, machine)]
        used.add(meta.name)
        machine.launch(binary.asm["ptx"], meta.name, grid, 32 * meta.num_warps, meta.shared, params)

    return run


def parameters(kind, value, descriptors, machine):
    """What the launcher of Triton hands to a kernel for an argument."""
    if isinstance(kind, tuple):
        return [p for k, v in zip(kind, value) for p in parameters(k, v, descriptors, machine)]
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [ctypes.c_uint64(value.data_ptr())]
    if kind.startswith("tensordesc"):
        at = descriptors.pop(0)
        tensor_map = machine.tensor_map(
            value.base.data_ptr(), at["elem_size"], SWIZZLES[at["swizzle"]], at["block_size"], value.shape, value.strides
        )
        return [tensor_map, *map(ctypes.c_int32, value.shape), *map(ctypes.c_int64, value.strides)]
    return [{"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind](value)]


# (N, M, D, triangular): 1 to 3 tiles a side, ragged and whole; columns that a copy pads, that end within a step and with one.
PROBLEMS = [(300, 280, 136, False), (256, 384, 64, False), (300, 300, 72, True)]


def main(arch, dtype):
    """One JSON line per problem, with its largest relative errors, and one per case of the contract, with its violations."""
    machine, used = ptx.machine(), set()
    backend._arch = lambda device: arch
    backend.unusable = lambda device, dtype: None
    # What runs is PTX: its machine code, a fifth of the time, is made and looked at in compile_budget.py.
    with launches(arch, on(machine, used)), mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):
        for program in CLASSES:
            for N, M, D, triangular in PROBLEMS:
                p = problem(N, M, D, program, triangular, dtype=dtype)
                got, want = everything(backend, p), everything(reference, in_float64(p))
                errors = {k: ((got[k] - v).abs().max() / v.abs().max()).item() for k, v in want.items()}
                say(problem=f"{program} {N} x {M} x {D}", errors=errors)
        for loss in LOSSES:
            for regime in REGIMES:
                found = violations(case(loss, regime, n=40), dtype, backend="triton", device="cpu")
                say(case=f"{loss} {regime}", violations=[str(v) for v in found])
    say(kernels=sorted(used))


def say(**what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
