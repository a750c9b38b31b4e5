"""The Triton kernels in other tiles than those of triton_kernels/config.py: what its table is decided with, on a GPU.

    python bench/tiles.py                                                    all kernels, bfloat16, N = 16,384
    python bench/tiles.py --kernel grad --d 512 --tile 128,128,64,4,3 --tile 256,128,64,8,3

A tile is BN,BM,BK,warps,stages and perhaps GROUP. The library's products with G are left out: what is timed is the kernel,
the small operations around it, and of a sweep the fold. A tile whose results are not those of the table's tile gets no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from flashcl.backends import tiled, triton as backend
from flashcl.cli.arguments import at_least_one
from flashcl.cli.bench.machine import Clock, Products, environment
from flashcl.cli.bench.suites import Workload
from flashcl.cli.text import default_device
from flashcl.engine.problem import Needs, Problem, Sigmoid, Softmax
from flashcl.triton_kernels.config import entry

TOLERANCE = 1e-2  # relative L2 error against the tile of the table: other orders of summation, G in 16 bits
CANDIDATES = {  # beside the tile of the table
    "sweep": ["128,128,64,8,4", "128,128,64,4,3", "128,128,64,8,3", "256,128,64,8,3"],
    "sweep2": ["128,64,64,8,4", "64,64,64,4,4", "128,128,64,8,3"],
    "grad": ["128,128,64,8,3", "128,64,64,8,4", "128,64,64,4,3", "64,128,64,4,3"],
    "grad2": ["128,64,64,4,3", "64,64,64,4,4", "64,64,64,4,3"],
    "sigmoid": ["128,128,64,8,3", "128,64,64,8,4", "128,64,64,4,3"],
}
Call = Callable[[backend.Plan], list[Tensor]]


def calls(kernel: str, n: int, d: int, dtype: torch.dtype, device: torch.device) -> Call:
    """What a loss would ask of this entry of the table: InfoNCE of sweep, grad; SupCon of sweep2, grad2; SigLIP of sigmoid."""
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1).to(dtype) for _ in range(2))
    ids, scale = torch.arange(n, dtype=torch.int32, device=device), torch.full((1,), 14.0, device=device)
    if kernel.endswith("2"):
        vectors = ids, torch.randperm(n, device=device) // 8
        p = Problem.of(x, None, scale, None, None, "by_label", vectors, vectors, torch.zeros(n, device=device))
    else:
        p = Problem.of(x, y, scale, None, None, "different", (ids,), (ids,))
    if kernel.startswith("sweep"):
        return lambda plan: _sweep(p, plan)
    c = Sigmoid(torch.full((n,), 1 / n, device=device)) if kernel == "sigmoid" else _softmax(p)
    return lambda plan: _grad(p, c, plan)


def _sweep(p: Problem, plan: backend.Plan) -> list[Tensor]:
    s = backend.sweep(p, need_cols=True, plan=plan)
    return [lse.value() for lse in (s.row, s.col) if lse is not None]


def _grad(p: Problem, c: Softmax | Sigmoid, plan: backend.Plan) -> list[Tensor]:
    g = backend.grad(p, c, Needs(x=True, y=not p.triangular, scale=True), plan=plan)
    return [v for v in vars(g).values() if v is not None]


def _softmax(p: Problem) -> Softmax:
    top, weight = backend.sweep(p, need_cols=False).row.top, torch.full((p.classes, len(p.x)), 1 / len(p.x), device=p.x.device)
    if p.triangular:
        return Softmax(weight, top, row_offset=weight[0] / 8, about=torch.zeros(1, device=p.x.device))
    return Softmax(weight, top, weight, top.clone(), about=torch.zeros(1, device=p.x.device))


def milliseconds(call: Callable[[], object], clock: Clock, repeats: int) -> float:
    """The median, with cold caches; the first call, which compiles, does not count."""
    marks = []
    for _ in range(repeats + 1):
        clock.cold()
        start = clock.mark()
        call()
        marks.append((start, clock.mark()))
    clock.wait()
    return statistics.median(clock.between(*pair) for pair in marks[1:])


def compiled(call: Callable[[], object]) -> str:
    """Registers and spills of the kernels that a call launches."""
    found, run = [], JITFunction.run

    def recording(kernel, *args, **options):
        found.append(run(kernel, *args, **options))
        return found[-1]

    with mock.patch.object(JITFunction, "run", recording):
        call()
    worst = max((k for k in found if getattr(k, "n_regs", None) is not None), key=lambda k: k.n_regs, default=None)
    return "" if worst is None else f"{worst.n_regs} registers, {worst.n_spills} spills"


def measure(kernel: str, n: int, d: int, dtype: torch.dtype, tiles: list[str], repeats: int, device: torch.device) -> list[dict]:
    """A row for the tile of the table and for each of `tiles`."""
    call, clock = calls(kernel, n, d, dtype, device), Clock(device)
    of_table = entry(backend._arch(device), kernel, dtype)
    plans = {"table": backend.Plan(of_table.tile, of_table.square)}
    for text in tiles:
        sizes = dict(zip(("BN", "BM", "BK", "warps", "stages", "GROUP"), map(int, text.split(","))))
        tile = dataclasses.replace(of_table.tile, **sizes)
        plans[text] = backend.Plan(tile, tile if tile.BN == tile.BM else of_table.square)
    right, rows = call(plans["table"]), []
    for name, plan in plans.items():
        out = dict(kernel=kernel, n=n, d=d, tile=name)
        try:
            errors = [(a - b).norm() / b.norm() for a, b in zip(call(plan), right)]
            error = torch.stack(errors).max().item()  # NaN if one is, unlike Python's max
            with mock.patch.object(tiled, "addmm_", lambda *_, **__: None):
                out |= dict(resources=compiled(lambda: call(plan)), error=error)
                if error < TOLERANCE:
                    out["ms"] = milliseconds(lambda: call(plan), clock, repeats)
                    out["tflops"] = (n * n if kernel.endswith("2") else 2 * n * n) * d / out["ms"] / 1e9
        except Exception as failure:  # a tile that does not compile or does not fit is a result
            out["error"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
        rows.append(out)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in out.items()), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--n", type=at_least_one, default=16_384)
    parser.add_argument("--d", type=at_least_one, nargs="+", default=[512, 1024])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tile", action="append", help="in place of the candidates of this file")
    parser.add_argument("--repeats", type=at_least_one, default=20)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args(arguments)
    device, dtype, rows = default_device(), getattr(torch, args.dtype), []
    if reason := backend.unusable(device, dtype):
        parser.error(reason)
    for d in args.d:
        clock = Clock(device)
        products = Products(Workload("info_nce", args.n, d, args.dtype), clock, device)
        rate = products.flops / milliseconds(products, clock, args.repeats) / 1e9
        print(f"D = {d}: the library's products {rate:.4g} TFLOP/s", flush=True)
        for kernel in args.kernel:
            of_d = measure(kernel, args.n, d, dtype, args.tile or CANDIDATES[kernel], args.repeats, device)
            rows += [r | dict(library_tflops=rate) for r in of_d]
    if args.out:
        args.out.write_text(json.dumps(dict(environment=environment(device), rows=rows), indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
