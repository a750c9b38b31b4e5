"""InfoNCE of a million rows in one step on one GPU: time, memory, and whether the numbers are right.

    python bench/million.py                          1,048,576 x 512, bfloat16
    python bench/million.py --n 131072 --d 1024      other sizes

One step warms up at a small size, one is timed: at this size everything that varies from step to step is lost in it. Losses
and gradients of sampled rows are compared with float64, over all columns; the log-sum-exps of all columns, which a gradient
needs, are those of a second sweep, of which the samples are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

import flashcl
from flashcl.cli.arguments import at_least_one
from flashcl.cli.bench.machine import Clock, Products, environment
from flashcl.cli.bench.suites import Workload
from flashcl.engine import dispatch

SAMPLED = 64
IN_A_ROW = 1600  # products at the chunk shapes: about two seconds of an H200


def step(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Losses of all rows, and the gradients of their mean."""
    loss = flashcl.info_nce(x, y, logit_scale=scale, reduction="none", backend=backend)
    return loss.detach(), list(torch.autograd.grad(loss.mean(), (x, y, scale)))


def errors(x: Tensor, y: Tensor, scale: Tensor, backend: str, loss: Tensor, dx: Tensor) -> dict[str, float]:
    """The largest of the sampled rows: absolute, in nats, of log-sum-exps and losses; relative of gradients."""
    with torch.no_grad():
        row_lse, col_lse = flashcl.similarity_logsumexp(x, y, logit_scale=scale, backend=backend)
    N, i = len(x), torch.linspace(0, len(x) - 1, SAMPLED, dtype=torch.float64, device=x.device).long()

    def logits(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([scale.double() * a.double() @ part.double().T for part in b.split(2**16)], 1)

    with torch.no_grad():
        s, t = logits(x[i], y), logits(y[i], x)  # (SAMPLED, N) each: rows, and columns
        rows, cols = s.logsumexp(1), t.logsumexp(1)
        g = (s - rows[:, None]).exp_() + (s - col_lse.double()).exp_()
        g[torch.arange(SAMPLED), i] -= 2
        want = torch.zeros(SAMPLED, x.shape[1], dtype=torch.float64, device=x.device)
        for part, of_part in zip(y.split(2**16), g.split(2**16, 1)):
            want += scale.double() * of_part @ part.double() / (2 * N)
        own = scale.double() * (x[i].double() * y[i].double()).sum(1)
    lse = torch.cat([row_lse[i] - rows, col_lse[i] - cols]).abs().max()
    return dict(
        lse=lse.item(),
        loss=(loss[i] - ((rows + cols) / 2 - own)).abs().max().item(),
        gradient=((dx[i].double() - want).norm(dim=1) / want.norm(dim=1)).max().item(),
    )


def matrix_tflops(work: Workload, device: torch.device, repeats: int) -> float:
    """The rate of the library at the chunk shapes, the median of so many products in a row: after seconds of work power and
    heat bound it, too."""
    clock = Clock(device)
    products = Products(work, clock, device)
    marks = [products()["products"] for _ in range(1 + repeats)]
    clock.wait()
    return products.flops / statistics.median(clock.between(*pair) for pair in marks[1:]) / 1e9


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=at_least_one, default=2**20)
    parser.add_argument("--d", type=at_least_one, default=512)
    parser.add_argument("--backend", choices=dispatch.BACKENDS, default="cuda")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no CUDA GPU: torch {torch.__version__} finds none here")
    device, work = torch.device("cuda"), Workload("info_nce", args.n, args.d, "bfloat16")
    x, y, scale = (v.requires_grad_() for v in work.inputs(device).tensors.values())
    step(x[:4096], y[:4096], scale, args.backend)
    rate = matrix_tflops(work, device, 3)
    clock = Clock(device)
    del clock.filler  # what empties the caches: it would count as memory of the step
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = clock.mark()
    loss, (dx, *_) = step(x, y, scale, args.backend)
    end = clock.mark()
    clock.wait()
    seconds = clock.between(start, end) / 1e3
    found = dict(n=args.n, d=args.d, backend=args.backend, seconds=seconds, tflops=work.flops("full") / seconds / 1e12)
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # inputs, gradients and all
    found |= dict(matrix_tflops=rate, times_floor=rate / found["tflops"])
    rate = matrix_tflops(work, device, IN_A_ROW)  # at once: as hot as the step has left the GPU
    found |= dict(lasting_matrix_tflops=rate, times_lasting_floor=rate / found["tflops"])
    found |= errors(x, y, scale, args.backend, loss, dx)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps(dict(environment=environment(device), rows=[found]), indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
