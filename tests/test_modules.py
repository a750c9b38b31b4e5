"""The losses as modules: published initialisations, clamp, what they compute."""

import math

import pytest
import torch
from torch.nn import functional as F

import flashcl


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(12, 8, generator=generator), dim=1) for _ in range(2)]


def test_clip_initialisation(views):
    loss = flashcl.InfoNCELoss()
    assert [name for name, _ in loss.named_parameters()] == ["log_logit_scale"]
    assert loss.logit_scale.item() == pytest.approx(1 / 0.07)
    assert torch.equal(loss(*views), flashcl.info_nce(*views, logit_scale=loss.logit_scale))


def test_siglip_initialisation(views):
    loss = flashcl.SigLIPLoss()
    assert sorted(name for name, _ in loss.named_parameters()) == ["log_logit_scale", "logit_bias"]
    assert loss.logit_scale.item() == pytest.approx(10.0) and loss.logit_bias.item() == -10.0
    loss(*views).backward()
    assert loss.log_logit_scale.grad.abs() > 0 and loss.logit_bias.grad.abs() > 0


@pytest.mark.parametrize("make, temperature", [(flashcl.NTXentLoss, 0.5), (flashcl.SupConLoss, 0.07)])
def test_fixed_temperature_is_state_but_no_parameter(make, temperature):
    loss = make()
    assert list(loss.parameters()) == [] and list(loss.state_dict()) == ["log_logit_scale"]
    assert 1 / loss.logit_scale.item() == pytest.approx(temperature)
    assert len(list(make(learnable=True).parameters())) == 1


def test_nt_xent_and_sup_con_compute_the_functions(views):
    labels = torch.arange(12) // 3
    assert flashcl.NTXentLoss(0.2)(*views).item() == pytest.approx(flashcl.nt_xent(*views, temperature=0.2).item())
    expected = flashcl.sup_con(views[0], labels, temperature=0.1).item()
    assert flashcl.SupConLoss(0.1)(views[0], labels).item() == pytest.approx(expected)


FUNCTION_OF = {
    flashcl.InfoNCELoss: lambda m, x, y, **o: flashcl.info_nce(x, y, logit_scale=m.logit_scale, **o),
    flashcl.SigLIPLoss: lambda m, x, y, **o: flashcl.siglip(
        x, y, logit_scale=m.logit_scale, logit_bias=m.logit_bias, **o
    ),
    flashcl.NTXentLoss: lambda m, x, y, **o: flashcl.nt_xent(x, y, temperature=1 / m.logit_scale, **o),
    flashcl.SupConLoss: lambda m, z, c, **o: flashcl.sup_con(z, c, temperature=1 / m.logit_scale, **o),
}


@pytest.mark.parametrize("options", [{}, dict(normalize=True), dict(reduction="none"), dict(reduction="sum")], ids=str)
@pytest.mark.parametrize("make", FUNCTION_OF)
def test_a_module_is_its_function(make, options, views):
    module, (x, y) = make(**options), (3 * v for v in views)
    y = torch.arange(12) // 3 if make is flashcl.SupConLoss else y
    assert torch.equal(module(x, y), FUNCTION_OF[make](module, x, y, **options))


def test_numbers_come_back_after_a_beginning_on_meta():
    """Deferred initialisation, as FSDP2 does it."""
    for make in FUNCTION_OF:
        for learnable in (True, False):
            with torch.device("meta"):
                module = make(learnable=learnable)
            module.to_empty(device="cpu").apply(lambda m: m.reset_parameters())
            assert module.state_dict() == make(learnable=learnable).state_dict()


def test_what_is_fixed_is_no_parameter():
    for make in FUNCTION_OF:
        assert list(make(learnable=False).parameters()) == []
    assert sorted(flashcl.SigLIPLoss(learnable=False).state_dict()) == ["log_logit_scale", "logit_bias"]


def test_scale_is_at_most_100_and_can_come_back(views):
    """Pairs that contradict the labels lower the scale: the limit must not stop that gradient, only the one that raises it."""
    x, _ = views
    loss = flashcl.InfoNCELoss()
    with torch.no_grad():
        loss.log_logit_scale.fill_(math.log(120.0))
    assert loss.logit_scale.item() == pytest.approx(100.0) and "logit_scale=100 " in repr(loss)
    loss(x, x).backward()
    assert loss.log_logit_scale.grad == 0
    loss(x, -x).backward()
    assert loss.log_logit_scale.grad > 0
    torch.optim.SGD(loss.parameters(), lr=0.01).step()
    assert loss.logit_scale.item() < 100.0


def test_below_its_limit_the_scale_is_free():
    x = torch.eye(8)  # the scale should rise
    loss = flashcl.InfoNCELoss(0.5)
    (got,) = torch.autograd.grad(loss(x, x), loss.log_logit_scale)
    free = loss.log_logit_scale.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(flashcl.info_nce(x, x, logit_scale=free.exp()), free)
    assert got == want < 0


def test_reading_the_scale_changes_nothing(views):
    """Neither a checkpoint that is evaluated nor what autograd has saved of the parameter."""
    loss = flashcl.InfoNCELoss()
    loss.load_state_dict({"log_logit_scale": torch.tensor(math.log(150.0))})
    penalty = loss.log_logit_scale**2
    assert loss.logit_scale.item() == pytest.approx(100.0)
    (loss(*views) + penalty).backward()
    assert loss.state_dict()["log_logit_scale"].exp().item() == pytest.approx(150.0)


def test_a_temperature_is_what_it_was_set_to(views):
    with pytest.raises(ValueError, match="max_logit_scale must be at least the scale to begin with, 200"):
        flashcl.InfoNCELoss(0.005)
    for loss in (flashcl.InfoNCELoss(0.005, learnable=False), flashcl.InfoNCELoss(0.005, max_logit_scale=None)):
        assert loss(*views).item() == pytest.approx(flashcl.info_nce(*views, temperature=0.005).item())
    for make in (flashcl.InfoNCELoss, flashcl.NTXentLoss, flashcl.SupConLoss):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
            make(0.0)
    for make in FUNCTION_OF:
        for value in (math.inf, math.nan):
            with pytest.raises(ValueError, match=f"must be positive and finite, got {value}"):
                make(value)
    with pytest.raises(ValueError, match="logit_scale must be positive and finite, got -1"):
        flashcl.SigLIPLoss(-1.0)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: flashcl.InfoNCELoss("0.1"), "temperature must be a float"),
        (lambda: flashcl.NTXentLoss(None), "temperature must be a float"),
        (lambda: flashcl.SupConLoss(True), "temperature must be a float"),
        (lambda: flashcl.NTXentLoss(1e-320), "1 / temperature must be positive and finite"),
        (lambda: flashcl.InfoNCELoss(max_logit_scale="100"), "max_logit_scale must be a float"),
        (lambda: flashcl.SigLIPLoss(logit_bias=None), "logit_bias must be a float"),
        (lambda: flashcl.NTXentLoss(learnable="no"), "learnable must be one of True, False"),
        (lambda: flashcl.InfoNCELoss(symmetric="x"), "symmetric must be one of True, False"),
        (lambda: flashcl.SupConLoss(normalize="no"), "normalize must be one of True, False"),
        (lambda: flashcl.InfoNCELoss(max_logit_scale=math.nan), "max_logit_scale must be at least"),
        (lambda: flashcl.InfoNCELoss(reduction="max"), "reduction must be one of"),
        (lambda: flashcl.NTXentLoss(backend="tpu"), "backend must be one of"),
    ],
)
def test_arguments_of_a_module_are_looked_at_when_it_is_made(make, what):
    with pytest.raises((TypeError, ValueError), match=what):
        make()


def test_options_go_to_the_function(views):
    x, y = views
    loss = flashcl.InfoNCELoss(symmetric=False, reduction="none", normalize=True)
    expected = flashcl.info_nce(
        3 * x, y, logit_scale=loss.logit_scale, symmetric=False, reduction="none", normalize=True
    )
    assert loss(3 * x, y).shape == (12,) and torch.equal(loss(3 * x, y), expected)
    assert "learnable" in repr(loss) and "symmetric=False" in repr(loss)


@pytest.mark.parametrize("make", [flashcl.InfoNCELoss, flashcl.SigLIPLoss, flashcl.NTXentLoss, flashcl.SupConLoss])
def test_options_are_checked_when_made_and_shown(make):
    with pytest.raises(TypeError, match="reduction_"):
        make(reduction_="mean")
    with torch.device("meta"):
        assert "logit_scale=?" in repr(make())


@pytest.mark.parametrize("scale", [20.0, 120.0])
def test_a_module_is_one_graph(scale, views):
    loss = flashcl.InfoNCELoss()
    with torch.no_grad():
        loss.log_logit_scale.fill_(math.log(scale))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(call(views[0], -views[0]), loss.log_logit_scale)[0] for call in (loss, compiled)]
    assert torch.equal(*gradients) and gradients[0] != 0


def test_modules_train():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, generator=generator)
    y = torch.nn.Parameter(torch.randn(32, 16, generator=generator))
    loss = flashcl.InfoNCELoss(normalize=True)
    optimizer = torch.optim.Adam([y, *loss.parameters()], lr=0.05)
    first = loss(x, y).item()
    for _ in range(50):
        optimizer.zero_grad()
        value = loss(x, y)
        value.backward()
        optimizer.step()
    assert value.item() < 0.1 * first and loss.logit_scale.item() != pytest.approx(1 / 0.07)
