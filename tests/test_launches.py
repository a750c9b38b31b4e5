"""How many operations a training step sends to the device.

Each costs some microseconds of the host, whatever it computes: with 200 of them a step of a few thousand rows waits for the
host alone. What is counted are the operations of PyTorch that would be launches on a GPU, and the kernels.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("counted with the interpreter", allow_module_level=True)

from triton.runtime import interpreter

import flashcl
from flashcl.backends import cuda, gemm, tiled

N, D = 256, 64

LOSSES = {
    "info_nce": lambda x, y, scale, bias, backend: flashcl.info_nce(x, y, logit_scale=scale, backend=backend),
    "siglip": lambda x, y, scale, bias, backend: flashcl.siglip(x, y, logit_scale=scale, logit_bias=bias, backend=backend),
    "nt_xent": lambda x, y, scale, bias, backend: flashcl.nt_xent(x, y, backend=backend),
    "sup_con": lambda x, y, scale, bias, backend: flashcl.sup_con(x, torch.arange(N) // 4, backend=backend),
}

# Forward and backward, bfloat16, a learnable scale (and bias), sizes of whole tiles. Lower one when it can be lower.
ALLOWED = {
    "triton": {"info_nce": 43, "siglip": 42, "nt_xent": 27, "sup_con": 87},
    "cuda": {"info_nce": 45, "siglip": 43, "nt_xent": 29, "sup_con": 89},
}

# What changes only how a tensor is looked at, or takes memory without writing it.
FREE = set(
    "view expand slice t unsqueeze select transpose as_strided detach alias _unsafe_view unbind permute split squeeze "
    "_reshape_alias empty empty_strided new_empty empty_like unflatten promote_types numpy_T expand_as view_as split_with_sizes".split()
)
# What may do so, or copy.
PERHAPS_FREE = {"to", "contiguous", "reshape", "flatten"}


class Launches(TorchDispatchMode):
    """Counts operations by name, inside the operators of flashcl too; kernels count themselves."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        namespace, name = operator._schema.name.split("::")
        if namespace == "flashcl":
            with self:
                return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs or {})
        out = operator(*args, **kwargs or {})
        copied = name in PERHAPS_FREE and out.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr()
        if copied or name not in FREE | PERHAPS_FREE:
            self.counts[name] += 1
        return out


class Counted:
    """flashcl._C, whose kernels count."""

    def __init__(self, module, count):
        self.module, self.count = module, count

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in ("sweep", "grad", "sigmoid", "fold", "partner_products", "finish"):
            return function
        return lambda *args, **options: (self.count(name), function(*args, **options))[1]


@pytest.fixture
def launches(monkeypatch):
    mode = Launches()

    def count(kernel):
        mode.counts[f"{kernel} kernel"] += 1

    run = interpreter.GridExecutor.__call__

    def counted(self, *args, **options):
        count(self.fn.__name__)
        with _disable_current_modes():
            return run(self, *args, **options)

    def product(*args, **options):
        mode.counts["addmm_"] += 1
        with _disable_current_modes():  # one launch on a GPU; only a CPU widens the operands first
            gemm.addmm_(*args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    monkeypatch.setattr(tiled, "addmm_", product)
    monkeypatch.setattr(cuda, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(cuda, "_C", Counted(cuda._C, count))
    return mode


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ALLOWED)
def test_a_step_takes_few_launches(loss, backend, launches):
    if backend == "cuda" and cuda._C.module is None:
        pytest.skip("the extension is not built")
    x, y = (torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.0, -10.0))
    with launches:
        LOSSES[loss](x, y, scale, bias, backend).backward()
    total = sum(launches.counts.values())
    assert total > 10 and any(name.endswith("kernel") for name in launches.counts)
    assert total <= ALLOWED[backend][loss], launches.counts.most_common()
