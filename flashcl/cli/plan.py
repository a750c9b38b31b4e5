"""`flashcl plan`: what a step over many GPUs costs, from formulas. All of them stand in this file.

Per rank, with W ranks, n = batch / W rows each (rounded up; NT-Xent: 2 n lines), rows of D numbers of e bytes:

    compute      8 n N D FLOPs (InfoNCE), 6 n N D (SigLIP), half of 8 on the lines of a symmetric matrix
    rows         (W - 1) n D e per walk over the other ranks; by "ring" half of them where the matrix is symmetric, and
                 n D e / 4 more where W is even: two ranks that face each other share their square of logits
    gradients    (W - 1) n D 4 sent home, float32, or half as the rows
    vectors      ids, biases, log-sum-exps and their coefficients: O(N) numbers, by all-gather and all-reduce
    messages     1 KiB from each rank to each rank per operation, in which they agree on what they do

An all-gather sends (W - 1) times what a rank brings, a reduce-scatter (W - 1) times what a rank gets, an all-reduce
2 (W - 1) / W times its size: the volumes of the usual ring algorithms, mean over the ranks. Communication hides behind
the tiles of the walk that it belongs to; what is longer than them is exposed. (Kernels that occupy a whole GPU leave NCCL
less room than that: docs/distributed.md.) Latency, stragglers and the encoders are left out.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from flashcl.backends.tiled import WORKSPACE
from flashcl.cli.arguments import UsageError, at_least_one
from flashcl.cli.bench.results import Results
from flashcl.engine.exchange import choose_strategy
from flashcl.engine.ranks import MESSAGE, Group

# Dense 16-bit matrix rate in FLOP/s and memory in bytes, as the makers publish them. A measured rate is lower:
# --calibrate.
GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 180e9),
}
LOSSES = ("info_nce", "siglip", "nt_xent", "sup_con")
STATISTIC = 4  # bytes of a float32; gradients, log-sum-exps


@dataclass(frozen=True)
class Walk:
    """One walk over the rows of the other ranks: the bytes that this rank sends, and the FLOPs they hide behind."""

    name: str
    flops: float
    rows: float
    gradients: float
    vectors: float

    @property
    def bytes(self) -> float:
        return self.rows + self.gradients + self.vectors


@dataclass(frozen=True)
class Plan:
    loss: str
    batch: int  # pairs, or lines of SupCon, of all ranks
    dim: int
    ranks: int
    itemsize: int = 2
    chunk: int = Group.chunk_bytes
    learnable_scale: bool = True

    @property
    def symmetric(self) -> bool:
        return self.loss in ("nt_xent", "sup_con")

    @property
    def lines(self) -> int:
        """Rows of S that a rank holds: of ranks that differ by one, the larger."""
        return -(-self.batch // self.ranks) * (2 if self.loss == "nt_xent" else 1)

    @property
    def classes(self) -> int:
        return 2 if self.loss == "sup_con" else 1

    # ---- what is computed

    def flops(self, per_logit: int) -> float:
        """per_logit: 2 for each product of the width D that a logit takes part in"""
        return per_logit * self.lines * self.lines * self.ranks * self.dim * (0.5 if self.symmetric else 1.0)

    # ---- what is sent, in bytes

    def all_gather(self, mine: float) -> float:
        return (self.ranks - 1) * mine

    def all_reduce(self, size: float) -> float:
        return 2 * (self.ranks - 1) / self.ranks * size

    def meeting(self) -> float:
        return self.all_gather(MESSAGE)

    def others(self, strategy: str, line_bytes: float, half: bool) -> float:
        """Lines of this rank to those that need them, or gradients home: of half of the pairs of ranks if `half`."""
        if strategy == "gather":
            c = self.chunk_lines()
            return self.all_gather(-(-self.lines // c) * c * line_bytes)  # the last chunk is padded
        senders = self.ranks - 1 if not half else self.ranks // 2 - (0.25 if self.ranks % 2 == 0 else 0.0)
        return senders * self.lines * line_bytes

    def chunk_lines(self) -> int:
        return max(1, min(self.lines, self.chunk // (self.ranks * self.dim * self.itemsize)))

    def rows(self, strategy: str) -> float:
        return self.others(strategy, self.dim * self.itemsize, self.symmetric)

    def home(self, strategy: str) -> float:
        return self.others(strategy, self.dim * STATISTIC, self.symmetric)

    def program_vectors(self, center: bool) -> float:
        """The ids and numbers of labels (int32) and centers that a walk needs of all columns."""
        labels = self.loss == "sup_con"
        return self.all_gather(self.lines * (4 + 4 * labels + STATISTIC * (labels and center)))

    def walks(self, strategy: str) -> list[Walk]:
        total, k = self.lines * self.ranks, self.classes
        mean = self.all_reduce(2 * 8)  # rows and ranks, for the mean of the loss
        if self.loss == "siglip":
            agree = self.meeting()  # on the upstream gradient
            vectors = self.meeting() + self.program_vectors(False) + mean + agree
            return [Walk("forward and backward", self.flops(6), self.rows(strategy), self.home(strategy), vectors)]
        sweep = self.meeting() + self.program_vectors(True) + mean
        sweep += self.all_reduce(k * total * (STATISTIC + 8))  # the largest logit; the sum, in float64
        grad = self.meeting() + self.program_vectors(False)
        grad += self.all_gather(self.lines * 2 * k * STATISTIC)  # weight and top of each column
        if self.learnable_scale:
            grad += self.meeting() + self.all_reduce(2 * 8)  # the sum of the products of the positives, and how many there are
        labels = []
        if self.loss == "sup_con":
            sweep += self.all_reduce(total * 8)  # deviations
            grad += self.all_gather(self.lines * STATISTIC)  # offsets
            whole = self.others(strategy, self.dim * self.itemsize, half=False)
            count = self.meeting() + self.all_gather(self.lines * 8)  # labels, int64: they are numbered
            sums = [self.meeting() + self.all_gather(self.lines * (4 + STATISTIC * p)) for p in (1, 2)]
            # Means of the positives forward, their gradients backward.
            labels = [Walk("label sums", 0.0, 2 * whole, 0.0, count + sum(sums))]
        return [
            *labels,
            Walk("forward", self.flops(2), self.rows(strategy), 0.0, sweep),
            Walk("backward", self.flops(6), self.rows(strategy), self.home(strategy), grad),
        ]

    # ---- what is held, in bytes

    def memory(self, strategy: str) -> float:
        """Both towers, their gradients in float32 and in their dtype, what is on its way, class sums, a workspace, and
        vectors."""
        sides = 1 if self.symmetric else 2
        towers = sides * self.lines * self.dim * (2 * self.itemsize + STATISTIC)
        moving = self.ranks > 1  # a lone rank sends nothing, and its one call of a backend returns the gradients themselves
        in_flight = self.lines if strategy == "ring" else self.ranks * self.chunk_lines()
        on_its_way = 2 * in_flight * self.dim * (self.itemsize + STATISTIC) * moving
        block = 2 * self.lines * self.dim * STATISTIC * moving  # gradients that one call of a backend returns
        vectors = self.lines * self.ranks * (4 + self.classes * 4 * STATISTIC)
        # class sums, in float64 and rounded
        labels = 2 * self.lines * self.dim * (8 + STATISTIC) if self.loss == "sup_con" else 0
        return towers + on_its_way + block + labels + vectors + WORKSPACE

    def largest_batch(self, strategy: str, memory: float) -> int:
        """The largest batch, in whole rows per rank, whose step fits the memory; 0 if none does."""
        low, high = 0, 2**40 // self.ranks
        while high - low > 1:
            middle = (low + high) // 2
            fits = replace(self, batch=middle * self.ranks).memory(strategy) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low * self.ranks


# ---- the command -----------------------------------------------------------------------------------------------------


def add_parser(commands) -> None:
    about = "what a step over many GPUs would cost: time, bytes, memory, the largest batch"
    parser = commands.add_parser("plan", help=about)
    parser.add_argument(
        "--batch", type=count, required=True, metavar="4M", help="pairs of all ranks; K and M are 2^10 and 2^20"
    )
    parser.add_argument("--dim", type=at_least_one, required=True, metavar="1024", help="width of the embeddings")
    parser.add_argument("--gpus", type=at_least_one, required=True, metavar="256", help="ranks")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="published 16-bit peak and memory (default: h200)")
    bandwidth = "bandwidth of a GPU, one way, in Gb/s or GB/s"
    parser.add_argument("--interconnect", type=rate, required=True, metavar="400Gb", help=bandwidth)
    parser.add_argument("--loss", choices=LOSSES, default="info_nce")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    measured = "take the rate from a result of `flashcl bench` on that GPU"
    parser.add_argument("--calibrate", type=Path, metavar="RESULTS.json", help=measured)
    parser.set_defaults(run=run)


def run(args) -> int:
    if args.batch < args.gpus:
        raise UsageError(f"--batch {args.batch} leaves some of {args.gpus} ranks without a pair")
    if args.dtype == "float32" and args.calibrate is None:
        raise UsageError("--dtype float32 needs --calibrate: the published peaks are those of 16-bit products")
    peak, memory = GPUS[args.gpu]
    where = f"the published peak of the {args.gpu.upper()}, so that times are lower bounds (--calibrate: a measured rate)"
    if args.calibrate is not None:
        peak, where = measured_rate(args.calibrate, args.loss, args.dtype, args.dim)
        if other := next((gpu for gpu in GPUS if gpu != args.gpu and gpu.upper() in where.upper()), None):
            raise UsageError(
                f"--calibrate {args.calibrate} was measured on another GPU than --gpu {args.gpu}: take --gpu {other}"
            )
    plan = Plan(args.loss, args.batch, args.dim, args.gpus, itemsize=4 if args.dtype == "float32" else 2)
    each = "each" if args.batch % args.gpus == 0 else "on the largest of them"
    of_a_rank = f"{plan.lines:,} lines {each}, D = {args.dim}, {args.dtype}"
    print(f"{args.loss}, batch {args.batch:,} over {args.gpus} rank{'s' * (args.gpus > 1)}, {of_a_rank}")
    print(f"matrix rate {peak / 1e12:.4g} TFLOP/s: {where}")
    print(f"interconnect {args.interconnect / 1e9:.1f} GB/s per rank, one way, as far as possible while tiles are computed.")
    print("A model, not a measurement.\n")
    header = f"{'strategy':<10}{'walk':<22}{'compute ms':>12}{'sent MB':>12}{'comm ms':>10}{'exposed ms':>12}"
    print(header)
    line_bytes = args.dim * plan.itemsize
    auto = choose_strategy("auto", plan.lines * args.gpus, line_bytes, plan.chunk)
    for strategy in ("gather", "ring") if args.gpus > 1 else ("alone",):
        total = 0.0
        for walk in plan.walks(strategy):
            compute, communication = walk.flops / peak, walk.bytes / args.interconnect
            total += max(compute, communication)
            print(
                f"{strategy:<10}{walk.name:<22}{1e3 * compute:>12.2f}{walk.bytes / 1e6:>12.1f}"
                f"{1e3 * communication:>10.2f}{1e3 * max(0.0, communication - compute):>12.2f}"
            )
        held, largest = plan.memory(strategy), plan.largest_batch(strategy, memory)
        print(
            f"{'':<10}step {1e3 * total:.1f} ms; memory of the loss and its inputs {held / 1e9:.2f} of {memory / 1e9:.0f} GB; "
            f"largest batch that fits {largest:,}{'; auto takes this strategy' if strategy == auto else ''}\n"
        )
    return 0


def measured_rate(path: Path, loss: str, dtype: str, dim: int) -> tuple[float, str]:
    """The useful FLOP/s of the fastest flashcl row of a result file for this loss and dtype, of the nearest width; and
    where from."""
    found = Results.load(path)
    asked = loss, dtype, "full"
    ours = [row for row in found.rows if row.provider.startswith("flashcl") and row.tflops]
    rows = [row for row in ours if (row.loss, row.dtype, row.mode) == asked]
    if not rows:
        raise UsageError(f"{path} has no measured flashcl row for {loss} in {dtype}, forward and backward")
    row = min(rows, key=lambda row: (abs(row.d - dim), -row.tflops))
    device = found.environment.get("device")
    return row.tflops * 1e12, f"measured, {row.provider} at N = {row.n:,}, D = {row.d} on {device}"


def count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a number like 4096, 64k or 4M, got {text!r}")
    return int(float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()])


def rate(text: str) -> float:
    """Bytes per second of "400Gb" (bits) or "50GB" (bytes), each per second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(Gb|GB)(?:/s)?", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected bits or bytes per second like 400Gb or 50GB, got {text!r}")
    return float(match[1]) * 1e9 / (8 if match[2] == "Gb" else 1)
