"""CPU benchmark: each loss beside its dense formula, forward and backward, in one run on one machine.

    python bench/cpu.py                      the whole table (about 15 minutes on 2 cores)
    python bench/cpu.py --sizes 2048 4096    other sizes
    python bench/cpu.py --million            N = 131,072 at D = 256 in a process of its own, and the memory of that process

Each measurement is a fresh process, so that its peak memory is its own; the two providers take turns, round after round, so
that what else a machine does falls on both. Time is the median over the rounds of the steps after the first, with the fastest
step beside it; memory the growth of the peak resident set over the process with inputs and their gradients in place.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# The ratio of times to reach, by loss and rows; elsewhere it is to stay below NEVER_ABOVE.
TARGETS = {
    ("info_nce", 2048): 0.85,
    ("info_nce", 16_384): 0.4,
    ("siglip", 16_384): 0.45,
    ("nt_xent", 16_384): 0.35,
}
NEVER_ABOVE = 1.1
LOSSES = ("info_nce", "siglip", "nt_xent", "sup_con")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_step(provider: str, loss: str, rows: int, d: int, dtype: str):
    """A function of no arguments that runs the loss forward and backward; rows counts the rows of S."""
    import torch

    import flashcl
    from flashcl import reference

    module = {"flashcl": flashcl, "dense": reference}[provider]
    generator = torch.Generator().manual_seed(0)

    def embeddings(n):
        z = torch.randn(n, d, generator=generator)
        z.div_(z.norm(dim=1, keepdim=True))
        z = z.to(getattr(torch, dtype)).requires_grad_()
        z.grad = torch.zeros_like(z)  # in place before the memory is read, as in a training loop
        return z

    scale, bias = torch.tensor(1 / 0.07, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    if loss == "sup_con":
        z, labels = embeddings(rows), torch.randint(max(2, rows // 8), (rows,), generator=generator)
        return lambda: module.sup_con(z, labels, temperature=1 / scale).backward()
    x, y = (embeddings(rows // 2 if loss == "nt_xent" else rows) for _ in range(2))
    return {
        "info_nce": lambda: module.info_nce(x, y, logit_scale=scale).backward(),
        "siglip": lambda: module.siglip(x, y, logit_scale=scale, logit_bias=bias).backward(),
        "nt_xent": lambda: module.nt_xent(x, y, temperature=1 / scale).backward(),
    }[loss]


def measure(provider: str, loss: str, rows: int, d: int, dtype: str, steps: int) -> dict:
    step = make_step(provider, loss, rows, d, dtype)
    before, times = peak_bytes(), []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    # The first step pays for page faults and thread pools, for either provider.
    return dict(seconds=times[1:] or times, extra=peak_bytes() - before, process=peak_bytes())


def in_fresh_process(*job) -> dict:
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(loss: str, rows: int, d: int, dtype: str, rounds: int) -> dict:
    steps = 2 if rows > 8192 else 10
    runs = {"dense": [], "flashcl": []}
    for _ in range(rounds):
        for provider, results in runs.items():
            results.append(in_fresh_process(provider, loss, rows, d, dtype, steps))
    row = dict(loss=loss, rows=rows, d=d, dtype=dtype)
    for provider, results in runs.items():
        seconds = [s for r in results for s in r["seconds"]]
        row |= {f"{provider}_s": statistics.median(seconds), f"{provider}_fastest_s": min(seconds)}
        row[f"{provider}_extra_mb"] = statistics.median(r["extra"] for r in results) / 2**20
    row["time_ratio"] = row["flashcl_s"] / row["dense_s"]
    row["fastest_ratio"] = row["flashcl_fastest_s"] / row["dense_fastest_s"]
    row["target"] = TARGETS.get((loss, rows), NEVER_ABOVE)
    row["memory_ratio"] = row["flashcl_extra_mb"] / row["dense_extra_mb"]
    return row


def environment() -> dict:
    import torch

    import flashcl
    from flashcl.cli.info import describe

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return dict(
        machine=describe(torch.device("cpu")),
        python=platform.python_version(),
        torch=torch.__version__,
        flashcl=flashcl.__version__,
        commit=commit.stdout.strip(),
        load_before=os.getloadavg()[0],
        command=" ".join(["python", *sys.argv]),
        date=time.strftime("%Y-%m-%d"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048, 4096, 16384], help="rows of S")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--rounds", type=int, default=3, help="processes per provider")
    parser.add_argument("--million", action="store_true", help="131,072 rows of width 256, flashcl alone")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(*json.loads(args.job))))
        return
    results = dict(environment=environment(), rows=[])
    print(*(f"{k}: {v}" for k, v in results["environment"].items()), sep="\n", end="\n\n")
    if args.million:
        r = in_fresh_process("flashcl", "info_nce", 131_072, 256, args.dtype, 1)
        results["rows"].append(r | dict(loss="info_nce", rows=131_072, d=256))
        print(f"info_nce, 131,072 rows, D = 256: {r['seconds'][0]:.0f} s, the whole process {r['process'] / 1e9:.2f} GB")
    else:
        print(f"{'loss':<10}{'rows':>7}{'D':>6}{'dense s':>10}{'flashcl s':>11}{'ratio':>8}{'fastest':>9}{'target':>8}{'dense MB':>10}{'flashcl MB':>12}{'ratio':>8}")
        for rows in args.sizes:
            for loss in args.losses:
                r = compare(loss, rows, args.dim, args.dtype, args.rounds)
                results["rows"].append(r)
                print(
                    f"{loss:<10}{rows:>7}{args.dim:>6}{r['dense_s']:>10.3f}{r['flashcl_s']:>11.3f}{r['time_ratio']:>8.3f}{r['fastest_ratio']:>9.3f}{r['target']:>8.2f}"
                    f"{r['dense_extra_mb']:>10.0f}{r['flashcl_extra_mb']:>12.0f}{r['memory_ratio']:>8.3f}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
