"""Steps of a few thousand rows on a GPU, where the host is slower than the GPU: eager, compiled, and in a CUDA graph.

    python bench/small.py

Milliseconds of a training step of InfoNCE, forward and backward, bfloat16: the wall clock of many steps over their number, so
that the slower one of host and GPU shows. "graph" is torch.cuda.make_graphed_callables: a loss whose forward and backward are
replayed, each with one call. "torch.compile, graph" is its mode "reduce-overhead", which makes graphs, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flashcl
from flashcl import reference
from flashcl.cli.arguments import at_least_one
from flashcl.cli.bench.machine import environment
from flashcl.engine import dispatch

STEPS = 100


def milliseconds(loss: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    def step():
        torch.autograd.grad(loss(*leaves), leaves)

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / STEPS


def losses(backend: str, leaves: list[Tensor]) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Name -> what makes the loss; those of flashcl that are compiled, or captured, are the functions users would."""

    def ours(x, y, scale):
        return flashcl.info_nce(x, y, logit_scale=scale, backend=backend)

    def dense(x, y, scale):
        return reference.info_nce(x, y, logit_scale=scale)

    return {
        "flashcl": lambda: ours,
        "flashcl, graph": lambda: torch.cuda.make_graphed_callables(ours, tuple(leaves)),
        "flashcl, torch.compile": lambda: torch.compile(ours, dynamic=False),
        "flashcl, torch.compile, graph": lambda: torch.compile(ours, dynamic=False, mode="reduce-overhead"),
        "dense": lambda: dense,
        "dense, torch.compile": lambda: torch.compile(dense, dynamic=False),
    }


def show(result: float | str) -> str:
    return f"{result:.3f}" if isinstance(result, float) else result


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=at_least_one, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--d", type=at_least_one, default=512)
    parser.add_argument("--backend", choices=dispatch.BACKENDS, default="cuda")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no CUDA GPU: torch {torch.__version__} finds none here")
    device, rows = torch.device("cuda"), []
    for n in args.n:
        draw = functools.partial(torch.randn, n, args.d, device=device)
        leaves = [torch.nn.functional.normalize(draw(), dim=1).bfloat16().requires_grad_() for _ in "xy"]
        leaves.append(torch.tensor(14.0, device=device, requires_grad=True))
        found = {}
        for name, make in losses(args.backend, leaves).items():
            try:
                found[name] = milliseconds(make(), leaves)
            except Exception as error:  # one that does not compile, or cannot be captured, is a result
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(dict(n=n, d=args.d, backend=args.backend, ms=found))
        print(f"{n} x {args.d} ms:", "; ".join(f"{name} {show(ms)}" for name, ms in found.items()), flush=True)
        torch._dynamo.reset()
        if args.out:
            args.out.write_text(json.dumps(dict(environment=environment(device), rows=rows), indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
