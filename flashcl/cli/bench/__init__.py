"""`flashcl bench`: every loss beside the other implementations that are installed, in one run on one machine."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from dataclasses import astuple
from pathlib import Path

import torch

from flashcl.cli.arguments import UsageError, at_least_one, choose_device, positive
from flashcl.cli.bench import machine, measure, results
from flashcl.cli.bench.providers import PROVIDERS
from flashcl.cli.bench.results import Results
from flashcl.cli.bench.suites import LOSSES, MODES, SUITES, Workload, grid, part

DTYPES = ("float64", "float32", "float16", "bfloat16")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time, memory and correctness of every loss beside the other implementations that are installed",
        description="Measures losses x N x D x dtype, forward, backward and both, for every provider installed here. "
        "Each must first be right against float64. Results are printed as they come; --out keeps them, also on Ctrl-C.",
    )
    parser.add_argument("--suite", choices=SUITES, help="which workloads (default: quick)")
    own = parser.add_argument_group("workloads of your own, in place of --suite; commas separate")
    own.add_argument("--loss", type=_names(LOSSES), help=f"{', '.join(LOSSES)} (default: info_nce)")
    own.add_argument("--n", type=_sizes, help="rows of the logits; a:b doubles from a to b (default: 4096)")
    own.add_argument("--d", type=_sizes, help="width of the embeddings (default: 512)")
    own.add_argument("--dtype", type=_names(DTYPES), help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--mode", type=_names(MODES), default=MODES, help=f"{', '.join(MODES)} (default: all)")
    parser.add_argument(
        "--provider", type=_names(PROVIDERS), default=tuple(PROVIDERS), help=f"{', '.join(PROVIDERS)} (default: all)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--seconds", type=positive, default=1.0, help="to time each provider at each workload (default: 1)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="results as JSON, and as CSV beside it")
    parser.add_argument("--resume", action="store_true", help="keep what --out has, and measure only what is missing")
    old = "begin anew where --out has results; with --resume: where they are of another machine, commit or version"
    parser.add_argument("--overwrite", action="store_true", help=old)
    parser.add_argument(
        "--part", type=_share, default=(1, 1), metavar="K/N", help="the K-th of N shares of the workloads"
    )
    parser.add_argument("--time-limit", type=positive, metavar="S", help="begin no workload after S seconds")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since then")
    parser.add_argument("--fail-if-regression", action="store_true", help="exit code 1 if --compare finds one")
    parser.set_defaults(run=run)


def _names(known):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    sizes = []
    for item in text.split(","):
        first, _, last = item.partition(":")
        n, last = at_least_one(first), at_least_one(last or first)
        if last < n:
            raise argparse.ArgumentTypeError(f"expected a:b with a <= b, got {item}")
        while n <= last:
            sizes.append(n)
            n *= 2
    return tuple(sizes)


def _share(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, got {text!r}")
    return int(k), int(n)


def run(args) -> int:
    for option, needs in (("fail_if_regression", "compare"), ("resume", "out"), ("overwrite", "out")):
        if getattr(args, option) and not getattr(args, needs):
            raise UsageError(f"--{option.replace('_', '-')} needs --{needs}")
    device, jobs = choose_device(args.device), workloads(args)
    if args.out and (args.out.suffix != ".json" or args.out.is_dir()):
        raise UsageError(f"--out must be a file named *.json (*.csv is written beside it), got {args.out}")
    if args.compare and not args.compare.is_file():
        raise UsageError(f"--compare {args.compare}: no such file")
    old = Results.load(args.compare) if args.compare else None
    found = _begin(args, device)
    if old:
        results.must_be_of_one_device(found, old)  # before it takes hours
    for dtype in dict.fromkeys(work.dtype for work in jobs):
        print(f"{dtype} counts as right up to a relative L2 error of {measure.allowed(dtype)}")
    code = _measure_all(args, jobs, device, found)
    for line in results.skipped(found.rows):
        print(f"skipped: {line}")
    if found.rows and all(row.status == "skipped" for row in found.rows):
        raise UsageError("nothing was measured: no provider is here")
    return code or (_compare(found, old, args.fail_if_regression) if old else 0)


def workloads(args) -> list[Workload]:
    if not (args.loss or args.n or args.d or args.dtype):
        return part(SUITES[args.suite or "quick"], *args.part)
    if args.suite:
        raise UsageError("--suite has workloads of its own: leave it out, or --loss, --n, --d and --dtype")
    sizes = args.loss or LOSSES[:1], args.n or (4096,), args.d or (512,), args.dtype or ("float32",)
    return part(grid(*sizes), *args.part)


def _begin(args, device: torch.device) -> Results:
    """New results, or with --resume those of the same machine, commit and versions. None are lost without --overwrite."""
    found = Results(machine.environment(device))
    if args.out and args.out.exists() and not (args.overwrite and not args.resume):
        before = Results.load(args.out)
        same = all(before.environment.get(k) == v for k, v in found.environment.items() if k not in machine.OF_ONE_RUN)
        if args.resume and same:
            found.rows = before.rows
        elif not args.overwrite:
            why = "has results of another machine, commit or version" if args.resume else "exists, and --resume would keep it"
            raise UsageError(f"{args.out} {why}: --overwrite replaces it")
    print(*(f"{k}: {v}" for k, v in found.environment.items() if v != "none"), sep="\n")
    load = found.environment["load_before"]
    if device.type == "cpu" and load != "none" and load > os.cpu_count() / 4:
        print("other programs use the cores: these times will say little", file=sys.stderr)
    bandwidth = machine.copy_bandwidth(machine.Clock(device), device)
    found.environment["copy_gb_per_s"] = bandwidth / 1e9
    print(f"copy bandwidth: {bandwidth / 1e9:,.4g} GB/s, read and written")
    print("useful: FLOPs that the loss takes without an N x M matrix; matrix rate: of this machine's GEMMs, in the same rounds;")
    print("x floor: the time, divided by what the useful FLOPs would take at that rate; extra memory: peak, less the inputs")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found.save(args.out)
    return found


def _measure_all(args, asked: list[Workload], device: torch.device, found: Results) -> int:
    """Measures, prints and saves one workload after the other; the exit code."""
    warnings.filterwarnings("ignore", module="torch")  # what torch.compile says of itself
    jobs = [(work, names) for work in asked if (names := _missing(args, work, found))]
    started = time.monotonic()
    for k, (work, names) in enumerate(jobs):
        if args.time_limit and time.monotonic() - started > args.time_limit:
            print(f"time limit: {len(jobs) - k} workloads are left for --resume", file=sys.stderr)
            return 3
        report, lost = Progress(f"[{k + 1}/{len(jobs)}] {work}"), None
        try:
            rows = measure.measure(work, names, device, args.mode, args.seconds, report)
        except measure.DeviceLost as error:
            rows, lost = error.rows, error
        except KeyboardInterrupt:
            kept = f"; {args.out} has {k} of {len(jobs)} workloads" if args.out else ""
            print(f"\ninterrupted{kept}", file=sys.stderr)
            return 130
        report.end()
        found.add(rows)
        if args.out:
            found.save(args.out)
        print(f"\n{results.show(rows)}", flush=True)
        if lost:
            print(f"{lost}: go on with --resume", file=sys.stderr)
            return 3
    return 0


def _missing(args, work: Workload, found: Results) -> list[str]:
    """The providers that were asked for and have no result at a workload in one of the modes."""
    done = {row.key for row in found.rows}
    return [name for name in args.provider if not {(*astuple(work), mode, name) for mode in args.mode} <= done]


def _compare(new: Results, old: Results, strict: bool) -> int:
    changes = results.compare(new, old)
    print(f"\nsince {old.environment['commit']}, {old.environment['date']}:")
    print(*(change.text for change in changes), sep="\n")
    regressions = sum(change.regression for change in changes)
    print(f"{regressions} regressions in {len(changes)} measurements")
    return 1 if strict and regressions else 0


class Progress:
    """What is being done now, on stderr: on a terminal in one line, else one line for each workload."""

    def __init__(self, title: str):
        self.title, self.terminal = title, sys.stderr.isatty()
        if not self.terminal:
            print(title, file=sys.stderr, flush=True)

    def __call__(self, doing: str) -> None:
        if self.terminal:
            print(f"\r\033[K{self.title}: {doing}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
