"""What ptxas makes of the kernels, for GPUs that are not here. Run in a process of its own:

    python tests/compile_budget.py 90 bfloat16 whole

The host code of the triton backend runs as it is, on CPU tensors; only the launch is replaced: it compiles for the
architecture asked for and stops there. What is compiled is thus exactly what would be launched, alignment, tensor
descriptors and all. Without a driver nothing runs, and nothing may interpret: TRITON_INTERPRET must be off.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashcl.backends import triton as backend
from flashcl.engine.problem import Needs, Problem, Sigmoid, Softmax

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

INSTRUCTIONS = dict(
    mma="mma.sync", wgmma="wgmma.mma_async", tcgen05="tcgen05.mma", cp_async="cp.async.c", tma="cp.async.bulk.tensor"
)  # fmt: skip


class AbsentGPU:
    """A driver of which Triton asks only what it compiles for."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # compiled kernels are cached per device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def launches(arch, do):
    """Every launch within the `with` is compiled for `arch`, and `do(binary, grid, arguments by name)` takes its place."""
    run = JITFunction.run
    driver.set_active(AbsentGPU(arch))

    def compile_only(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        do(binary, grid, dict(zip(kernel.arg_names, args)) | options)

    with mock.patch.object(JITFunction, "run", compile_only):
        yield


def resources(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL")}
    return dict(
        registers=found["REG"],
        memory_of_threads=found["STACK"] + found["LOCAL"],  # bytes: the kernels have no arrays of their own, so these are spills
        shared=binary.metadata.shared,
        instructions=[name for name, text in INSTRUCTIONS.items() if text in binary.asm["ptx"]],
    )


# ---- what is compiled ----------------------------------------------------------------------------------------------------

SIZES = {"whole": 512, "ragged": 509, "single": 1}  # for multiples of 16, and for 1, Triton compiles versions of their own


def problem(program, dtype, N, triangular=False, biased=False):
    """Of the programs of one class `different` has the larger kernel: it stands for `all`."""
    x = torch.empty(N, 256, dtype=dtype)
    y = x if triangular else torch.empty_like(x)
    ids, labels = (torch.empty(N, dtype=torch.int32) for _ in range(2))
    vectors = {"all": (), "different": (ids,), "by_label": (ids, labels)}[program]
    bias = torch.empty(N) if biased else None
    center = torch.empty(N) if triangular and program == "by_label" else None
    return Problem(x, y, torch.empty(1), bias, bias, program, vectors, vectors, center, triangular)


def softmax(p):
    weight, offset = torch.empty(p.classes, len(p.x)), torch.empty(len(p.x)) if p.classes == 2 else None
    top = torch.empty_like(weight)
    if p.triangular:
        return Softmax(weight, top, row_offset=offset)
    return Softmax(weight, top, weight, top, offset, offset)


def sweep(p):
    backend.sweep(p, need_cols=True)


def grad(p):
    backend.grad(p, softmax(p), Needs(x=True, y=True, scale=True))


def grad_fixed_scale(p):
    backend.grad(p, softmax(p), Needs(x=True, y=True))


def softplus(p):
    backend.sweep_softplus(p)


def sigmoid(p):
    backend.grad(p, Sigmoid(torch.empty(len(p.x))), Needs(x=True, y=True, row_bias=True, scale=True))


def products(p):
    backend.products_in_tiles(p.x, p.y, 0)


def kernels(dtype, N, shapes=("", " triangular", " biased")):
    """(name, call, problem): the largest kernels that every row of the table serves. No loss has labels and biases."""
    for shape in shapes:
        for program in ("different",) if shape == " biased" else ("different", "by_label"):
            p = problem(program, dtype, N, triangular=shape == " triangular", biased=shape == " biased")
            for call in (sweep, grad):
                yield f"{call.__name__} {program}{shape}", call, p
    p = problem("different", dtype, N)
    yield "grad_fixed_scale different", grad_fixed_scale, p
    yield "products", products, p
    p = problem("all", dtype, N, biased=True)
    yield "softplus", softplus, p
    yield "sigmoid", sigmoid, p


def main(arch, name, sizes):
    """One JSON line per kernel. sm_86, sm_89 and sm_120 have the rows of sm_80: a few kernels speak for them."""
    dtype = getattr(torch, name)
    shapes = [("",)] if arch in (86, 89, 120) else []
    backend._arch = lambda device: arch  # what is compiled is what the backend itself would choose there
    for kernel, call, p in kernels(dtype, SIZES[sizes], *shapes):
        compiled = []
        with launches(arch, lambda binary, *_: compiled.append(binary)):
            call(p)
        used = next(resources(binary) for binary in compiled if binary.metadata.name != "fold_kernel")
        print(json.dumps(dict(arch=arch, dtype=name, kernel=kernel, sizes=sizes, **used)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
