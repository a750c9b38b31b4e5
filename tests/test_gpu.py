"""On a real GPU: the contract at real sizes, and what only a GPU can show (streams, graphs, syncs, 2^31, memory)."""

import functools
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from calls import BF16, DOUBLE, HALF, KNOWN, REDUCED, SINGLE, total_of

import flashcl
from flashcl.contract import LOSSES, Yardstick, case, evaluate, violations
from flashcl.engine import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"),
    pytest.mark.usefixtures("poison_cache"),
]

DEVICE = "cuda"
BACKENDS = ("torch", "triton", "cuda")
MIB = 2**20


@pytest.fixture
def poison_cache():
    """Memory that torch.empty hands out holds NaN: what no kernel writes is seen."""
    sizes = (2**10, 2**16, MIB, *[16 * MIB] * 8, 512 * MIB)
    blocks = [torch.full((size // 4,), math.nan, device=DEVICE) for size in sizes]
    del blocks
    yield
    torch.cuda.empty_cache()


def usable(backend, dtype):
    if reason := dispatch.unusable(backend, torch.device(DEVICE, torch.cuda.current_device()), dtype):
        pytest.skip(f"backend {backend}: {reason}")


def needs(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.1f}")


@functools.lru_cache(maxsize=1)
def yardstick(loss, regime, dtype, sizes):
    """For all backends: tests of one case run one after the other in one process (`each`)."""
    return Yardstick.of(case(loss, regime, **dict(sizes)).to(dtype, DEVICE))


def outside(loss, regime, dtype, backend, **sizes):
    """The violations of the contract, less those that are known: there the tight bound may be exceeded by half of it."""
    found = [f for f in yardstick(loss, regime, dtype, tuple(sizes.items())).check(backend) if not f.holds]
    if (loss, regime, dtype) in KNOWN:
        found = [f for f in found if f.bound != "tight" or f.error > 1.5 * f.allowed]
    return found


def each(*cases):
    """Parameters of a test, a process of pytest-xdist for all backends of one case: they share its yardstick."""
    group = [pytest.mark.xdist_group(re.sub(r"\W+", "_", f"{case}")) for case in cases]
    return [pytest.param(backend, *case, marks=mark) for case, mark in zip(cases, group) for backend in BACKENDS]


def in_words(parameter):
    return str(parameter).removeprefix("torch.")


def call(c, backend):
    """A function that evaluates the case with flashcl, forward and backward."""
    options = c.options | dict(backend=backend)
    return lambda: evaluate(getattr(flashcl, c.function), replace(c, options=options))


def step(c, backend):
    """Forward and backward of a case without any look at the results: (loss, gradients), on static leaves."""
    leaves = {name: v.detach().requires_grad_() for name, v in c.tensors.items()}

    def run():
        total = total_of(getattr(flashcl, c.function)(**leaves, **c.options, backend=backend))
        return [total, *torch.autograd.grad(total, list(leaves.values()))]

    return run


# ---- the contract at real sizes


REGIMES = ["init", "converged", "saturated", "cone", "t=0.005", "t=10", "large", "duplicates"]


CASES = list(itertools.product([BF16, HALF, SINGLE], LOSSES, REGIMES))


@pytest.mark.parametrize("backend, dtype, loss, regime", each(*CASES), ids=in_words)
def test_contract(backend, dtype, loss, regime):
    usable(backend, dtype)
    assert outside(loss, regime, dtype, backend, n=2048, d=768) == []


@pytest.mark.parametrize("backend, loss", each(*zip(LOSSES)))
def test_contract_at_full_size(backend, loss):
    usable(backend, BF16)
    needs(16)
    assert outside(loss, "init", BF16, backend, n=4096, m=6001, d=768) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_where_positives_and_negatives_cancel(backend):
    """At the optimum of the bias: products that tensor cores make 1e-6 too small would be several times outside."""
    usable(backend, BF16)
    c = case("siglip", "cone", n=2048, d=768)
    c = replace(c, tensors=c.tensors | dict(logit_bias=torch.tensor(-20.5, dtype=torch.float64)))
    assert violations(c, BF16, backend=backend, device=DEVICE) == []


SHAPES = [(1, 1, 1), (1, 300, 5), (3, 7, 2), (127, 129, 64), (128, 128, 128), (255, 700, 100), (1000, 1111, 17)]
SHAPES += [(513, 514, 512), (300, 301, 1152), (130, 400, 4096)]


@pytest.mark.parametrize("backend, dtype, loss, shape", each(*itertools.product([BF16, SINGLE], LOSSES, SHAPES)), ids=in_words)
def test_shapes(backend, dtype, loss, shape):
    usable(backend, dtype)
    assert outside(loss, "init", dtype, backend, **dict(zip("nmd", shape))) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_float64(loss):
    assert violations(case(loss, "init", n=300, d=64), DOUBLE, backend="torch", device=DEVICE) == []


@pytest.mark.parametrize("layout", ["transposed", "wider", "offset by one element"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, loss, layout):
    """Strides and addresses that no TMA descriptor and no 16-byte load can serve."""
    usable(backend, BF16)
    c = case(loss, "init", n=300, d=70)

    def laid_out(v):
        if v.dim() != 2:
            return v
        if layout == "transposed":
            return v.T.contiguous().T
        if layout == "wider":
            return torch.nn.functional.pad(v, (3, 6), value=math.nan)[:, 3:-6]
        return torch.cat([v.new_full((1,), math.nan), v.flatten()])[1:].view_as(v)

    def function(**arguments):
        arguments = {k: laid_out(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return getattr(flashcl, c.function)(**arguments, backend=backend)

    assert violations(c, BF16, device=DEVICE, function=function) == []


# ---- streams, graphs, syncs


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, loss, reduction):
    usable(backend, BF16)
    options = dict(reduction=reduction) if loss in REDUCED else {}
    run = step(case(loss, "init", n=1000, d=256, **options).to(BF16, DEVICE), backend)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(v.isfinite().all() for v in result)


def test_the_host_never_waits_for_numbers():
    x = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    flashcl.info_nce(x, x, temperature=0.1, normalize=True).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = flashcl.info_nce(x, x, temperature=0.1, normalize=True)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graphs(backend, loss):
    """A captured step, replayed on other inputs, gives the bits of an ordinary step on them."""
    usable(backend, BF16)
    c, other = (case(loss, "init", n=1000, d=256, seed=seed).to(BF16, DEVICE) for seed in (0, 1))
    other = replace(other, options=c.options)
    expected = [v.clone() for v in step(other, backend)()]
    run = step(c, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    first = [v.clone() for v in captured]
    for name, v in c.tensors.items():
        v.copy_(other.tensors[name])
    graph.replay()
    assert not torch.equal(first[1], captured[1])
    for got, want in zip(captured, expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphed_callables(backend):
    """What the README advises for small batches: the loss as two graphs, forward and backward, in an ordinary step."""
    usable(backend, BF16)
    c, other = (case("info_nce", "init", n=1000, d=256, seed=seed).to(BF16, DEVICE) for seed in (0, 1))

    def leaves(c):
        return tuple(v.detach().clone().requires_grad_() for v in c.tensors.values())

    def loss(x, y, scale):
        return flashcl.info_nce(x, y, logit_scale=scale, backend=backend)

    graphed = torch.cuda.make_graphed_callables(loss, leaves(c))
    for inputs in (leaves(c), leaves(other)):
        want = loss(*inputs)
        got = graphed(*inputs)
        assert torch.equal(got, want)
        for p, q in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
            assert torch.equal(p, q)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_stream(backend, loss):
    """Work is queued on the current stream: there its inputs appear late, elsewhere they would be read too early."""
    usable(backend, BF16)
    c = case(loss, "init", n=1000, d=256).to(BF16, DEVICE)
    expected = [v.clone() for v in step(c, backend)()]
    late = replace(c, tensors={name: torch.full_like(v, math.nan) for name, v in c.tensors.items()})
    run = step(late, backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        for name, v in late.tensors.items():
            v.copy_(c.tensors[name])
        result = run()
    side.synchronize()
    for got, want in zip(result, expected):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_device(backend, loss):
    """Tensors on cuda:1 while cuda:0 is current."""
    usable(backend, BF16)
    assert violations(case(loss, "init", n=300, d=64), BF16, backend=backend, device="cuda:1") == []


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [BF16, SINGLE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_times_the_same_bits(backend, dtype, loss):
    usable(backend, dtype)
    run = step(case(loss, "init", n=1500, d=256).to(dtype, DEVICE), backend)
    first = [v.clone() for v in run()]
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(100):
        different += sum((a != b).sum() for a, b in zip(run(), first))
    assert different.item() == 0


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss, dtype):
    c = case(loss, "init", n=300, d=64).to(SINGLE, DEVICE)

    def inside(**arguments):
        with torch.autocast(DEVICE, dtype):
            return getattr(flashcl, c.function)(**arguments)

    outside = call(c.to(dtype, DEVICE), "auto")()
    for name, v in evaluate(inside, c).items():
        assert v.dtype == SINGLE
        assert torch.equal(v.to(outside[name].dtype), outside[name]), name


# ---- sizes


def far_apart(count, rows, generator):
    """Sampled row numbers, the first and the last rows among them."""
    middle = torch.randint(rows, (count,), generator=generator).tolist()
    return torch.tensor(sorted({0, 1, *middle, rows - 2, rows - 1}), device=DEVICE)


def check_samples(x, y, scale, u, v, row_lse, col_lse, dx, dy, generator, block=2**25):
    """Log-sum-exps in float64 over everything, in blocks; gradients on sampled rows and columns."""
    per = max(1, block // len(y))
    y64 = y.double()
    rows, cols = [], torch.full((len(y),), -math.inf, dtype=DOUBLE, device=x.device)
    for part in x.split(per):
        s = scale * part.double() @ y64.T
        rows.append(s.logsumexp(1))
        cols = torch.logaddexp(cols, s.logsumexp(0))
    rows = torch.cat(rows)
    assert (row_lse - rows).abs().max() < 1e-5 and (col_lse - cols).abs().max() < 1e-5

    def gradient(mine, all_, my_weight, their_weight, my_lse, their_lse):
        """Of the sampled embeddings `mine`, in blocks of the others."""
        total, per = torch.zeros(mine.shape, dtype=DOUBLE, device=mine.device), block // len(mine)
        for part, w, lse in zip(all_.split(per), their_weight.split(per), their_lse.split(per)):
            s = scale * mine.double() @ part.double().T
            g = my_weight[:, None] * (s - my_lse[:, None]).exp() + w * (s - lse).exp()
            total += scale * g @ part.double()
        return total

    i, j = far_apart(60, len(x), generator), far_apart(60, len(y), generator)
    for got, want in (
        (dx[i], gradient(x[i], y, u.double()[i], v.double(), rows[i], cols)),
        (dy[j], gradient(y[j], x, v.double()[j], u.double(), cols[j], rows)),
    ):
        error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < 2e-2, f"row {error.argmax().item()} of the sample"  # of one bfloat16 row


@pytest.mark.xdist_group("large")  # one at a time
@pytest.mark.parametrize("n, m, d", [(4_300_000, 96, 512), (96, 4_300_000, 512), (70_000, 70_003, 64)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_2_to_the_31(backend, n, m, d):
    """More than 2^31 elements in x, in y, and in the logits: one 32-bit product of row and stride is garbage."""
    usable(backend, BF16)
    needs(36 if max(n, m) > 10**6 else 8)
    assert max(n * d, m * d, n * m) > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(rows, d, generator=generator, device=DEVICE, dtype=BF16) for rows in (n, m))
    x, y = x.mul_(d**-0.5).requires_grad_(), y.requires_grad_()
    u, v = (torch.rand(rows, generator=generator, device=DEVICE) + 0.5 for rows in (n, m))
    row_lse, col_lse = flashcl.similarity_logsumexp(x, y, logit_scale=1.0, backend=backend)
    dx, dy = torch.autograd.grad((row_lse, col_lse), (x, y), (u, v))
    samples = torch.Generator().manual_seed(0)
    with torch.no_grad():
        check_samples(x, y, 1.0, u, v, row_lse, col_lse, dx, dy, samples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nt_xent_beyond_2_to_the_31(backend):
    """The triangular walk numbers its tiles otherwise."""
    usable(backend, BF16)
    needs(8)
    n, d, t = 33_000, 64, 0.5
    generator = torch.Generator(DEVICE).manual_seed(0)
    z1, z2 = (torch.randn(n, d, generator=generator, device=DEVICE).mul_(d**-0.5).to(BF16) for _ in "12")
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    loss = flashcl.nt_xent(z1, z2, temperature=t, reduction="none", backend=backend)
    dz = torch.cat(torch.autograd.grad(loss.sum(), (z1, z2)))
    z = torch.cat([z1, z2]).detach().double()
    assert len(z) ** 2 > 2**31
    lse = torch.cat([(part @ z.T / t).masked_fill_(own, -math.inf).logsumexp(1) for part, own in own_rows(z)])
    partner = z.roll(n, 0)
    torch.testing.assert_close(loss.double(), lse - (z * partner).sum(1) / t, rtol=0, atol=2e-5)
    i = far_apart(60, len(z), torch.Generator().manual_seed(0))
    s = z[i] @ z.T / t
    g = (s - lse[i, None]).exp() + (s - lse).exp()
    g[torch.arange(len(i), device=DEVICE), i] = 0
    want = (g @ z - 2 * partner[i]) / t
    error = (dz[i].double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 2e-2


def own_rows(z, per=256):
    for start in range(0, len(z), per):
        part = z[start : start + per]
        own = torch.zeros(len(part), len(z), dtype=torch.bool, device=z.device)
        own.diagonal(start).fill_(True)
        yield part, own


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory(backend, loss):
    """512 MiB of workspace beside inputs, gradients and their float32 sums, and statistics of tiles; S has 8 GiB."""
    usable(backend, BF16)
    needs(8)
    c = case(loss, "init", n=65_536 if loss != "nt_xent" else 32_768, m=65_536, d=128).to(BF16, DEVICE)
    run = step(c, backend)
    run()  # compiles, and makes what is made once
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    embeddings = sum(v.numel() for v in c.tensors.values() if v.dim() == 2)
    logits = 65_536**2
    copies = 3 * 2 * embeddings + 2 * 4 * embeddings  # bfloat16 copies and gradients, float32 sums
    partials = 2 * 8 * logits // 128  # two statistics of 4 bytes, for each row and each column of a 128 x 128 tile
    assert used <= 512 * MIB + copies + partials, f"{used / MIB:.0f} MiB"
    assert len(result) == 1 + len(c.tensors)
