"""`flashcl demo`: train a code search model on this machine's Python functions, with both losses."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import flashcl
from flashcl.cli import memory
from flashcl.cli.arguments import UsageError, at_least_one, choose_device, positive
from flashcl.cli.demo import corpus, report, search, training
from flashcl.cli.demo.encoder import DIM
from flashcl.cli.demo.training import Data, Run
from flashcl.cli.memory import Measured
from flashcl.cli.text import describe

LARGE_BATCH = {"cpu": 16_384, "cuda": 32_768}
MIN_PAIRS = 100
OUT = Path("flashcl-demo")
THREADS = torch.get_num_threads()  # before choose_threads takes fewer


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a code search model on this machine's Python functions: dense PyTorch and flashcl side by side",
        description="Trains a small two-tower model on the (docstring, code) pairs of the Python functions installed "
        "here: with dense PyTorch, with flashcl at the same batch and with flashcl at a much larger one. "
        "Then --search asks the trained model.",
    )
    parser.add_argument("--search", metavar="QUERY", help="ask the trained model for functions instead of training one")
    parser.add_argument("--batch", type=at_least_one, default=1024, help="batch of dense and flashcl (default: 1024)")
    parser.add_argument("--large-batch", type=at_least_one, help="of flashcl alone (default: 16384, on a GPU 32768)")
    parser.add_argument("--steps", type=at_least_one, default=150, help="optimizer steps of each run (default: 150)")
    parser.add_argument(
        "--seconds", type=positive, default=40, help="the large-batch run ends after so many (default: 40)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--code", type=Path, metavar="DIR", help="learn the Python files under DIR instead")
    parser.add_argument("--out", type=Path, default=OUT, help=f"for all files (default: {OUT})")
    parser.add_argument("--seed", type=int, default=0, help="of the encoder, and of the order of the pairs (default: 0)")
    parser.set_defaults(run=run)


def run(args) -> int:
    if args.search is not None:
        search.search(args.search, args.out / "encoder.pt")
        return 0
    if args.code is not None and not args.code.is_dir():
        raise UsageError(f"--code {args.code}: no such folder")
    device = choose_device(args.device)
    print(machine(device))
    args.out.mkdir(parents=True, exist_ok=True)

    pairs = load_pairs(args)
    if len(pairs) < MIN_PAIRS:
        raise UsageError(f"{len(pairs)} pairs are too few to learn from: at least {MIN_PAIRS} are needed")
    with report.progress("counting words"):
        data = training.prepare(pairs, args.seed)
    batch, large = batch_sizes(args, len(data.train), device)
    measured = measure_memory(device, batch, large)
    untrained = training.recall(training.initial_encoder(data, args.seed), data)
    runs = train_all(args, data, device, batch, large, measured)
    best = max((run for run in runs if run.loss == "flashcl"), key=lambda run: run.recall10)
    search.save(best.encoder, data.code, pairs, args.out / "encoder.pt")
    print("\n" + report.summary(runs, untrained, measured, len(data.test), device))
    draw(runs, measured, args.out / "demo.png", device)
    print(f"encoder of the run with batch {best.batch:,}: {args.out / 'encoder.pt'}. Ask it:")
    elsewhere = "" if args.out == OUT else f" --out {shlex.quote(str(args.out))}"
    print(f'    flashcl demo{elsewhere} --search "parse a date from a string"')
    return 0


def machine(device: torch.device) -> str:
    return f"flashcl {flashcl.__version__}, torch {torch.__version__}, {describe(device)}"


def choose_threads(device: torch.device) -> None:
    """As many threads as make the loss fastest now: all of them, or on a busy machine fewer.

    Threads that must share a core make every parallel operation wait for the one that is not running: up to ten times
    slower than a single thread. They take turns here, so that a moment of peace does not decide.
    """
    if device.type != "cpu":
        return
    x = F.normalize(torch.randn(1024, DIM, generator=torch.Generator().manual_seed(0)))
    before = torch.get_num_threads()
    seconds = {THREADS >> k: 0.0 for k in range(THREADS.bit_length())}
    for trial in range(11):
        for threads in seconds:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            flashcl.info_nce(x, x, temperature=0.07)
            if trial:  # the first calls load and start things
                seconds[threads] += time.perf_counter() - start
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    if best != before:
        print(f"threads: {best} of {THREADS}, the fastest now (fewer where other programs use the cores)")


# ---- data ------------------------------------------------------------------------------------------------------------


def load_pairs(args) -> list[corpus.Pair]:
    if args.code is None:
        found = corpus.load(args.out / "corpus.json", track=report.track)
    else:  # a folder that somebody works in: never from a cache
        found = corpus.parse(corpus.find_sources([args.code.resolve()]), report.track)
    print(found.describe())
    return found.pairs


def batch_sizes(args, count: int, device: torch.device) -> tuple[int, int]:
    """The batch of both losses and the large one, neither beyond the training pairs."""
    large = args.large_batch or LARGE_BATCH[device.type]
    if large > count:
        large = count // 1024 * 1024 or count
    return min(args.batch, count), large


# ---- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(device: torch.device, batch: int, large: int) -> list[Measured]:
    """Both losses at the small batch, four times that, and so on, to the large one and twice that."""
    if not memory.measurable(device):
        print("memory of the loss: not measured, it needs a CUDA GPU or Linux")
        return []
    choose_threads(device)
    between = [batch * 4**k for k in range(1, 16) if batch * 4**k <= large / 2]
    sizes = sorted({batch, *between, large, 2 * large})
    total = len(sizes) * len(memory.LOSSES)
    return list(report.track(memory.measure_all(device, sizes, DIM), total, "measuring the memory of the loss"))


# ---- training --------------------------------------------------------------------------------------------------------


def train_all(args, data: Data, device, batch: int, large: int, measured: list[Measured]) -> list[Run]:
    """dense and flashcl on the same batches, then flashcl at the large batch."""
    choose_threads(device)
    dense = memory.find(measured, "dense", batch)
    fits = dense is None or dense.peak is not None
    same = ["dense", "flashcl"] if fits else ["flashcl"]
    runs = training.train(same, data, device, batch, steps=args.steps, seed=args.seed)
    if large > batch:
        choose_threads(device)
        limits = {"steps": args.steps, "seconds": args.seconds}
        runs += training.train(["flashcl"], data, device, large, **limits, seed=args.seed)
    return runs


# ---- results ---------------------------------------------------------------------------------------------------------


def draw(runs: list[Run], measured: list[Measured], path: Path, device: torch.device) -> None:
    try:
        report.plot(runs, measured, path, f"measured on {machine(device)}; memory: {memory.METHOD[device.type]}")
    except ImportError as error:
        print(f'plot skipped, it needs matplotlib ({error}); pip install ".[demo]" brings it')
    else:
        print(f"plot: {path}")
