"""Which backend serves a call, and why; how a call is carried out."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flashcl import checks
from flashcl.dtypes import computed_dtype
from flashcl.engine.exchange import choose_strategy
from flashcl.engine.problem import Backend
from flashcl.engine.ranks import Group, meetings

BACKENDS = ("cuda", "triton", "torch")  # fastest first; the last one needs no kernel for the device

# GPU generations (major, minor) on which the contract tests and the sanitizer have passed with these very kernels (their host
# code may be newer), per backend. "auto" takes no kernel elsewhere. Each entry stands on a file
# bench/results/verified-<backend>-sm<major><minor>.json; a test looks.
VERIFIED: dict[str, frozenset[tuple[int, int]]] = {"cuda": frozenset({(9, 0)}), "triton": frozenset({(9, 0)})}


def load(name: str) -> Backend:
    """The module of a backend, imported when first used: `import flashcl` needs neither triton nor a compiler."""
    return importlib.import_module(f"flashcl.backends.{name}")


def unusable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve such tensors here, or None."""
    try:
        return load(name).unusable(device, dtype)
    except ImportError as error:
        in_a_clone = error.name == "flashcl.triton_kernels"  # they lie beside flashcl/ there: only an installation joins them
        return f"{error}{': start Python outside of the clone, or pip install -e .' if in_a_clone else ''}"


def choose(backend: str, x: Tensor) -> str:
    """The name of the backend that serves x, in the dtype that the engine gets it in. An explicit name never falls back."""
    dtype = computed_dtype(x)
    if backend == "auto":
        backend = _auto(x.device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {", ".join(map(repr, BACKENDS))}, got {backend!r}')
    if reason := unusable(backend, x.device, dtype):
        raise RuntimeError(f"backend {backend!r} cannot serve {dtype} on {x.device} here: {reason}")
    return backend


@dataclass(frozen=True)
class Execution:
    """How a call is carried out: all about it that is not its mathematics."""

    dtype: torch.dtype  # what embeddings are rounded to; their gradients come back in the dtype that they had
    backend: str  # a name
    group: str  # of the ranks that hold other rows and columns, encoded (ranks.py); "": this process has all

    @staticmethod
    def of(x: Tensor, backend: str, group: Group | None, **same: object) -> Execution:
        """For embeddings like x. `same`: arguments of the loss in which the ranks of a group must agree."""
        encoded = "" if group is None else group.encode(**{"its loss begun at number": meetings(group.process_group)}, **same)
        return Execution(computed_dtype(x), choose(backend, x), encoded)


def explain(x: Tensor, y: Tensor | None = None, *, group: ProcessGroup | Group | None = None) -> str:
    """What backend="auto" takes for embeddings like x (N, D), and why it passes the others over.

    For nt_xent pass both views as one: torch.cat([z1, z2]).

    With a group, how rows of the other ranks come here; nothing is sent, so that they are taken to hold as many as this one.
    Returns text of one line per backend, the chosen one marked, and one for the group.
    Raises what the losses would: ValueError or TypeError, RuntimeError if no backend serves such tensors.
    """
    checks.embeddings(group, x=x, y=x if y is None else y)
    y, dtype = x if y is None else y, computed_dtype(x)
    lines = [f"{len(x)} x {len(y)} logits, D = {x.shape[1]}, {dtype} on {x.device}"]
    chosen = choose("auto", x)
    for name in BACKENDS:
        reason = _passed_over(name, x.device, dtype)
        if name == chosen:
            lines.append(f"-> {name}: chosen, the first of {', '.join(BACKENDS)} that applies")
        else:
            lines.append(f"   {name}: {reason or 'applies, but is slower'}")
    if group is not None:
        lines.append(_explain_group(Group.of(group), len(y), x.shape[1] * dtype.itemsize))
    return "\n".join(lines)


def _explain_group(group: Group, lines: int, line_bytes: int) -> str:
    ranks = group.process_group.size()
    strategy = choose_strategy(group.strategy, ranks * lines, line_bytes, group.chunk_bytes)
    rows = f"the rows of all ranks take about {ranks * lines * line_bytes / 2**20:.1f} MiB"
    reason = {
        "gather": f"{rows}, no more than one all-gather of {group.chunk_bytes / 2**20:.1f} MiB brings: one wait, not {ranks - 1}",
        "ring": f"{rows}, more than one all-gather of {group.chunk_bytes / 2**20:.1f} MiB: no row is padded, and of a "
        "symmetric matrix half are sent",
    }[strategy]
    return f"   {ranks} ranks, {strategy}: {'asked for' if group.strategy != 'auto' else reason}"


def _auto(device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" takes. Without kernels where they could be had it is many times slower: it says so."""
    name = next(name for name in BACKENDS if _passed_over(name, device, dtype) is None)
    if name == "torch" and device.type == "cuda" and dtype != torch.float64 and not torch.version.hip:
        here = torch.cuda.get_device_capability(device)
        if why := [f"{k}: {unusable(k, device, dtype)}" for k, verified in VERIFIED.items() if here in verified]:
            warnings.warn(f"flashcl takes PyTorch, not the kernels for this GPU. {'; '.join(why)}", stacklevel=3)
    return name


def _passed_over(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not take a backend, or None."""
    if name == "torch":
        return None
    if device.type != "cuda":
        return f"its kernels are for GPUs, the tensors are on {device.type}"
    if reason := unusable(name, device, dtype):
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability not in VERIFIED[name]:
        return f"not verified on sm_{capability[0]}{capability[1]}: ask for it by backend={name!r}"
    return None


# torch.compile takes the answers as constants: it cannot trace how drivers and extensions are looked at. This is what
# torch.compiler.assume_constant_result does; to call that would import torch._dynamo, and triton with it.
for _answer in (unusable, _auto):
    _answer._dynamo_marked_constant = True
