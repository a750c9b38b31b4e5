"""The Hopper kernels as PTX, on a simulated GPU (ptx/): in the orders that a GPU may choose, and with faults put in."""

import pytest
import torch

import ptx
from kernels import SHAPES, assert_near, everything, problem

from flashcl.backends import cuda as backend
from flashcl.engine.problem import CLASSES

# 5 x 6 tiles are 9 units of 2 x 2, so that one or two clusters use both consumers and take turns; 17 steps of D go through
# the 4 or 6 stages several times.
MANY_TILES, MANY_STEPS = (600, 700, 136), (200, 130, 1080)


@pytest.fixture(scope="module")
def machine():
    machine = ptx.machine()
    if isinstance(machine, str):
        pytest.skip(machine)
    return machine


@pytest.fixture
def run(machine, monkeypatch):
    """run(problem, seed, clusters): everything about it from the PTX."""
    monkeypatch.setattr(backend, "_C", machine.module)

    def run(p, seed=0, clusters=1):
        machine.set(seed, clusters)
        return everything(backend, p)

    yield run
    machine.set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, M, D", [*SHAPES, MANY_TILES, MANY_STEPS])
@pytest.mark.parametrize("program", CLASSES)
def test_like_emulation(run, program, N, M, D, dtype):
    for p in (problem(N, M, D, program, dtype=dtype), problem(N, N, D, program, triangular=True, dtype=dtype)):
        got = run(p)
        with pytest.MonkeyPatch.context() as emulated:
            from flashcl import _C

            emulated.setattr(backend, "_C", _C)
            assert_near(got, everything(backend, p), of_logits=1e-6 if D < 1000 else 5e-6)  # sums are cut off 68 times


@pytest.mark.parametrize("shape", [MANY_TILES, MANY_STEPS], ids=["tiles", "steps"])
@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("program", CLASSES)
def test_any_order_gives_the_same_bits(run, program, triangular, shape):
    """Warps run ahead or in lockstep, copies and products come at once or late, a cluster does all of the work or a part."""
    N, M, D = shape
    p = problem(N, N if triangular else M, D, program, triangular)
    first = run(p)
    for seed in range(1, 7):
        for name, v in run(p, seed, clusters=1 + seed % 3).items():
            assert torch.equal(v, first[name]), f"{name}, seed {seed}"  # every line has pairs: no NaN


NOTHING = "prefetch.tensormap"  # takes any operands and has no effect here

# What is in place of what in the PTX, and how it is noticed: by a message, or because results are others.
OTHER_RESULTS = "other results"
FAULTS = {
    "no fence before the copy engine reads G": ("fence.proxy.async.shared::cta;", ";", "without a fence"),
    "G is not awaited": ("cp.async.bulk.wait_group.read 0;", ";", "a thread left"),
    "warps do not wait for each other": ("bar.sync", NOTHING, "without a fence"),
    "CTAs do not wait for the barriers of others": ("barrier.cluster.wait.aligned;", ";", "no mbarrier"),
    "products are not awaited": ("wgmma.wait_group.sync.aligned 0;", ";", "an accumulator changed"),
    "stages are given back under a product": ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 5;", OTHER_RESULTS),
    "stages are never given back": ("mbarrier.arrive.shared::cluster.b64", NOTHING, "nothing moves"),
    "stages are not awaited": ("@P1 bra DONE;", "bra DONE;", "more arrivals"),
    "registers are not fenced": ("wgmma.fence.sync.aligned;", ";", "no wgmma.fence"),
    "more registers than there are": ("setmaxnreg.inc.sync.aligned.u32 240", "setmaxnreg.inc.sync.aligned.u32 248", "nothing moves"),
    # Bits 32 to 45: from eight rows to the next, in 16 bytes.
    "operands described with another stride": (str(1 << 62 | 64 << 32 | 1 << 16), str(1 << 62 | 63 << 32 | 1 << 16), OTHER_RESULTS),
    "lanes exchange with others": ("shfl.sync.bfly.b32", "shfl.sync.idx.b32", OTHER_RESULTS),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(run, machine, fault):
    """The machine would not pass anything. Not in every order: that is what a race is."""
    old, new, sign = FAULTS[fault]
    p = problem(300, 280, 520)
    right, noticed = run(p), set()
    with machine.edited(old, new):
        for seed in range(8):
            try:
                got = run(p, seed)
            except RuntimeError as error:
                noticed.add(str(error))
            else:
                noticed |= {OTHER_RESULTS for name, v in got.items() if not torch.equal(v, right[name])}
            if any(sign in what for what in noticed):
                break
    assert any(sign in what for what in noticed), noticed
    for name, v in run(p).items():
        assert torch.equal(v, right[name])
