"""The host's part of a step on a GPU: all tensors on one device, and nothing is waited for.

Meta tensors, which have no memory, stand in for those of a GPU. They show no value (`.item()`, an index by a mask), and no
operation may mix devices or leave a tensor on the CPU: what would be an error or a synchronisation there fails here.
Kernels are not launched. Over ranks the host waits for what they say to each other, and for nothing else.
"""

import contextlib
import types

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("the kernels must be those of the interpreter", allow_module_level=True)

from triton.runtime import interpreter

import flashcl
from flashcl.backends import cuda, triton
from flashcl.engine import dispatch, distributed, ranks
from flashcl.triton_kernels import grad as grad_kernels, rows as row_kernels, sweep as sweep_kernels


def tensors(values) -> list[torch.Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def check(what, inputs, outputs=()) -> None:
    devices = [t.device.type for t in tensors(inputs)], [t.device.type for t in tensors(outputs)]
    assert set(devices[0] + devices[1]) <= {"meta"}, f"{what} takes tensors on {devices[0]} and leaves them on {devices[1]}"


class OnTheDevice(TorchDispatchMode):
    """Looks at each operation, inside the operators of flashcl too, of which their fakes would only make the outputs."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "flashcl":
            with self:
                return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs or {})
        out = operator(*args, **kwargs or {})
        check(operator, [args, kwargs], out)
        return out


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would have been launched."""
    names = []

    def launch(name):
        return lambda *args, **options: (check(name, [args, options]), names.append(name))

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "unusable", lambda name, device, dtype: None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for module in (grad_kernels, row_kernels, sweep_kernels):
        monkeypatch.setattr(module, "on", lambda device: contextlib.nullcontext())
    run = lambda self, *args, **options: launch(self.fn.__name__)(*args, **options)  # noqa: E731
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    kernels = {name: launch(name) for name in ("sweep", "grad", "sigmoid", "fold", "partner_products", "finish")}
    block = lambda *args, **options: check("Block", [args, options])  # noqa: E731
    monkeypatch.setattr(cuda, "_C", types.SimpleNamespace(TILE=128, Block=block, **kernels))
    monkeypatch.setattr(cuda, "_on", lambda device: contextlib.nullcontext(0))
    return names


def leaf(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


LOSSES = {
    "info_nce": lambda x, y, **at: flashcl.info_nce(x, y, logit_scale=leaf(), **at),
    "info_nce, more candidates": lambda x, y, **at: flashcl.info_nce(x, torch.cat([y, y]), temperature=0.1, symmetric=False, **at),
    "info_nce, normalised": lambda x, y, **at: flashcl.info_nce(x, y, temperature=0.1, normalize=True, reduction="none", **at),
    "siglip": lambda x, y, **at: flashcl.siglip(x, y, logit_scale=leaf(), logit_bias=leaf(), **at),
    "siglip, floats": lambda x, y, **at: flashcl.siglip(x, y, logit_scale=10.0, logit_bias=-10.0, reduction="none", **at),
    "nt_xent": lambda x, y, **at: flashcl.nt_xent(x, y, temperature=leaf(), **at),
    "sup_con": lambda x, y, **at: flashcl.sup_con(x + y, torch.zeros(len(x), dtype=torch.int32, device="meta"), **at),
    "logsumexp": lambda x, y, **at: torch.cat(
        flashcl.similarity_logsumexp(x, y, logit_scale=leaf(), row_bias=leaf(len(x)), col_bias=leaf(len(y)), **at)
    ),
}


@pytest.mark.parametrize("n, d", [(256, 64), (300, 41)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_step_stays_on_the_device(backend, loss, dtype, n, d, launched):
    x, y = leaf(n, d, dtype=dtype), leaf(n, d, dtype=dtype)
    with OnTheDevice():
        LOSSES[loss](x, y, backend=backend).sum().backward()
    assert x.grad.shape == y.grad.shape == (n, d)
    assert len(launched) >= 4 if backend != "torch" else not launched


@pytest.fixture(params=[False, True])
def float16_sums(request):
    """Whether cuBLAS may accumulate products of float16 in float16."""
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.backends.cuda.matmul.allow_fp16_accumulation = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_fp16_accumulation = before


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_wide_products_of_float16_are_asked_for_where_pytorch_has_them(backend, float16_sums, launched):
    """Where it has none the operands are widened."""
    wide = []

    class Products(OnTheDevice):
        def __torch_dispatch__(self, operator, *args):
            if operator in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
                wide.append(operator)
            return super().__torch_dispatch__(operator, *args)

    x, y = (leaf(40, 24, dtype=torch.float16) for _ in range(2))
    with Products():
        flashcl.info_nce(x, y, temperature=0.1, backend=backend).backward()
    assert bool(wide) == (not float16_sums)


class OneOfThree(dist.ProcessGroup):
    group_name = "ranks without a GPU"

    def __init__(self):
        super().__init__(1, 3)
        self.asked = []  # names of the collectives


@pytest.fixture
def group(monkeypatch):
    """Ranks of which only this one is there: what it says, all say; what it sends is looked at."""
    group = OneOfThree()
    monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", {group.group_name: group}.get)

    def collective(name, result):
        def looked_at(self, *args, **options):
            check(name, [args, options])
            group.asked.append(name)
            return result(*args)

        monkeypatch.setattr(ranks.Ranks, name, looked_at)

    sent = types.SimpleNamespace(wait=lambda: None)
    for name in ("start_all_gather", "start_reduce_scatter", "start_exchange"):
        collective(name, lambda *_: sent)
    collective("_reduce_", lambda x, op: x)

    def say(self, same, counts):
        group.asked.append("say")
        return [[same, counts]] * self.size

    monkeypatch.setattr(ranks.Ranks, "_say", say)
    for module in (ranks, distributed):
        monkeypatch.setattr(module, "exactly", lambda v: "1.0")
    return group


# Messages of a step, which the host waits for: docs/distributed.md. There sup_con has one more, of a learnable scale.
MESSAGES = {"info_nce": 3, "siglip": 2, "nt_xent": 3, "sup_con": 5}


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_step_over_ranks_stays_on_the_device(backend, loss, strategy, launched, group):
    x, y = leaf(40, 24, dtype=torch.bfloat16), leaf(40, 24, dtype=torch.bfloat16)
    over = flashcl.Group(group, strategy=strategy, chunk_bytes=3000)  # several of them
    with OnTheDevice():
        LOSSES[loss](x, y, backend=backend, group=over).sum().backward()
    assert x.grad.shape == y.grad.shape == (40, 24)
    assert len(launched) >= 6 if backend != "torch" else not launched
    assert {"ring": "start_exchange", "gather": "start_reduce_scatter"}[strategy] in group.asked
    if loss in MESSAGES:
        assert group.asked.count("say") == MESSAGES[loss]
