"""Worlds of ranks for the tests: processes on this machine, over gloo or NCCL, and all of them seen as one function of all rows."""

import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcl
from flashcl.contract import COLS, ROWS

TIMEOUT = timedelta(seconds=60)


def run_world(world: int, function, *, backend: str = "gloo", survivors: bool = False) -> list:
    """function(rank, world) in `world` processes; what each returns, by way of JSON. survivors: None of a rank that died.

    Over NCCL the current device of a rank is the GPU of that number.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, function, backend, survivors), nprocs=world, join=True)
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        return [None if survivors and not file.exists() else json.loads(file.read_text()) for file in files]


def _rank(rank: int, world: int, folder: str, function, backend: str, survivors: bool) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    result = function(rank, world)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    if survivors:
        os._exit(0)  # no farewell to a rank that is gone
    dist.barrier()
    dist.destroy_process_group()


# ---- the world as one process: a function of all rows, of which each rank computes its share -----------------------------


class Take(torch.autograd.Function):
    """Rows of a tensor that every rank holds; the gradient is averaged over the ranks, as DistributedDataParallel does."""

    @staticmethod
    def forward(ctx, v, index):
        ctx.shape, ctx.index = v.shape, index
        return v[index]

    @staticmethod
    def backward(ctx, upstream):
        whole = upstream.new_zeros(ctx.shape)
        whole[ctx.index] = upstream
        dist.all_reduce(whole)
        return whole / dist.get_world_size(), None


class Replicated(torch.autograd.Function):
    """A parameter that every rank holds."""

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, upstream):
        total = upstream.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


class OfAllRanks(torch.autograd.Function):
    """Values of the rows of this rank, put in their place among those of all; scaled so that Take's average is a sum."""

    @staticmethod
    def forward(ctx, v, index, n):
        ctx.index = index
        whole = v.new_zeros(n)
        whole[index] = v
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.index] * dist.get_world_size(), None, None


class MeanOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        total = v.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def in_the_world(function, counts: list[int], group):
    """A function of all rows that calls `function` on each rank with its rows: counts[r] of them, and its share of the rest."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def call(**arguments):
        matrices = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.dim() == 2]
        n, m = len(matrices[0]), len(matrices[-1])
        start = sum(counts[:rank])
        rows = torch.arange(start, start + counts[rank])
        # Columns without a row of their own, the last m - n, are dealt out to the ranks.
        cols = torch.cat([rows, torch.arange(n, m)[rank::world]])
        local = {}
        for name, v in arguments.items():
            index = rows if name in ROWS else cols if name in COLS else None
            if not isinstance(v, torch.Tensor):
                local[name] = v
            elif index is None:
                local[name] = Replicated.apply(v)
            else:
                local[name] = Take.apply(v, index) if v.is_floating_point() else v[index]
        values = function(**local, group=group)
        if not isinstance(values, tuple) and values.dim() == 0:
            if arguments.get("reduction") == "sum":
                return OfAllRanks.apply(values.reshape(1), torch.tensor([rank]), world).sum()
            return MeanOfRanks.apply(values)
        if "z1" in arguments:
            return OfAllRanks.apply(values, torch.cat([rows, n + rows]), 2 * n)
        if isinstance(values, tuple):
            return tuple(OfAllRanks.apply(v, i, k) for v, i, k in zip(values, (rows, cols), (n, m)))
        return OfAllRanks.apply(values, *((cols, m) if arguments.get("axis") == "cols" else (rows, n)))

    return call


# ---- what the functions of a world have in common ------------------------------------------------------------------------

D = 16
EXACTLY = dict(rtol=0, atol=0)


def counts_of(kind: str, world: int) -> list[int]:
    """Rows of each rank."""
    return {
        "even": [12] * world,
        "uneven": [23, 1, 7, 10][:world],
        "one empty": [0, 11, 13, 9][:world] if world > 1 else [11],
    }[kind]


def world_group(strategy="auto", **options):
    """Chunks of three lines of each rank: several of them, and a ragged last one."""
    return flashcl.Group(dist.group.WORLD, strategy=strategy, chunk_bytes=3 * dist.get_world_size() * D * 4, **options)


def difference(what: str, got: torch.Tensor, want: torch.Tensor, rtol=1e-10, atol=1e-14) -> list[str]:
    """What is wrong with `got`, in one message or none."""
    if got.shape != want.shape:
        return [f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"]
    if torch.allclose(got, want, rtol=rtol, atol=atol):
        return []
    off = torch.where(got == want, 0.0, got - want).abs().max()
    return [f"{what}: off by {off:.3g}, where the largest is {want.abs().max():.3g}"]


def differences(what: str, names: str, got, want, **tolerance) -> list[str]:
    """Of several tensors, and their names."""
    pairs = zip(names.split(), got, want, strict=True)
    return [message for name, a, b in pairs for message in difference(f"{what} {name}", a, b, **tolerance)]


def refused(call, *words) -> list[str]:
    """A call must raise an error with these words."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return [f"{word!r} is not in: {error}" for word in words if word not in str(error)]
    return [f"no error that says {words}"]
