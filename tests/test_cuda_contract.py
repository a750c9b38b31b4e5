"""The numeric contract of every loss over the CUDA backend, without a GPU, and what tensor cores cut off of a sum.

The kernels are emulated on the CPU, or run as PTX on a simulated GPU, as in test_cuda_host.py.
"""

import dataclasses

import numpy
import pytest
import torch

pytest.importorskip("flashcl._C", reason="flashcl._C was not built: no nvcc, or no CUTLASS headers")

import ptx
from calls import BF16, DOUBLE, HALF, KNOWN
from world import run_world

import flashcl
from flashcl.backends import cuda as backend
from flashcl.contract import LOSSES, REGIMES, case, check, evaluate, violations
from flashcl.engine import ops

DTYPES = [BF16, HALF]

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["emulated", "ptx"], scope="module", autouse=True)
def kernels(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "unusable", lambda device, dtype: None)
        patch.setattr(backend, "_LOWEST_STRIP", backend._C.TILE)  # small problems in several strips, as large ones are
        if request.param == "ptx":
            if isinstance(machine := ptx.machine(), str):
                pytest.skip(machine)
            patch.setattr(backend, "_C", machine.module)
        yield request.param


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(dtype, loss, regime, request):
    """The numeric contract of every loss, on the cases that every backend has to pass."""
    if reason := KNOWN.get((loss, regime, dtype)):
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))
    assert violations(case(loss, regime, n=40), dtype, backend="cuda", device="cpu") == []


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_of_several_tiles(dtype, loss):
    assert violations(case(loss, "init", n=200, m=300, d=24), dtype, backend="cuda", device="cpu") == []


def cut_off_sum(u, v):
    """<u, v> of each row, 16 terms at a time, toward zero: (N,) float64"""
    total = numpy.zeros(len(u), numpy.float32)
    for k in range(0, u.shape[1], 16):
        wide = total + (u[:, k : k + 16] * v[:, k : k + 16]).sum(1)
        total = wide.astype(numpy.float32)
        total = numpy.where(abs(total) > abs(wide), numpy.nextafter(total, numpy.float32(0)), total)
    return torch.from_numpy(total).double()


@pytest.mark.parametrize("N, shift, step", [(1, 0, 1), (200, 0, 1), (300, 100, 1), (1500, 0, 2)])
def test_what_tiles_cut_off_of_products_is_measured(N, shift, step):
    """ops.tile_ratio: on average, of the partners on the right, and of every step-th row where there are many."""
    x, y = (1 + 0.3 * torch.randn(N, 512, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    x, y = x.half(), y.half()
    got = ops.tile_ratio(x, y, backend.partner_products(x, y, shift), shift, "cuda")
    u, v = (w.double().numpy() for w in (x[: N - shift : step], y[shift::step]))
    exact, in_tiles = (torch.from_numpy(u) * torch.from_numpy(v)).sum(1), cut_off_sum(u, v)
    expected = (in_tiles / exact).mean()
    assert 2e-7 < 1 - expected < 2e-6  # of 32 steps, half a unit in the last place of a part of the sum each
    assert got.shape == (1,) and abs(got.item() - expected) < 1.5e-8 + 6e-8 / N**0.5  # products are in bits, and rounded


def test_nothing_is_cut_off_where_there_is_nothing():
    x = torch.zeros(3, 8, dtype=BF16)
    x[2] = torch.inf
    for rows in range(4):
        products = backend.partner_products(x[:rows], x, 0)
        assert ops.tile_ratio(x[:rows], x, products, 0, "cuda").item() == 1.0


@pytest.mark.parametrize("loss", ["info_nce", "sup_con"])
def test_the_scale_does_not_feel_that_tensor_cores_cut_off_sums(loss, kernels):
    """Of embeddings with a large mean, products in tiles are 1e-6 too small, and what a temperature gains by them cancels."""
    if kernels == "ptx":
        pytest.skip("slow there, and it cuts off what the emulation does")
    found = check(case(loss, "cone", n=256, d=768), HALF, backend="cuda", device="cpu")
    (of_scale,) = (f for f in found if f.quantity in ("grad temperature", "grad logit_scale") and f.bound == "tight")
    assert of_scale.error < 0.2 * of_scale.allowed


def nearly_balanced():
    """SigLIP near the optimum of its bias, where negatives and positives cancel; of embeddings with a large mean."""
    c = case("siglip", "cone", n=256, d=768)
    return dataclasses.replace(c, tensors=c.tensors | dict(logit_bias=torch.tensor(-18.4, dtype=DOUBLE)))


def test_siglip_makes_up_for_what_tensor_cores_cut_off(kernels):
    """Logits 1e-5 too small would be a quarter of the bounds."""
    if kernels == "ptx":
        pytest.skip("slow there, and it cuts off what the emulation does")
    found = check(nearly_balanced(), BF16, backend="cuda", device="cpu")
    assert [f for f in found if not f.holds] == []
    cancel = [f for f in found if f.quantity in ("grad logit_bias", "grad logit_scale") and f.bound == "tight"]
    assert len(cancel) == 2 and all(f.error < 0.05 * f.allowed for f in cancel)


def siglip_of_a_rank(rank, world):
    """Its gradients of the scale and of the bias: those of the whole batch are the mean over ranks."""
    backend.unusable = lambda device, dtype: None
    c = nearly_balanced().to(BF16)
    leaves = {k: v[rank::world] if v.dim() == 2 else v.requires_grad_() for k, v in c.tensors.items()}
    flashcl.siglip(**leaves, backend="cuda", group=torch.distributed.group.WORLD).backward()
    return [leaves[k].grad.item() for k in ("logit_scale", "logit_bias")]


def siglip_of_the_rows_of_a_rank(rank, world):
    backend.unusable = lambda device, dtype: None
    c = nearly_balanced().to(BF16)
    own = {k: v[rank::world] if v.dim() == 2 else v for k, v in c.tensors.items()}
    where = dict(backend="cuda", group=torch.distributed.group.WORLD)
    return flashcl.siglip(**own, reduction="none", **where).double().tolist()


def test_siglip_makes_up_for_it_over_ranks(kernels):
    if kernels == "ptx":
        pytest.skip("the emulation is what other processes load")
    rows = torch.tensor(run_world(2, siglip_of_the_rows_of_a_rank), dtype=DOUBLE).T.flatten()
    c = nearly_balanced().to(BF16).to(DOUBLE)
    assert (rows - flashcl.reference.siglip(**c.tensors, reduction="none")).mean().abs() < 4e-6
    got = torch.tensor(run_world(2, siglip_of_a_rank)).mean(0)
    truth = evaluate(flashcl.reference.siglip, nearly_balanced().to(BF16).to(DOUBLE))
    for value, name in zip(got, ("logit_scale", "logit_bias")):
        assert abs(value - truth[f"grad {name}"]) < 4e-6  # 1.3e-5 with the products as they are
