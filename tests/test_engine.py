"""The boundary to PyTorch: registered operators, torch.compile, second derivatives, memory."""

import functools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flashcl
import flashcl.backends.torch
from flashcl import reference
from flashcl.engine import dispatch, ops, positives


def leaf(n=9, d=5, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


CALLS = {
    "info_nce": lambda x, y, t, **at: flashcl.info_nce(x, y, temperature=t, **at),
    "info_nce one-way": lambda x, y, t, **at: flashcl.info_nce(x, y, temperature=t, symmetric=False, reduction="none", **at).sum(),
    "siglip": lambda x, y, t, **at: flashcl.siglip(x, y, logit_scale=1 / t, logit_bias=-t, **at),
    "siglip none": lambda x, y, t, **at: flashcl.siglip(x, y, logit_scale=1 / t, logit_bias=-t, reduction="none", **at).sum(),
    "nt_xent": lambda x, y, t, **at: flashcl.nt_xent(x, y, temperature=t, **at),
    "sup_con": lambda x, y, t, **at: flashcl.sup_con(x + y, torch.arange(x.shape[0]) // 3, temperature=t, **at),
    "logsumexp": lambda x, y, t, **at: sum(v.sum() for v in flashcl.similarity_logsumexp(x, y, logit_scale=t, **at)),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_as_one_graph_it_is_the_same(name):
    """Eager and compiled agree bit by bit, backward too, and another N does not compile again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=True)
    graphs = []
    for n in (9, 18, 27):
        x, y, t = leaf(n), leaf(n, seed=1), scalar(0.3)
        expected, got = CALLS[name](x, y, t), compiled(x, y, t)
        assert torch.equal(expected, got)
        for a, b in zip(torch.autograd.grad(expected, (x, y, t)), torch.autograd.grad(got, (x, y, t))):
            assert torch.equal(a, b)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2] <= 2, graphs  # the second size may show Dynamo that a size is not a constant


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_exported_without_gradients_it_takes_any_number_of_rows(name, strict):
    class Module(torch.nn.Module):
        def forward(self, x, y, t):
            return CALLS[name](x, y, t)

    x, y, t = leaf(9), leaf(9, seed=1), scalar(0.3)
    rows = {0: torch.export.Dim("rows", min=2, max=10_000)}
    with torch.no_grad():
        exported = torch.export.export(Module(), (x, y, t), dynamic_shapes=(rows, rows, None), strict=strict).module()
        for n in (9, 30):
            x, y = leaf(n), leaf(n, seed=1)
            assert torch.equal(exported(x, y, t), CALLS[name](x, y, t))


@pytest.mark.parametrize("name", ["info_nce", "siglip", "nt_xent", "sup_con", "logsumexp"])
def test_a_float_that_changes_is_no_new_graph(name):
    """A temperature with a schedule: the first change may show Dynamo that it is not a constant."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = CALLS[name]
    if name == "siglip":  # PyTorch 2.11 makes a constant of t in 1 / t
        call = lambda x, y, t: flashcl.siglip(x, y, logit_scale=t, logit_bias=t)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, y = leaf(), leaf(seed=1)
    for step in range(4):
        t = 0.1 + 0.05 * step
        assert torch.equal(compiled(x, y, t), call(x, y, t))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["info_nce", "siglip", "sup_con"])
def test_a_backend_may_be_named_in_one_graph(name, backend):
    torch._dynamo.reset()
    call = functools.partial(CALLS[name], backend=backend)
    x, y, t = leaf(dtype=torch.float32), leaf(seed=1, dtype=torch.float32), scalar(0.3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(x, y, t), compiled(x, y, t))


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: flashcl.info_nce(a, a, temperature=0.3),
        lambda a, b: flashcl.siglip(a, a, logit_scale=1.0, logit_bias=0.0),
        lambda a, b: sum(v.sum() for v in flashcl.similarity_logsumexp(a, a, row_bias=b, col_bias=b, exclude="diagonal")),
    ],
)
def test_one_tensor_twice_in_one_graph(call):
    a, b = leaf(), leaf(9, 1)[:, 0].detach().requires_grad_()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(a, b)
    expected = call(a, b)
    assert torch.equal(got, expected)
    for p, q in zip(torch.autograd.grad(got, (a, b), allow_unused=True), torch.autograd.grad(expected, (a, b), allow_unused=True)):
        assert p is q is None or torch.equal(p, q)


def test_a_backend_that_cannot_serve_says_so_in_a_graph_too():
    compiled = torch.compile(functools.partial(CALLS["info_nce"], backend="cuda"), backend="aot_eager")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
        compiled(leaf(), leaf(seed=1), scalar(0.3))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_default_dtype_does_not_matter(name, default, backend):
    def run():
        x, y = leaf(40, 8, dtype=torch.float32), leaf(40, 8, seed=1, dtype=torch.float32)
        t = torch.tensor(0.3, dtype=torch.float32, requires_grad=True)
        value = CALLS[name](x, y, t, backend=backend)
        return value.detach(), *torch.autograd.grad(value, (x, y, t))

    expected, before = run(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected))


def test_operators_keep_their_word(monkeypatch):
    """Schema, fake implementation and aliasing of each operator, with arguments as the losses pass them."""
    seen = []
    operators = [(m, name) for m in (ops, positives) for name, op in vars(m).items() if isinstance(op, torch._ops.OpOverload)]
    for module, name in operators:
        real = getattr(module, name)
        copied = lambda args: tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in args)  # noqa: E731
        monkeypatch.setattr(module, name, lambda *args, real=real: (seen.append((real, copied(args))), real(*args))[1])
    for call in CALLS.values():
        call(leaf(), leaf(seed=1), scalar(0.3)).backward()
    CALLS["info_nce"](leaf(dtype=torch.bfloat16), leaf(seed=1, dtype=torch.bfloat16), scalar(0.3)).backward()
    checked = set()
    for op, args in seen:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        checked.add(op._schema.name)
    engine = {"sweep", "sweep_softplus", "grad", "partner_products", "tile_ratio", "finish", "finish_"}
    labels = {"numbered", "label_sums", "label_products", "add_labels_"}
    assert checked == {f"flashcl::{name}" for name in engine | labels}


@pytest.mark.parametrize("name", CALLS)
def test_selective_checkpoints(name):
    """What a checkpoint keeps of an operator is right when it is used again, or it is an error: siglip writes to what grad gave."""
    x, y, t = leaf(), leaf(seed=1), scalar(0.3)
    expected = torch.autograd.grad(CALLS[name](x, y, t), (x, y, t))
    for operator in (torch.ops.flashcl.grad.default, torch.ops.flashcl.sweep.default, torch.ops.flashcl.partner_products.default):
        keep = functools.partial(create_selective_checkpoint_contexts, [operator])
        loss = checkpoint(CALLS[name], x, y, t, use_reentrant=False, context_fn=keep)
        if name == "siglip" and operator is torch.ops.flashcl.grad.default:
            with pytest.raises(RuntimeError, match="mutated"):
                loss.backward()
            continue
        for got, want in zip(torch.autograd.grad(loss, (x, y, t)), expected):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_may_be_watched(name):
    """By hooks that see every argument of every operator, and which of them it writes to."""
    x, y, t = leaf(), leaf(seed=1), scalar(0.3)
    expected = torch.autograd.grad(CALLS[name](x, y, t), (x, y, t))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for got, want in zip(torch.autograd.grad(CALLS[name](x, y, t), (x, y, t)), expected):
            assert torch.equal(got, want)


@pytest.mark.parametrize("loss", ["info_nce", "siglip", "nt_xent"])
def test_one_tensor_as_both_towers(loss):
    """Then the gradient of x is that of both, and S is no triangle all the same."""
    options = dict(logit_scale=2.0) if loss != "nt_xent" else {}
    options |= dict(logit_bias=-1.0) if loss == "siglip" else {}
    for module in (flashcl, reference):
        x = leaf(11)
        getattr(module, loss)(x, x, **options).backward()
        got = x.grad if module is flashcl else got
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_no_gradient_is_made_where_none_is_wanted(name, monkeypatch):
    x, y, t = leaf(), leaf(seed=1), scalar(0.3)
    expected = CALLS[name](x, y, t)
    monkeypatch.setattr(ops, "grad", lambda *args, **options: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert torch.allclose(CALLS[name](x, y, t), expected)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name):
    """Refused, not silently dropped: a gradient penalty would otherwise have no effect."""
    x, y, t = leaf(), leaf(seed=1), scalar(0.3)
    with pytest.raises(NotImplementedError, match="first derivatives only.*flashcl.reference"):
        torch.autograd.grad(CALLS[name](x, y, t), (x, y, t), create_graph=True)


MEMORY = """
import sys, torch, flashcl, flashcl.backends.torch
from flashcl.cli import memory  # not getrusage: a new process inherits its parent's maximum
loss, n, flashcl.backends.torch._KEPT_BYTES = sys.argv[1], *map(int, sys.argv[2:4])
x, y = (torch.nn.functional.normalize(torch.randn(n, 32), dim=1).requires_grad_() for _ in range(2))
calls = dict(
    info_nce=lambda x, y: flashcl.info_nce(x, y, temperature=0.07),
    siglip=lambda x, y: flashcl.siglip(x, y, logit_scale=10.0, logit_bias=-10.0),
    nt_xent=lambda x, y: flashcl.nt_xent(x, y),
    sup_con=lambda x, y: flashcl.sup_con(x, torch.arange(len(x)) // 4),
)
calls[loss](x[:2048], y[:2048]).backward()  # libraries allocate on first use
before = memory.reset_peak(x.device)
logits = torch.ones(len(x), len(x)) if sys.argv[4:] else None
calls[loss](x, y).backward()
print(memory.read_peak(x.device) - before)
"""


def grown(loss: str, kept: int, *logits: str) -> int:
    """Bytes beside the embeddings, at the peak."""
    words = [sys.executable, "-c", MEMORY, loss, "12288", str(kept), *logits]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("kept", [0, flashcl.backends.torch._KEPT_BYTES])
@pytest.mark.parametrize("loss", ["info_nce", "siglip", "nt_xent", "sup_con"])
def test_memory_does_not_hold_the_logits(loss, kept):
    """12,288 rows: the logits alone would be 576 MiB in float32. A few tiles, and the products that are kept for the backward."""
    more = grown(loss, kept)
    assert more < kept + 48 * 2**20, f"{more / 2**20:.0f} MiB more"


def test_logits_that_are_held_would_be_seen():
    own = torch.ones(2**28)  # 1 GiB of this process, which must not hide what its child takes
    assert grown("siglip", 0, "logits") > 500 * 2**20 and len(own) == 2**28


# ---- what the torch backend saves


@pytest.fixture
def torch_backend(monkeypatch):
    """In tiles of 16 x 16."""
    module = dispatch.load("torch")
    monkeypatch.setattr(module, "_CPU_TILE", (16, 16))
    return module


class Watch(TorchDispatchMode):
    """The largest tensor that is made, not counting those given, and the calls of exp on a tile."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.largest, self.exps = {v.untyped_storage().data_ptr() for v in given}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for v in (v for v in tree_leaves(out) if isinstance(v, torch.Tensor)):
            if v.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, v.numel())
        self.exps += function is torch.ops.aten.exp_.default and args[0].dim() == 2
        return out


@pytest.mark.parametrize("kept, work", [(1.0, 6), (0.5, 7), (0.0, 8)])
def test_products_that_are_kept_are_not_computed_again(kept, work, torch_backend, monkeypatch):
    """6 N M D where all are kept, 8 where none is; the bits are the same."""
    n, m, d, done = 32, 64, 8, []
    monkeypatch.setattr(torch_backend, "_KEPT_BYTES", int(kept * n * m * 8))
    for name, operands in (("mm", (0, 1)), ("addmm_", (1, 2))):

        def count(*args, real=getattr(torch_backend, name), operands=operands, **options):
            a, b = (args[k] for k in operands)
            done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return real(*args, **options)

        monkeypatch.setattr(torch_backend, name, count)
    x, y = leaf(n, d), leaf(m, d, seed=1)
    got = torch.autograd.grad(flashcl.info_nce(x, y, temperature=1.0, symmetric=False), (x, y))
    assert sum(done) == work * n * m * d
    monkeypatch.undo()
    expected = torch.autograd.grad(flashcl.info_nce(x, y, temperature=1.0, symmetric=False), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_one_exp_only_where_no_line_is_far_below(torch_backend):
    """At e^-18 of the top, s - top has lost more than the sum of its line may."""
    sums, _ = next(torch_backend._class_sums(torch.tensor([[0.0], [-18.0]]), None, torch.empty(2, 1), need_cols=False))
    assert sums[0].tolist() == [0.0, -18.0]
    sums, _ = next(torch_backend._class_sums(torch.tensor([[0.0], [-15.0]]), None, torch.empty(2, 1), need_cols=False))
    assert sums[0].tolist() == [0.0, 0.0]


def test_exp_that_would_underflow_is_zero(torch_backend):
    """A CPU takes ten times as long for results that are no normal numbers."""
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).tiny
        v = torch.tensor([0.0, 1.1 * tiny, 0.5 * tiny, 0.0], dtype=dtype).log()
        v[0] = torch.nan
        got = torch_backend._exp_(v)
        assert got[0].isnan() and got[1] == pytest.approx(1.1 * tiny, rel=1e-4) and got[2:].tolist() == [0.0, 0.0]


def test_one_exp_per_logit(torch_backend, monkeypatch):
    """Forward and backward, for rows and columns alike; a row without positives does not cost its tiles another one."""
    exps = {}
    for name in ("sweep", "grad"):

        def watched(*args, real=getattr(torch_backend, name), name=name, **options):
            with Watch() as watch:
                result = real(*args, **options)
            exps[name] = watch.exps
            return result

        monkeypatch.setattr(torch_backend, name, watched)
    x, y = leaf(64), leaf(64, seed=1)
    flashcl.info_nce(x, y, temperature=5.0).backward()
    assert exps == dict(sweep=16, grad=16)
    labels = torch.where(torch.arange(64) == 5, 9, torch.arange(64) % 3)  # so many positives that they are masks
    flashcl.sup_con(x, labels, temperature=5.0).backward()
    assert exps["grad"] == 2 * 10  # of the tiles on and above the diagonal, for each class


def test_positives_of_wide_rows_come_in_pieces():
    """What is O(N D) widens 2 MiB of float32 at a time, whatever D."""
    n, d, limit = 64, 2**15, 2**19
    module, x = dispatch.load("torch"), torch.ones(n, d, dtype=torch.bfloat16)
    acc, weight, one = torch.ones(n, d), torch.ones(n), torch.ones(1)
    slot, sums = torch.arange(n) // 2, torch.zeros(2, n, d)
    for call in (
        lambda: module.partner_products(x, x, 5),
        lambda: module.finish(acc, x, weight, 5, one, acc),
        lambda: positives._add_by_slot_(sums, x, slot, torch.stack([weight, weight])),
        lambda: positives._label_products(x, sums, slot),
        lambda: positives._add_labels_(acc, x, weight, sums, slot),
    ):
        with Watch(x, acc, sums) as watch:
            call()
        assert watch.largest <= limit
