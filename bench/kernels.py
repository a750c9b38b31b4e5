"""Where the GPU time of a step goes, forward and backward: kernel by kernel, with the rates of those that multiply.

    python bench/kernels.py                                                    the losses of the core table
    python bench/kernels.py --loss siglip --n 65536 --d 768 1152 --backend triton

Kernels are counted by PyTorch's profiler. "sweep" and "grad" are flashcl's passes over S, "products" the library's with G;
"other" is what is O(N D). % is of the rate at which the library multiplies at the chunk shapes, in the same process.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from flashcl.cli.arguments import at_least_one
from flashcl.cli.bench.machine import Clock, Products, environment
from flashcl.cli.bench.measure import backward
from flashcl.cli.bench.providers import PROVIDERS
from flashcl.cli.bench.suites import LOSSES, SUITES, USEFUL, Workload
from flashcl.engine import dispatch

PARTS = {  # by the names of kernels; the first that matches
    "sweep": r"SweepArgs|sweep_kernel",
    "grad": r"GradArgs|SigmoidArgs|grad_kernel",
    "products": r"nvjet|gemm|cutlass|xmma|splitK",
    "other": r"",
}


def part_of(kernel: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, kernel))


def flops(work: Workload) -> dict[str, float]:
    """Of one step, by part: what a loss needs of each, as suites.USEFUL counts."""
    forward, full = USEFUL[work.loss]
    of_s = min(forward, 2)
    sweeps = 0 if work.loss == "siglip" else of_s
    again = of_s if work.loss == "info_nce one-way" else 0  # flashcl makes S twice there, too
    units = dict(sweep=sweeps, grad=of_s, products=full + again - sweeps - of_s)
    return {part: n * float(work.n) ** 2 * work.d for part, n in units.items()}


def measure(work: Workload, backend: str, repeats: int, device: torch.device) -> dict:
    case, clock = work.inputs(device), Clock(device)
    loss = PROVIDERS[f"flashcl-{backend}"](work, case)
    leaves = {name: v.detach().requires_grad_() for name, v in case.tensors.items()}
    products = Products(work, clock, device)

    def step():
        backward(loss(**leaves), leaves)

    for _ in range(3):  # compiles, and warms up
        step()
        products()
    marks = []
    for _ in range(repeats):
        marks.append((products()["products"], clock.mark()))
        step()
        marks[-1] += (clock.mark(),)
    clock.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    found = dict(step_ms=statistics.median(clock.between(start, end) for _, start, end in marks))
    found["matrix_tflops"] = products.flops / statistics.median(clock.between(*pair) for pair, *_ in marks) / 1e9
    kernels = [(e.key, e.count, e.self_device_time_total) for e in profiled.key_averages() if e.self_device_time_total > 0]
    of_part = flops(work)
    for part in PARTS:
        mine = [(count, us) for name, count, us in kernels if part_of(name) == part]
        ms = sum(us for _, us in mine) / repeats / 1e3
        found[part] = dict(ms=ms, launches=sum(count for count, _ in mine) / repeats)
        if ms and of_part.get(part):
            found[part]["tflops"] = of_part[part] / ms / 1e9
    most = sorted(kernels, key=lambda k: -k[2])[:12]
    found["kernels"] = [dict(name=name[:200], launches=n / repeats, ms=us / repeats / 1e3) for name, n, us in most]
    return found


def square_tflops(device: torch.device) -> float:
    """What the library reaches in a short run at its favourite shape, 8192 x 8192 x 8192 of bfloat16."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in "ab")
    clock, out = Clock(device), torch.empty_like(a)
    marks = []
    for _ in range(13):
        start = clock.mark()
        torch.mm(a, b.T, out=out)
        marks.append((start, clock.mark()))
    clock.wait()
    return 2 * 8192**3 / statistics.median(clock.between(*pair) for pair in marks[3:]) / 1e9


def show(work: Workload, backend: str, found: dict) -> str:
    rate = found["matrix_tflops"]
    words = [f"{work} {backend}: step {found['step_ms']:.4g} ms, {work.flops('full') / found['step_ms'] / 1e9 / rate:.1%}"]
    words[0] += f" of {rate:.4g} TFLOP/s"
    for part in PARTS:
        v = found[part]
        text = f"{part} {v['ms']:.4g} ms, {v['launches']:g} launches"
        words.append(text + (f", {v['tflops'] / rate:.1%}" if "tflops" in v else ""))
    return "; ".join(words)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=LOSSES)
    parser.add_argument("--n", type=at_least_one, nargs="+", default=[65_536])
    parser.add_argument("--d", type=at_least_one, nargs="+", default=[512])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", nargs="+", choices=dispatch.BACKENDS, default=["cuda", "triton"])
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no CUDA GPU: torch {torch.__version__} finds none here")
    device, rows = torch.device("cuda"), []
    square = square_tflops(device)
    print(f"cuBLAS, 8192 x 8192 x 8192, a short run: {square:.4g} TFLOP/s", flush=True)
    works = [Workload(loss, n, d, args.dtype) for loss in args.loss or () for n in args.n for d in args.d]
    for work in works or SUITES["core"]:
        for backend in args.backend:
            if reason := dispatch.unusable(backend, device, getattr(torch, work.dtype)):
                print(f"{work} {backend}: {reason}", flush=True)
                continue
            found = measure(work, backend, args.repeats, device)
            rows.append(vars(work) | dict(backend=backend) | found)
            print(show(work, backend, found), flush=True)
            torch.cuda.empty_cache()
    if args.out:
        where = environment(device) | dict(square_tflops=square)
        args.out.write_text(json.dumps(dict(environment=where, rows=rows), indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
