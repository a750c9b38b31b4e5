"""Losses over ranks by NCCL, on a GPU for each rank. With one GPU only what a rank says to itself goes through NCCL."""

import pytest
import torch
import torch.distributed as dist
from world import counts_of, run_world
from world_contract import contract_cases, holds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="needs NVIDIA GPUs, and NCCL"),
]


def everything(rank, world) -> dict[str, list[str]]:
    return {name: holds(loss, counts_of(kind, world), device="cuda", **how) for name, loss, kind, how in contract_cases()}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_contract(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    said = run_world(world, everything, backend="nccl")
    wrong = {f"rank {rank}: {name}": messages for rank, of_rank in enumerate(said) for name, messages in of_rank.items()}
    assert {name: messages for name, messages in wrong.items() if messages} == {}
