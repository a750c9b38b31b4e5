"""Groups that lose a rank, are made again, or end: worlds of their own beside those of test_distributed.py."""

import functools
import math
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from world import TIMEOUT, D, refused, run_world

import flashcl


def a_rank_dies(rank, world) -> list[str]:
    x = torch.ones(3, D)
    loss = functools.partial(flashcl.info_nce, x, x, temperature=1.0, group=dist.group.WORLD)
    loss()
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    wrong = refused(loss, "failed while waiting", f"rank {rank}")
    took = time.monotonic() - start
    return wrong + [f"it took {took} s"] * (took > 30)


def test_a_rank_that_dies_is_an_error_on_the_others():
    wrong = run_world(3, a_rank_dies, survivors=True)
    assert [w for w in wrong if w is not None] == [[], []]


def a_group_made_again(rank, world, folder) -> list[str]:
    """After an error on one rank alone, which makes the ranks disagree for good, a new group under the old name is a new one."""
    x = torch.ones(3, D)
    flashcl.info_nce(x, x, temperature=1.0, group=dist.group.WORLD)
    # Refused on rank 1 before it meets the others, which wait for it until it leaves.
    words = "y must have the 3 rows of x" if rank else "failed while waiting"
    wrong = refused(lambda: flashcl.info_nce(x, x[: 3 - rank], temperature=1.0, group=dist.group.WORLD), words)
    name = dist.group.WORLD.group_name
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/again", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    value = flashcl.info_nce(x, x, temperature=1.0, group=dist.group.WORLD).item()
    wrong += [f"another name, {dist.group.WORLD.group_name}, shows nothing"] * (dist.group.WORLD.group_name != name)
    return wrong + [f"loss {value}"] * (abs(value - math.log(3 * world)) > 1e-6)


def test_a_group_that_is_made_again(tmp_path):
    assert run_world(2, functools.partial(a_group_made_again, folder=str(tmp_path))) == [[], []]


def test_a_loss_does_not_keep_its_group(tmp_path):
    """Of a group that outlives destroy_process_group, threads stay that may abort the process at interpreter exit."""
    code = """
import sys, weakref, torch, flashcl, torch.distributed as dist
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
x, y = torch.randn(2, 8, 4, requires_grad=True)
flashcl.info_nce(x, y, temperature=0.1, group=dist.group.WORLD).backward()
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
print(group())
"""
    environment = os.environ | dict(GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "store"], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("None", 0), done.stderr
