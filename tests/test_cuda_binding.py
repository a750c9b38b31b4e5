"""What stands between Python and the CUDA kernels: errors of CUDA, the interpreter's lock, the current device."""

import contextlib
import ctypes
import threading
import time
import types

import pytest
import torch

_C = pytest.importorskip("flashcl._C", reason="flashcl._C was not built: no nvcc, or no CUTLASS headers")

from flashcl.backends import cuda as backend


class SaidToBeOnAGpu:
    """Offers a tensor of the CPU by DLPack, with the device that the capsule names changed to CUDA's first."""

    CUDA = 2  # kDLCUDA; in DLTensor the device, two int32, follows the pointer to the data

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.CUDA, 0

    def __dlpack__(self, **_):
        capsule = self.tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        device = (ctypes.c_int32 * 2).from_address(pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
        device[:] = self.CUDA, 0
        return capsule


@pytest.mark.skipif(_C.device_count() > 0, reason="there is a GPU, which would read addresses of the CPU")
def test_an_error_of_cuda_is_an_exception_with_its_message():
    sums, out = torch.zeros(1, 2, 3, 128), torch.zeros(1, 2, 100)
    with pytest.raises(RuntimeError, match=r"^flashcl\._C: .*CUDA"):
        _C.fold(SaidToBeOnAGpu(sums), SaidToBeOnAGpu(out), True, True, 0)
    _C.fold(sums, out, True, True, 0)  # and what comes after is as before


def test_other_threads_run_beside_a_kernel():
    """The emulation of a sweep takes this thread 0.1 s or more, in which another one counts."""
    x = torch.randn(640, 256).bfloat16()
    block, sums = _C.Block(x, x.clone(), torch.ones(1)), torch.empty(1, 2, 5, 640)
    begun, ended, ticks = threading.Event(), threading.Event(), []

    def count():
        begun.set()
        while not ended.is_set():
            ticks.append(time.monotonic())
            time.sleep(1e-3)

    other = threading.Thread(target=count)
    other.start()
    begun.wait()
    start = time.monotonic()
    _C.sweep(block, sums)
    end = time.monotonic()
    ended.set()
    other.join()
    # With the lock held none would fall into the call, and one or two between it and the clock.
    assert end - start > 0.02 and sum(start < tick < end for tick in ticks) > 5


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch, current):
    at, devices = [current], []

    @contextlib.contextmanager
    def switch(device):
        before, at[0] = at[0], device.index
        devices.append(device)
        yield
        at[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=100 + at[0]))
    with backend._on(torch.device("cuda", 1)) as stream:
        assert at == [1] and stream == 101  # its own stream, not that of the device that was current
    assert at == [current] and devices == [torch.device("cuda", 1)] * (current == 0)
    with backend._on(torch.device("cpu")) as stream:
        assert stream == 0
