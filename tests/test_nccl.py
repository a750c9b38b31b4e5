"""Losses over ranks by NCCL, on a GPU for each rank. With one GPU only what a rank says to itself goes through NCCL."""

import functools

import pytest
import torch
import torch.distributed as dist
from world import run_world
from world_contract import on_gpus, wrong

from flashcl.contract import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="needs NVIDIA GPUs, and NCCL"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_contract(world, loss):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    assert wrong(run_world(world, functools.partial(on_gpus, loss=loss), backend="nccl")) == {}
