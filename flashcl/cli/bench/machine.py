"""The machine: what it is, and the two rates that bound every kernel on it, measured in the same run as the kernels."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import flashcl
from flashcl.backends import onednn
from flashcl.cli.bench.providers import WRITTEN_FOR
from flashcl.cli.bench.suites import Workload
from flashcl.cli.text import describe, version

CHUNK = {"cuda": 4096, "cpu": 1024}  # rows of S that a chunked backward makes at a time
WIDEST = {"cuda": 65_536, "cpu": 16_384}  # beyond, products get longer but no faster
OF_ONE_RUN = ("load_before", "command", "date", "copy_gb_per_s")  # of the environment; the rest is of the machine


def environment(device: torch.device) -> dict[str, str | float]:
    """Everything that a number depends on; `device` also decides whether two results may be compared."""
    return dict(
        device=describe(device),
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        flashcl=flashcl.__version__,
        **{package: version(package, missing="none") for package in ("triton", *WRITTEN_FOR)},
        commit=_commit(),
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else "none",  # Windows has none
        command=_command(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _command() -> str:
    """As one would type it: flashcl, or a script of bench/."""
    script = Path(sys.argv[0])
    program = ["python", f"{script.parent.name}/{script.name}"] if script.suffix == ".py" else ["flashcl"]
    return shlex.join([*program, *sys.argv[1:]])


def _commit() -> str:
    """Of the checkout that flashcl runs from, with a + where its files differ; FLASHCL_COMMIT where there is none."""
    folder = str(Path(flashcl.__file__).parent)
    commit = _first_line("git", "-C", folder, "rev-parse", "--short", "HEAD")
    if not commit or not _first_line("git", "-C", folder, "ls-files", "__init__.py"):
        return os.environ.get("FLASHCL_COMMIT", "unknown")
    return commit + ("+" if _first_line("git", "-C", folder, "status", "--porcelain", "-uno", ".") else "")


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout else ""


class Clock:
    """Marks in the stream of work and the milliseconds between them; cold() empties the caches of a GPU."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        if self.gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.filler = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def cold(self) -> None:
        if self.gpu:
            self.filler.zero_()

    def mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def between(self, start, end) -> float:
        """Milliseconds; after wait()."""
        return start.elapsed_time(end) if self.gpu else (end - start) * 1e3


class Products:
    """The three products of a chunk as the fastest library of the machine (cuBLAS, MKL, oneDNN) runs them: S = X Y^T, dX = G Y
    and dY = G^T X, where X and G have CHUNK rows. They take turns with the providers: what slows a round slows both."""

    def __init__(self, work: Workload, clock: Clock, device: torch.device):
        rows, n = min(work.n, CHUNK[device.type]), min(work.n, WIDEST[device.type])
        sizes = (rows, work.d), (n, work.d), (rows, n)
        self.x, self.y, self.g = (torch.randn(size, device=device).to(getattr(torch, work.dtype)) for size in sizes)
        self.flops, self.clock = 3 * 2.0 * rows * n * work.d, clock
        self.multiply = onednn.multiply if onednn.faster(self.x, self.y.T) else torch.matmul

    def __call__(self) -> dict[str, tuple]:
        self.clock.cold()
        start = self.clock.mark()
        self.multiply(self.x, self.y.T)
        self.multiply(self.g, self.y)
        self.multiply(self.g.T, self.x)
        return dict(products=(start, self.clock.mark()))


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes read and written per second."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    marks = []
    for _ in range(12):
        clock.cold()
        start = clock.mark()
        target.copy_(source)
        marks.append((start, clock.mark()))
    clock.wait()
    return 2 * size / (statistics.median(clock.between(*pair) for pair in marks[2:]) / 1e3)
