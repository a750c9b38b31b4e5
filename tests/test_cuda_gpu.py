"""The Hopper kernels on a Hopper GPU: what emulation on a CPU (test_kernels.py, test_cuda_host.py) cannot show.

tests/test_gpu.py runs the contract, graphs, streams and sizes beyond 2^31 over every backend; here are the kernels themselves.
"""

import math

import pytest
import torch

import kernels
from kernels import assert_near, everything

import flashcl
from flashcl.backends.gemm import addmm_
from flashcl.contract import LOSSES, case, evaluate
from flashcl.engine import dispatch
from flashcl.engine.problem import Needs, Problem, Softmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"),
]

DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
# The last one gives every cluster several tiles: both consumers work, and stages are used again.
SHAPES = [*kernels.SHAPES, (1000, 1111, 200), (2000, 1900, 264)]


@pytest.fixture(scope="module", params=["cuda"])
def backend(request):
    """Named in the ids of the tests, by which results are counted."""
    if reason := dispatch.unusable("cuda", DEVICE, BF16):
        # On the GPU that these kernels are for, that they cannot be used is a failure.
        assert torch.cuda.get_device_capability() != (9, 0), reason
        pytest.skip(reason)
    from flashcl.backends import cuda

    return cuda


def problem(*args, **options):
    return kernels.problem(*args, **options, device=DEVICE)


def on_cpu(p):
    """The same problem for the emulation."""
    moved = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(p).items()}
    x = moved["x"]
    rows, cols = (tuple(v.cpu() for v in vectors) for vectors in (p.rows, p.cols))
    return Problem(**moved | dict(y=x if p.triangular else moved["y"], rows=rows, cols=cols))


def check_like_emulation(backend, p):
    assert_near(everything(backend, p), everything(backend, on_cpu(p)))


@pytest.mark.parametrize("N, M, D", SHAPES)
@pytest.mark.parametrize("program", ["all", "different", "by_label"])
def test_like_emulation(backend, program, N, M, D):
    check_like_emulation(backend, problem(N, M, D, program))
    check_like_emulation(backend, problem(N, N, D, program, triangular=True))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("N, M, D, shift", [(1, 1, 1, 0), (300, 300, 264, 150), (257, 400, 77, 0), (5000, 5000, 512, 4999)])
def test_rows_like_emulation(backend, N, M, D, shift, dtype):
    g = torch.Generator().manual_seed(0)
    x, y, acc, weight = (torch.randn(*shape, generator=g) for shape in ((N, D), (M, D), (N + 3, D), (N,)))
    x, y, scale = x.to(dtype), y.to(dtype), torch.tensor([0.3])
    outs = [torch.empty(N + 3, D, dtype=to) for to in (dtype, torch.float32)]
    on_gpu = [torch.empty_like(out, device=DEVICE) for out in outs]
    for out, gpu in zip(outs, on_gpu):
        backend.finish(acc, y, weight, shift, scale, out)
        backend.finish(acc.to(DEVICE), y.to(DEVICE), weight.to(DEVICE), shift, scale.to(DEVICE), gpu)
        assert torch.equal(gpu.cpu(), out)
    products = backend.partner_products(x.to(DEVICE), y.to(DEVICE), shift)
    torch.testing.assert_close(products.cpu(), backend.partner_products(x, y, shift), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("program", ["all", "different", "by_label"])
def test_a_thousand_times_the_same_bits(backend, program, triangular):
    """Many waves of tiles, 24 steps in a tile: a race moves a bit sooner or later."""
    p = problem(4096, 4096 if triangular else 2049, 1536, program, triangular)
    first = everything(backend, p)
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        different += sum(
            (a.nan_to_num() != b.nan_to_num()).sum() for a, b in zip(everything(backend, p).values(), first.values())
        )
    assert different.item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_thousand_steps_the_same_bits(backend, loss):
    """The losses themselves, forward and backward, beside other work on a second stream."""
    c = case(loss, "init", n=1500, d=256).to(BF16, DEVICE)
    c.options["backend"] = "cuda"
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)

    def run():
        return evaluate(getattr(flashcl, c.function), c)

    first = {k: v.clone() for k, v in run().items()}
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        with torch.cuda.stream(side):
            noise @ noise
        different += sum((v != first[k]).sum() for k, v in run().items())
    torch.cuda.synchronize()
    assert different.item() == 0


@pytest.mark.parametrize("workspace", [2**29, 2**20], ids=["one block", "blocks"])
def test_unwritten_memory_is_not_read(backend, workspace):
    """All of a block is written: what torch.empty hands out holds NaN."""
    p = problem(1000, 1111, 200)
    blocks = [torch.full((2**24,), math.nan, device=DEVICE) for _ in range(8)]
    del blocks
    s = backend.sweep(p, need_cols=True, workspace=workspace)
    c = Softmax(torch.ones_like(s.row.top), s.row.top, torch.ones_like(s.col.top), s.col.top)
    g = backend.grad(p, c, Needs(x=True, y=True, row_bias=True, col_bias=True, scale=True), workspace=workspace)
    assert all(v.isfinite().all() for v in (s.row.value(), s.col.value(), *vars(g).values()) if v is not None)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_gradients_are_accumulated_in_float32(backend, dtype):
    """The GEMMs of the library: neither their result nor what it is added to is rounded to 16 bits on the way."""
    a, b = (
        torch.full((256, 64), 2.0**-9, dtype=dtype, device=DEVICE),
        torch.full((64, 128), 2.0**-9, dtype=dtype, device=DEVICE),
    )
    acc = torch.ones(256, 128, device=DEVICE)
    for _ in range(3):
        addmm_(acc, a, b)  # 64 * 2^-18 = 2^-12 each time: 16 bits round 1 + 2^-12 to 1
    assert (acc == 1 + 3 * 2.0**-12).all()


def test_errors_are_exceptions(backend):
    from flashcl import _C

    x, one = torch.zeros(4, 8, dtype=BF16, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="another device"):
        _C.Block(x, x.clone(), one.cpu())
