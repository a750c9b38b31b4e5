"""Which dtypes a loss takes and gives: of embeddings, scales and labels, and inside autocast."""

import pytest
import torch
from calls import BF16, DOUBLE, SINGLE, through
from conftest import EVERY

import flashcl
from flashcl.contract import LOSSES, case, evaluate

pytestmark = pytest.mark.usefixtures("poison", "small_tiles")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend, dtype", EVERY)
def test_dtypes_of_results(backend, dtype, loss):
    c = case(loss, "init", n=5).to(dtype)
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    for name, v in evaluate(through(c, backend), c).items():
        if name.startswith("grad"):
            leaf = c.tensors[name.removeprefix("grad ")]
            assert (v.dtype, v.shape) == (leaf.dtype, leaf.shape)
        else:
            assert v.dtype == wide


@pytest.mark.parametrize("other", [SINGLE, DOUBLE, BF16])
def test_scalars_of_any_dtype_and_form(backend, other):
    """A scale is a number, 0-d or of one element, in any dtype: its gradient has its dtype and shape."""
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    expected = flashcl.siglip(x, y, logit_scale=2.0, logit_bias=-0.5, backend=backend)
    for shape in ((), (1,), (1, 1)):
        t, b = (torch.full(shape, v, dtype=other, requires_grad=True) for v in (2.0, -0.5))
        loss = flashcl.siglip(x, y, logit_scale=t, logit_bias=b, backend=backend)
        dt, db = torch.autograd.grad(loss, (t, b))
        assert torch.equal(loss, expected)
        assert (dt.dtype, dt.shape, db.dtype, db.shape) == (other, shape, other, shape)


def test_labels_are_any_integers(backend):
    """Of any integer dtype, beyond int32, and equal modulo 2^32: they are only compared."""
    c = case("sup_con", "init", n=21).to(SINGLE)
    labels, z = c.options["labels"], c.tensors["z"]
    expected = flashcl.sup_con(z, labels, backend=backend)
    for other in (labels.int(), labels.short(), labels.to(torch.uint8), labels * 2**40 - 7, labels * 2**33 - 2**34, -labels):
        assert torch.equal(flashcl.sup_con(z, other, backend=backend), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(backend, loss):
    """Inside autocast float32 embeddings are computed on in bfloat16; gradients come back in float32, and not rounded."""
    c = case(loss, "init", n=21).to(SINGLE)

    def inside(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return through(c, backend)(**arguments)

    outside = evaluate(through(c, backend), c.to(BF16))
    for name, v in evaluate(inside, c).items():
        assert v.dtype == SINGLE
        torch.testing.assert_close(v.to(outside[name].dtype), outside[name], rtol=0, atol=0)
        assert v.numel() == 1 or not name.startswith("grad") or not torch.equal(v, v.to(BF16).float())


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_of_the_other_16_bits(backend, loss):
    """float16 embeddings inside autocast of bfloat16 are computed on as that; gradients come back in float16."""
    c = case(loss, "init", n=21).to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(through(c, backend), c)
    for name, v in evaluate(through(c, backend), c.to(BF16)).items():
        if not name.startswith("grad"):
            torch.testing.assert_close(got[name], v, rtol=0, atol=0)
        elif v.dtype == BF16:
            assert got[name].dtype == torch.float16
            torch.testing.assert_close(got[name].to(BF16), v, rtol=2**-7, atol=1e-6)  # rounded twice


def test_autocast_of_towers_of_two_dtypes(backend):
    """A tower under autocast beside cached float32 embeddings: both are cast, as x @ y.T would cast them."""
    x, y = (v.float() for v in case("info_nce", "init").tensors.values() if v.dim() == 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
        of_views = flashcl.nt_xent(x.half(), y.bfloat16(), temperature=0.1, backend=backend)
    assert torch.equal(got, flashcl.info_nce(x.bfloat16(), y.bfloat16(), temperature=0.1, backend=backend))
    assert torch.equal(of_views, flashcl.nt_xent(x.half().bfloat16(), y.bfloat16(), temperature=0.1, backend=backend))
    with pytest.raises(TypeError, match="y must have the dtype of x"):
        flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
    y = y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = flashcl.info_nce(x.bfloat16(), y, temperature=0.1, backend=backend)
    (dy,) = torch.autograd.grad(loss, y)
    assert not torch.equal(dy, dy.bfloat16().float())


def test_unusable_backends_say_why():
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        flashcl.info_nce(x, x, temperature=1.0, backend="cuda")
    with pytest.raises(RuntimeError, match="'triton' cannot serve torch.float64"):
        flashcl.info_nce(x.double(), x.double(), temperature=1.0, backend="triton")
