"""Which backend serves a call (flashcl/engine/dispatch.py), on machines that are not here either."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

import flashcl
from flashcl.engine import dispatch


def on_a_gpu(dtype):
    """What dispatch sees of a tensor there."""
    return type("OnAGpu", (), dict(device=torch.device("cuda", 0), dtype=dtype))()


@pytest.mark.parametrize(
    "arch, able, chosen",
    [
        ((9, 0), {"cuda", "triton", "torch"}, "cuda"),
        ((9, 0), {"triton", "torch"}, "triton"),
        ((8, 0), {"cuda", "triton", "torch"}, "torch"),  # not verified there
        ((10, 0), {"cuda", "triton", "torch"}, "torch"),
    ],
)
def test_auto_takes_the_fastest_that_is_verified(monkeypatch, arch, able, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: arch)
    monkeypatch.setattr(dispatch, "unusable", lambda name, *_: None if name in able else f"no {name}")
    assert dispatch.choose("auto", on_a_gpu(torch.bfloat16)) == chosen


def test_a_backend_is_asked_for_the_dtype_of_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "unusable", lambda name, device, dtype: seen.append(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        dispatch.choose("torch", torch.zeros(1, 1))
    assert seen == [torch.bfloat16]


def test_explain_counts_the_columns():
    group = torch.distributed.ProcessGroup(0, 1)
    x, y = torch.zeros(8, 4096), torch.zeros(16384, 4096)  # 256 MiB: more than a chunk
    assert "1 ranks, ring" in flashcl.explain(x, y, group=group) and "1 ranks, gather" in flashcl.explain(x, group=group)


def test_the_kernels_of_a_gpu_are_not_taken_on_a_cpu():
    text = flashcl.explain(torch.zeros(4, 2), torch.zeros(4, 2))
    assert "-> torch: chosen" in text
    assert re.search(r"triton: .*cpu", text) and re.search(r"cuda: .*cpu", text)


def test_a_device_that_no_backend_serves_is_refused():
    x = torch.empty(4, 2, device="meta")
    elsewhere = type("Elsewhere", (), dict(device=torch.device("mps"), dtype=x.dtype))()
    with pytest.raises(RuntimeError, match="'torch' cannot serve torch.float32 on mps here: .*float64"):
        dispatch.choose("auto", elsewhere)


@pytest.mark.parametrize(
    "arch, dtype, warns",
    [((9, 0), torch.bfloat16, True), ((9, 0), torch.float64, False), ((8, 0), torch.bfloat16, False)],
)
def test_auto_says_when_it_misses_kernels_that_a_gpu_could_run(monkeypatch, arch, dtype, warns):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: arch)
    monkeypatch.setattr(dispatch, "unusable", lambda name, *_: None if name == "torch" else f"no {name}")
    x = on_a_gpu(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert dispatch.choose("auto", x) == "torch"
    assert [str(w.message).split(". ")[1] for w in caught] == (["cuda: no cuda; triton: no triton"] if warns else [])


def test_a_clone_that_is_not_installed_says_what_to_do(monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'flashcl.triton_kernels'", name="flashcl.triton_kernels")

    monkeypatch.setattr(dispatch, "load", load)
    assert dispatch.unusable("triton", torch.device("cpu"), torch.float32).endswith("outside of the clone, or pip install -e .")


OLD_TRITON = """
import torch, triton
del triton.knobs  # Triton 3.3, which torch 2.7 brings, has none
triton.__version__ = "3.3.1"
from flashcl.engine import dispatch
torch.cuda.get_device_capability = lambda device=None: (8, 0)
gpu = type("OnAGpu", (), dict(device=torch.device("cuda", 0), dtype=torch.float32))()
print(dispatch.choose("auto", gpu), dispatch.unusable("triton", gpu.device, gpu.dtype), sep=": ")
"""


def test_a_triton_that_is_too_old_is_passed_over():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", OLD_TRITON], capture_output=True, text=True)
    assert done.stdout == "torch: the kernels need triton 3.6 or later, this is 3.3.1\n", done.stderr


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_amd_gpu_is_not_taken_for_one_of_nvidia(monkeypatch, backend):
    """It has a capability, too, which may be that of a generation on which the kernels are verified."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    reason = dispatch.unusable(backend, torch.device("cuda", 0), torch.bfloat16)
    assert "NVIDIA" in reason or "flashcl._C is not there" in reason
    monkeypatch.setattr(dispatch, "unusable", lambda name, *_: None if name == "torch" else f"no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does auto miss kernels there
        assert dispatch.choose("auto", on_a_gpu(torch.bfloat16)) == "torch"


def test_every_backend_that_is_named_exists_and_says_what_it_can():
    for name in dispatch.BACKENDS:
        reason = dispatch.unusable(name, torch.device("cpu"), torch.float64)
        assert (reason is None) == (name == "torch"), (name, reason)
