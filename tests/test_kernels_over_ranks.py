"""Kernels on blocks of other ranks' rows: on this machine's CPU, and on one GPU that all ranks share. Over NCCL: test_nccl.py."""

import functools
import importlib.util
from dataclasses import dataclass

import pytest
import torch
from calls import BF16, SINGLE
from conftest import INTERPRETED
from torch import Tensor
from world import counts_of, run_world
from world_contract import holds, on_gpus, wrong

from flashcl.contract import LOSSES
from flashcl.engine.ranks import Ranks

WORLD = 3


@dataclass
class Transfer:
    """What gloo, which takes tensors of CPUs, brings to tensors of any device."""

    works: list
    arrivals: list[tuple[Tensor, Tensor]]  # of a device, and of the CPU
    leaving: list[Tensor]  # held until they have left

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for there, here in self.arrivals:
            there.copy_(here)


def talk_by_way_of_the_host() -> None:
    """Also where tensors are of the CPU: there it is tested without a GPU."""
    all_gather, reduce_scatter, exchange, reduce = (
        Ranks.start_all_gather, Ranks.start_reduce_scatter, Ranks.start_exchange, Ranks._reduce_
    )  # fmt: skip

    def one(real):
        def start(self, out, x, *what):
            here, leaves = out.cpu(), x.cpu()
            return Transfer([real(self, here, leaves, *what)], [(out, here)], [leaves])

        return start

    def start_exchange(self, sends, receives, *what):
        leaving = [(rank, v.cpu()) for rank, v in sends]
        arriving = [(rank, v.cpu()) for rank, v in receives]
        works = exchange(self, leaving, arriving, *what)
        return [Transfer(works, [(there, here) for (_, there), (_, here) in zip(receives, arriving)], leaving)]

    Ranks.start_all_gather, Ranks.start_reduce_scatter = one(all_gather), one(reduce_scatter)
    Ranks.start_exchange = start_exchange
    Ranks._reduce_ = lambda self, x, op: x.copy_(reduce(self, x.cpu(), op))


# ---- without a GPU: the interpreter, and the emulation of csrc/ ------------------------------------------------------------


def triton_holds(rank, world) -> dict[str, list[str]]:
    return holds_on_a_cpu("triton", world, [SINGLE, BF16])


def cuda_holds(rank, world) -> dict[str, list[str]]:
    from flashcl.backends import cuda

    cuda.unusable = lambda device, dtype: None
    cuda._LOWEST_STRIP = cuda._C.TILE
    return holds_on_a_cpu("cuda", world, [BF16])


def holds_on_a_cpu(backend, world, dtypes) -> dict[str, list[str]]:
    talk_by_way_of_the_host()
    return {
        f"{loss} {strategy} {dtype}": holds(loss, counts_of("uneven", world), dtype=dtype, strategy=strategy, backend=backend)
        for loss in LOSSES for strategy in ("ring", "gather") for dtype in dtypes
    }  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(triton_holds, marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
        pytest.param(cuda_holds, marks=pytest.mark.skipif(importlib.util.find_spec("flashcl._C") is None, reason="was not built")),
    ],
)
def test_contract(function):
    assert wrong(run_world(WORLD, function)) == {}


# ---- one GPU -------------------------------------------------------------------------------------------------------------


def on_a_shared_gpu(rank, world, *, loss) -> dict[str, list[str]]:
    talk_by_way_of_the_host()
    return on_gpus(rank, world, loss=loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_contract_on_a_shared_gpu(loss):
    assert wrong(run_world(WORLD, functools.partial(on_a_shared_gpu, loss=loss))) == {}
