"""float32 products by oneDNN (flashcl/backends/onednn.py), on any CPU: the operator is there, only its speed differs."""

import platform

import pytest
import torch
from calls import SINGLE

import flashcl
from flashcl.backends import gemm, onednn
from flashcl.contract import LOSSES, case, violations

OPERATOR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),  # PyTorch's, whenever these flags are set
]


@pytest.fixture
def taken(monkeypatch):
    """oneDNN multiplies everything that is float32, and this is what it was handed."""
    calls = []

    def watched(a, weight, *rest):
        calls.append((a, weight))
        return OPERATOR(a, weight, *rest)

    monkeypatch.setattr(onednn, "_available", lambda: True)
    monkeypatch.setattr(onednn, "_GRAIN", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched, raising=False)
    return calls


def test_the_operator_is_the_one_that_is_called():
    """PyTorch does not promise it: where this fails, products are right, and by MKL."""
    assert str(OPERATOR.default._schema) == onednn._SCHEMA


# ---- when


CPU = {"vendor_id": "AuthenticAMD", "cpu family": "26"}


@pytest.mark.parametrize(
    "fields, zen5",
    [(CPU, True), (CPU | {"cpu family": "25"}, False), (CPU | {"vendor_id": "GenuineIntel"}, False), ({}, False)],
)
@pytest.mark.parametrize("avx", ["AVX512", "AVX2"])
@pytest.mark.parametrize("schema", [onednn._SCHEMA, "another"])
def test_which_cpus(monkeypatch, fields, zen5, avx, schema):
    monkeypatch.setattr(onednn, "processor", lambda: fields)
    monkeypatch.setattr(onednn, "_SCHEMA", schema)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: avx)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn._available.__wrapped__() == (zen5 and avx == "AVX512" and schema != "another")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not onednn._available.__wrapped__()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere Linux gives no name")
def test_a_processor_has_a_name(monkeypatch):
    assert "model name" in onednn.processor()

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(onednn.Path, "read_text", refuse)
    assert onednn.processor() == {}


def test_which_products(monkeypatch):
    monkeypatch.setattr(onednn, "_available", lambda: True)
    a, b = torch.ones(128, 129), torch.ones(129, 130)
    assert onednn.faster(a, b)
    assert not any(onednn.faster(*narrow) for narrow in ((a[:127], b), (a[:, :127], b[:127]), (a, b[:, :127])))
    assert not onednn.faster(a.double(), b.double()) and not onednn.faster(a.bfloat16(), b.bfloat16())
    assert not onednn.faster(a.to("meta"), b.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.faster(a, b)
    monkeypatch.setattr(onednn, "_available", lambda: False)
    assert not onednn.faster(a, b)


# ---- what


def strided(kind: str, rows: int, cols: int) -> torch.Tensor:
    if kind == "rows of a wider matrix":
        return torch.randn(rows, cols + 3)[:, :cols]
    if kind == "every other column":
        return torch.randn(rows, 2 * cols)[:, ::2]
    if kind == "one row, again and again":
        return torch.randn(1, cols).expand(rows, cols)
    return torch.randn(cols, rows).T if kind == "transposed" else torch.randn(rows, cols)


KINDS = ["as made", "transposed", "rows of a wider matrix", "every other column", "one row, again and again"]


@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize("kind_a", KINDS)
@pytest.mark.parametrize("r, k, c", [(1, 1, 1), (33, 17, 65), (65, 400, 33), (3, 193, 3), (32, 64, 48)])
@pytest.mark.parametrize("grain", [1, 16])
def test_products(taken, monkeypatch, grain, kind_a, kind_b, r, k, c):
    monkeypatch.setattr(onednn, "_GRAIN", grain)
    a, b = strided(kind_a, r, k), strided(kind_b, k, c)
    exact = a.double() @ b.double()
    out, acc = torch.full((r, c), torch.nan), torch.ones(r, c)
    gemm.mm(a, b, out=out)
    gemm.addmm_(acc, a, b)
    bound = 1e-6 * (a.double().abs() @ b.double().abs())
    assert ((out - exact).abs() <= bound).all() and ((acc - 1 - exact).abs() <= bound + 1e-6).all()
    gemm.addmm_(out, a, b, first=True)
    assert ((out - exact).abs() <= bound).all()
    # With other strides the operator is right, and 500 times as slow.
    assert bool(taken) == (min(r, k, c) >= grain) and all(w.is_contiguous() or w.T.is_contiguous() for _, w in taken)


def test_many_sizes_are_few_shapes(monkeypatch, taken):
    """oneDNN keeps what it made for each."""
    monkeypatch.setattr(onednn, "_GRAIN", 128)
    for n in range(256, 384, 5):
        x, y = (torch.randn(n, 160).requires_grad_() for _ in range(2))
        flashcl.info_nce(x, y, temperature=10.0).backward()
    assert len({(a.shape, w.shape) for a, w in taken}) <= 3


def test_operands_of_16_bits_are_widened_first(taken):
    a, b = torch.randn(9, 30).bfloat16(), torch.randn(30, 8).bfloat16()
    out = torch.empty(9, 8)
    gemm.mm(a, b, out=out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert taken[0][0].dtype == SINGLE


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_it_belongs(taken, value):
    a, b = torch.rand(40, 200) + 1, torch.rand(200, 30) + 1
    a[3, 7], b[150, 4] = value, value
    out = torch.empty(40, 30)
    gemm.mm(a, b, out=out)
    torch.testing.assert_close(out, a @ b, equal_nan=True)


def in_one_go(a, b):
    """Every element summed up from the first product to the last, as oneDNN 3.12 does and that of PyTorch 2.7 does not."""
    total = torch.zeros(len(a), b.shape[1])
    for k in range(len(b)):
        total.addr_(a[:, k], b[k])
    return total


def test_the_sums_are_no_worse_than_those_of_blocks(taken):
    a, b = torch.randn(100, 1536) + 0.5, torch.randn(1536, 90) + 0.5
    exact = a.double() @ b.double()

    def error(v):
        return (v - exact).square().mean().sqrt()

    blocks = sum(in_one_go(p, q) for p, q in zip(a.split(192, 1), b.split(192)))
    assert error(onednn.product(a, b)) <= 1.2 * error(blocks) < 0.5 * error(in_one_go(a, b))


def test_the_same_bits(taken):
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    once = onednn.product(a, b)
    assert all(torch.equal(onednn.product(a, b), once) for _ in range(100))


# ---- the losses


@pytest.mark.parametrize("regime", ["init", "converged", "cone", "t=0.005", "large", "unnormalised"])
@pytest.mark.parametrize("loss", LOSSES)
def test_contract(taken, loss, regime):
    """Long sums, in which the order of additions shows."""
    assert violations(case(loss, regime, n=300, d=768), SINGLE, backend="torch") == []
    assert taken


@pytest.mark.parametrize("loss, regime", [("nt_xent", "large"), ("sup_con", "converged")])
def test_the_contract_sees_sums_in_one_go(taken, monkeypatch, loss, regime):
    monkeypatch.setattr(onednn, "product", in_one_go)
    assert violations(case(loss, regime, n=300, d=768), SINGLE, backend="torch")


def test_a_step_with_it_and_without(taken):
    x, y = (torch.nn.functional.normalize(torch.randn(1500, 96), dim=1).requires_grad_() for _ in range(2))

    def step():
        x.grad = y.grad = None
        loss = flashcl.info_nce(x, y, temperature=0.05)
        loss.backward()
        return loss.detach(), x.grad, y.grad

    ours = step()
    assert taken
    with torch.backends.mkldnn.flags(enabled=False):
        for a, b in zip(ours, step()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
