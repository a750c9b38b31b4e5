"""`flashcl demo`: train a code search model on this machine's Python functions, with both losses."""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import flashcl
from flashcl.cli import corpus, memory, report, search
from flashcl.cli.encoder import DIM, Bags, Encoder
from flashcl.cli.info import default_device, describe
from flashcl.cli.memory import Measured
from flashcl.cli.report import Run

LEARNING_RATE = 0.03
LARGE_BATCH = {"cpu": 16_384, "cuda": 32_768}
HELD_OUT = 2_000
MIN_PAIRS = 100


@dataclass
class Data:
    """The features of all pairs, and which rows are for training and which are held out."""

    text: Bags
    code: Bags
    train: Tensor  # (T,) int64, on the CPU
    test: Tensor  # (H,) int64

    def to(self, device: torch.device) -> Data:
        return Data(self.text.to(device), self.code.to(device), self.train, self.test)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a code search model on this machine's Python functions: dense PyTorch and flashcl side by side",
        description="Trains a small two-tower model on the (docstring, code) pairs of the Python functions installed "
        "here: with dense PyTorch, with flashcl at the same batch and with flashcl at a much larger one. "
        "Then --search asks the trained model.",
    )
    parser.add_argument("--search", metavar="QUERY", help="ask the trained model for functions instead of training one")
    parser.add_argument("--batch", type=_positive_int, default=1024, help="batch of dense and flashcl (default: 1024)")
    parser.add_argument("--large-batch", type=_positive_int, help="of flashcl alone (default: 16384, on a GPU 32768)")
    parser.add_argument("--steps", type=_positive_int, default=150, help="optimizer steps of each run (default: 150)")
    parser.add_argument(
        "--seconds", type=_positive, default=40, help="the large-batch run ends after so many (default: 40)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--code", type=Path, metavar="DIR", help="learn the Python files under DIR instead")
    parser.add_argument("--out", type=Path, default=Path("flashcl-demo"), help="for all files (default: flashcl-demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def _positive_int(text: str) -> int:
    return int(_positive(text, int))


def _positive(text: str, kind: type = float) -> float:
    if (value := kind(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def run(args) -> int:
    if args.search is not None:
        return search.search(args.search, args.out / "encoder.pt")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA GPU here")
        return 1
    device = default_device() if args.device == "auto" else torch.device(args.device)
    threads = torch.get_num_threads()
    print(machine(device))
    args.out.mkdir(parents=True, exist_ok=True)

    pairs = load_pairs(args)
    if len(pairs) < MIN_PAIRS:
        print(f"{len(pairs)} pairs are too few to learn from: at least {MIN_PAIRS} are needed")
        return 1
    with report.progress("counting words"):
        data = prepare(pairs, args.seed)
    batch, large = batch_sizes(args, len(data.train), device)
    choose_threads(device, threads)
    measured = measure_memory(device, batch, large)

    choose_threads(device, threads)
    untrained = recall(initial_encoder(data, args.seed).to(device), data.to(device))
    runs = list(train_all(args, data, device, batch, large, measured))
    best = max((run for run in runs if run.loss == "flashcl"), key=lambda run: run.recall10)
    search.save(best.encoder, data.code, pairs, args.out / "encoder.pt")
    print("\n" + report.summary(runs, untrained, measured, len(data.test), device))
    draw(runs, measured, args.out / "demo.png", device)
    print(f"encoder of the run with batch {best.batch:,}: {args.out / 'encoder.pt'}. Ask it:")
    print('    flashcl demo --search "parse a date from a string"')
    return 0


def machine(device: torch.device) -> str:
    return f"flashcl {flashcl.__version__}, torch {torch.__version__}, {describe(device)}"


def choose_threads(device: torch.device, every: int) -> None:
    """As many threads as make the loss fastest now: `every`, or on a busy machine fewer.

    Threads that must share a core make every parallel operation wait for the one that is not running: up to ten times
    slower than a single thread.
    """
    if device.type != "cpu":
        return
    x = F.normalize(torch.randn(1024, DIM, generator=torch.Generator().manual_seed(0)))

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(5):
            flashcl.info_nce(x, x, temperature=0.07)
        return time.perf_counter() - start

    seconds(every)  # the first calls load and start things
    best = min((every >> k for k in range(every.bit_length())), key=seconds)
    torch.set_num_threads(best)
    if best < every:
        print(f"going on with {best} of {every} threads: more are slower now, other programs use the cores")


# ---- data ------------------------------------------------------------------------------------------------------------


def load_pairs(args) -> list[corpus.Pair]:
    if args.code is None:
        found = corpus.load(args.out / "corpus.json", track=report.track)
    else:  # a folder that somebody works in: never from a cache
        found = corpus.parse(corpus.find_sources([args.code.resolve()]), report.track)
    print(found.describe())
    return found.pairs


def prepare(pairs: list[corpus.Pair], seed: int) -> Data:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    held_out = min(HELD_OUT, len(pairs) // 5)
    text, code = Bags.of(pair.text for pair in pairs), Bags.of(pair.code for pair in pairs)
    return Data(text, code, order[held_out:], order[:held_out])


def batch_sizes(args, count: int, device: torch.device) -> tuple[int, int]:
    """The batch of both losses and the large one, neither beyond the training pairs."""
    large = args.large_batch or LARGE_BATCH[device.type]
    if large > count:
        large = count // 1024 * 1024 or count
    return min(args.batch, count), large


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches for ever. An epoch's remainder is left out: over its end a batch would hold pairs twice."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        yield from (b for b in shuffled.split(size) if len(b) == size)


# ---- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(device: torch.device, batch: int, large: int) -> list[Measured]:
    """Both losses from the small batch, four times that, and so on, to the large one and twice that."""
    if not memory.measurable(device):
        print("memory of the loss: not measured, it needs a CUDA GPU or Linux")
        return []
    between = [batch * 4**k for k in range(1, 16) if batch * 4**k <= large / 2]
    sizes = sorted({batch, *between, large, 2 * large})
    total = len(sizes) * len(memory.LOSSES)
    return list(report.track(memory.measure_all(device, sizes, DIM), total, "measuring the memory of the loss"))


# ---- training --------------------------------------------------------------------------------------------------------


def train_all(args, data: Data, device, batch: int, large: int, measured: list[Measured]) -> Iterator[Run]:
    """dense and flashcl with the same seed and the same batches in the same order, then flashcl at the large batch."""
    dense = memory.find(measured, "dense", batch)
    if dense is None or dense.peak is not None:
        yield train("dense", data, device, batch, args.steps, math.inf, args.seed)
    yield train("flashcl", data, device, batch, args.steps, math.inf, args.seed)
    if large > batch:
        yield train("flashcl", data, device, large, args.steps, args.seconds, args.seed)


def initial_encoder(data: Data, seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder()
    encoder.text_idf.copy_(data.text.take(data.train).inverse_document_frequency())
    encoder.code_idf.copy_(data.code.take(data.train).inverse_document_frequency())
    return encoder


def train(loss: str, data: Data, device: torch.device, batch: int, steps: int, seconds: float, seed: int) -> Run:
    """Train a new encoder until `steps` or `seconds` are over; the learning rate falls along a cosine until then."""
    encoder = initial_encoder(data, seed).to(device)
    data = data.to(device)
    text, code = data.text.weighted(encoder.text_idf), data.code.weighted(encoder.code_idf)
    optimizer = torch.optim.Adam(encoder.parameters(), betas=(0.9, 0.98), fused=True)
    torch.manual_seed(seed)  # which features are dropped, the same in every run
    losses, times = [], []
    with report.progress(f"training: {loss}, batch {batch:,}") as update:
        start = time.perf_counter()
        for rows in batches(data.train, batch, seed):
            begin = time.perf_counter()
            done = max(len(losses) / steps, (begin - start) / seconds)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2
            losses.append(train_step(encoder, optimizer, loss, text, code, rows.to(device)))
            times.append(time.perf_counter() - begin)
            update(done, f"loss {losses[-1]:.3f}")
    recall1, recall10 = recall(encoder, data)
    return Run(loss, batch, losses, statistics.median(times), recall1, recall10, encoder)


def train_step(encoder: Encoder, optimizer, loss: str, text: Bags, code: Bags, rows: Tensor) -> float:
    x, y = encoder.encode_text(text.take(rows)), encoder.encode_code(code.take(rows))
    value = memory.LOSSES[loss](x, y, logit_scale=encoder.logit_scale)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    encoder.clamp_logit_scale()
    return value.item()


@torch.no_grad()
def recall(encoder: Encoder, data: Data) -> tuple[float, float]:
    """How often the code of a held-out text comes first, and among the first ten, of all held-out codes."""
    encoder.eval()
    rows = data.test.to(encoder.table.weight.device)
    x = encoder.encode_text(data.text.take(rows).weighted(encoder.text_idf))
    y = encoder.encode_code(data.code.take(rows).weighted(encoder.code_idf))
    encoder.train()
    s = x @ y.T
    better = (s > s.diagonal()[:, None]).sum(1)
    return (better < 1).double().mean().item(), (better < 10).double().mean().item()


# ---- results ---------------------------------------------------------------------------------------------------------


def draw(runs: list[Run], measured: list[Measured], path: Path, device: torch.device) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print('plot skipped: matplotlib is not installed; pip install "flashcl[demo]" brings it')
        return
    report.plot(runs, measured, path, f"measured on {machine(device)}; memory: {memory.METHOD[device.type]}")
    print(f"plot: {path}")
