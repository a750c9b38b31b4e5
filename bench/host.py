"""The time a training step takes of the host, which sends work to a GPU and does not wait for it.

    python bench/host.py                 a GPU, or a CPU of which the torch backend is measured
    python bench/host.py --stub          no GPU: a backend for sm_90 (--backend triton or cuda) with launches that do nothing

256 x 16 embeddings: whatever computes is done long before the host is. With --stub the small operations of PyTorch around the
kernels run on the CPU; the driver's part of a launch is missing, and so are the products with G.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import flashcl
from flashcl import reference
from flashcl.backends import cuda, tiled
from flashcl.engine import dispatch

N, D = 256, 16
LOSSES = {
    "info_nce": lambda x, y, scale, bias, **at: flashcl.info_nce(x, y, logit_scale=scale, **at),
    "siglip": lambda x, y, scale, bias, **at: flashcl.siglip(x, y, logit_scale=scale, logit_bias=bias, **at),
    "nt_xent": lambda x, y, scale, bias, **at: flashcl.nt_xent(x, y, temperature=0.1, **at),
    "sup_con": lambda x, y, scale, bias, **at: flashcl.sup_con(x, torch.arange(N, device=x.device) // 4, **at),
    "dense info_nce": lambda x, y, scale, bias, **at: reference.info_nce(x, y, logit_scale=scale),
}


class Stub(DriverBase):
    """A driver of Triton that loads no kernel and launches none."""

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 227 * 1024})
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))  # module, function, registers, spills, threads

    is_active = classmethod(lambda cls: True)
    launcher_cls = staticmethod(lambda source, metadata: lambda *_: None)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_benchmarker = map_python_to_cpp_type = None  # a driver has them, a launch does not ask for them


def stand_in_for_a_gpu() -> None:
    """Lets the backends with kernels serve CPU tensors, as on a GPU of sm_90 but with nothing computed."""
    triton.runtime.driver.set_active(Stub())
    if cuda._C is not None:
        launches = dict.fromkeys(("sweep", "grad", "sigmoid", "fold", "partner_products", "finish"), lambda *_, **__: None)
        cuda._C = SimpleNamespace(TILE=cuda._C.TILE, Block=cuda._C.Block, **launches)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    dispatch.unusable = lambda *_: None
    tiled.addmm_ = lambda *_, **__: None


def milliseconds(loss, inputs: list[Tensor], repeats: int) -> tuple[float, float]:
    """The median of the times of a step and their 20 % quantile."""
    times = []
    for i in range(repeats + 50):
        if torch.cuda.is_available() and i % 8 == 0:
            torch.cuda.synchronize()  # a full queue would make the host wait
        for v in inputs:
            v.grad = None
        start = time.perf_counter()
        loss(*inputs).backward()
        times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[50:])
    return statistics.median(times), times[len(times) // 5]


def leaves(device: str, sixteen_bits: bool) -> list[Tensor]:
    """x, y, the scale and the bias."""
    embeddings = (torch.nn.functional.normalize(torch.randn(N, D)) for _ in range(2))
    embeddings = [x.to(device, torch.bfloat16 if sixteen_bits else torch.float32).requires_grad_() for x in embeddings]
    return embeddings + [torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", action="store_true", help="a backend of kernels without a GPU: its launches do nothing")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stub:
        stand_in_for_a_gpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if options.stub and options.backend == "auto" else options.backend
    inputs = leaves(device, sixteen_bits=options.stub or device == "cuda")
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"host time of a step, ms: median, 20 % quantile ({backend} on {device}, {versions})")
    for name, loss in LOSSES.items():
        loss = functools.partial(torch.compile(loss) if options.compile else loss, backend=backend)
        median, low = milliseconds(loss, inputs, options.repeats)
        print(f"{name:16} {median:8.3f} {low:8.3f}")


if __name__ == "__main__":
    main()
