"""Before anything imports triton: without a GPU its kernels run in the hardened interpreter, on CPU tensors."""

import faulthandler
import importlib.util
import os
import sys

# Tensors here are tiny: with more threads most of the time would go into waking them. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

faulthandler.enable()

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    import interpreter

    interpreter.install()
    from flashcl.backends import triton

    triton.unusable(torch.device("cpu"), torch.bfloat16)  # asks the interpreter once: here, where nobody counts launches or spies

# What computes on this machine's CPU: every backend in each of its dtypes, and in one of 32 and one of 16 bits.
DTYPES = {
    "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
EVERY = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
    for backend, dtypes in DTYPES.items() if backend == "torch" or INTERPRETED for dtype in dtypes
]  # fmt: skip
TWO = [param for param in EVERY if param.values[1] in (torch.float32, torch.bfloat16)]

# The same examples every time, so that a red run is red again; no deadline, since the interpreter is slow by nature.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Every backend that computes on this machine's CPU."""
    if request.param == "triton" and not INTERPRETED:
        pytest.skip("triton takes CPU tensors only in the interpreter (TRITON_INTERPRET=1)")
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """The torch backend in tiles of 16 x 16, not 1024 x 1024: many of them, and ragged ones at the edges."""
    from flashcl.backends import torch as torch_backend

    monkeypatch.setattr(torch_backend, "_CPU_TILE", (16, 16))


@pytest.fixture
def poison():
    """torch.empty gives NaN (or the largest integer): a part of an output that nobody writes cannot go unseen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch fills fresh memory in this mode
    yield
    torch.use_deterministic_algorithms(before)
