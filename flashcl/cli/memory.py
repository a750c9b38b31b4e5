"""The peak memory of a loss, measured: forward and backward on random unit vectors, beyond the embeddings themselves.

On CUDA: the caching allocator's own peak. On the CPU: the peak resident set (VmHWM of /proc/self/status) of a process
that does nothing else, reset before each loss. `getrusage` would not do: a new process inherits its parent's maximum.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

import flashcl
from flashcl import reference

LOSSES = {"dense": reference.info_nce, "flashcl": flashcl.info_nce}
METHOD = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "VmHWM of a process of its own"}
FIRST_GUESS = 6  # (N, N) float32 matrices that dense holds at its peak; used until it has been measured


class Measured(NamedTuple):
    """Bytes at the peak (0: too few to be seen), or None where the loss was not run as it would need `needed` bytes."""

    loss: str
    batch: int
    peak: int | None
    needed: int | None = None


def measurable(device: torch.device) -> bool:
    return device.type == "cuda" or os.path.exists("/proc/self/clear_refs")


def available(device: torch.device) -> int:
    """Bytes that are free on the device, or on this machine within the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no cgroup of our own, or "max": no limit
        return free


def measure_all(device: torch.device, batches: list[int], dim: int) -> Iterator[Measured]:
    """Every loss at every batch size, in ascending order; dense only where it takes at most half of the free memory."""
    if device.type == "cuda":
        yield from _measure_here(device, batches, dim)
        return
    code = "from flashcl.cli import memory; memory.child()"
    command = [sys.executable, "-c", code, json.dumps([batches, dim])]
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield Measured(*json.loads(line))
    if process.returncode:
        raise RuntimeError(f"the process that measures memory ended with code {process.returncode}")


def find(measured: list[Measured], loss: str, batch: int) -> Measured | None:
    return next((m for m in measured if (m.loss, m.batch) == (loss, batch)), None)


def child_environment() -> dict[str, str]:
    """The variables of a process that measures its memory."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # glibc: every tensor gets pages of its own, given back when it is freed: the resident set is what is alive
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def child() -> None:
    """The measuring process: takes (batches, dim) as JSON, prints one line of JSON for each result."""
    batches, dim = json.loads(sys.argv[1])
    for result in _measure_here(torch.device("cpu"), batches, dim):
        print(json.dumps(result), flush=True)


def _measure_here(device: torch.device, batches: list[int], dim: int) -> Iterator[Measured]:
    for loss in LOSSES:  # the first call of anything allocates what stays: threads, library handles
        _peak(loss, 256, dim, device)
    matrices = FIRST_GUESS
    for batch in sorted(batches):
        for loss in LOSSES:
            needed = int(matrices * 4 * batch**2)
            if loss == "dense" and needed > available(device) / 2:
                yield Measured(loss, batch, None, needed)
                continue
            peak = _peak(loss, batch, dim, device)
            if loss == "dense":
                matrices = peak / (4 * batch**2)
            yield Measured(loss, batch, peak)


def _peak(loss: str, batch: int, dim: int, device: torch.device) -> int:
    """Bytes that forward and backward held at most, the gradients of the embeddings among them."""
    generator = torch.Generator().manual_seed(batch)
    x, y = (F.normalize(torch.randn(batch, dim, generator=generator)).to(device).requires_grad_() for _ in "xy")
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    before = reset_peak(device)
    LOSSES[loss](x, y, logit_scale=scale).backward()
    return read_peak(device) - before


def reset_peak(device: torch.device) -> int:
    """Starts a new peak; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    return status("VmRSS")


def read_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
