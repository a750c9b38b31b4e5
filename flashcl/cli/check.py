"""`flashcl check`: the numeric contract on this machine, loss by loss, dtype by dtype, backend by backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import gradcheck

import flashcl
from flashcl import contract, reference
from flashcl.cli.arguments import UsageError
from flashcl.cli.text import default_device, describe
from flashcl.dtypes import DTYPES
from flashcl.engine import dispatch

# What is computed: in one tile of S, where the regimes differ, and in several, which have to be put together.
CASES = {regime: dict(regime=regime, n=67, d=40) for regime in ("init", "converged", "t=0.01", "large")}
CASES["600 rows"] = dict(regime="init", n=600, d=72)


def add_parser(commands) -> None:
    about = "every loss against float64, beside dense PyTorch; exit code 1 on a failure"
    parser = commands.add_parser("check", help=about)
    parser.add_argument(
        "--backend", choices=dispatch.BACKENDS, help="only this one (default: all that are usable here)"
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    device = default_device()
    unusable = {
        name: dispatch.unusable(name, device, torch.bfloat16)  # which every kernel has
        for name in dispatch.BACKENDS
        if all(dispatch.unusable(name, device, dtype) for dtype in DTYPES)
    }
    if args.backend in unusable:
        raise UsageError(f"--backend {args.backend}: {unusable[args.backend]}")
    print(f"flashcl {flashcl.__version__}, torch {torch.__version__}, {describe(device)}")
    print(f"relative error against float64, the worst of all values and gradients in these cases: {', '.join(CASES)};")
    print("the verdict is that of the contract (flashcl/contract.py) on each; float64 is also held against finite differences\n")
    print(f"{'loss':<24}{'backend':<9}{'dtype':<10}{'flashcl':>10}{'dense':>10}  verdict")
    failures = 0
    for backend in [args.backend] if args.backend else dispatch.BACKENDS:
        if backend in unusable:
            print(f"{'':<24}{backend:<9}not usable: {unusable[backend]}")
            continue
        for loss in contract.LOSSES:
            for dtype in DTYPES:
                if dispatch.unusable(backend, device, dtype) is None:
                    failures += not _report(loss, backend, dtype, device)
    print(f"\n{f'{failures} FAILED' if failures else 'all passed'}")
    return 1 if failures else 0


def _report(loss: str, backend: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Prints one line; returns whether the contract holds."""
    cases = {name: contract.case(loss, **case) for name, case in CASES.items()}
    where = dict(backend=backend, device=device)
    broken = [f"{name}: {v}" for name, c in cases.items() for v in contract.violations(c, dtype, **where)]
    if dtype == torch.float64 and not _gradcheck(loss, backend, device):
        broken.append("gradcheck")
    errors = [_errors(c.to(dtype, device), backend) for c in cases.values()]
    ours, dense = (max(e[k] for e in errors) for k in (0, 1))
    verdict = "FAILED" if broken else "ok"
    print(f"{loss:<24}{backend:<9}{str(dtype)[6:]:<10}{ours:>10.1e}{dense:>10.1e}  {verdict}", flush=True)
    for line in broken:
        print(f"    {line}")
    return not broken


def _errors(c: contract.Case, backend: str) -> tuple[float, float]:
    """Worst relative error of flashcl and of the dense formula in the dtype of the case."""
    dense = getattr(reference, c.function)
    ref = contract.evaluate(dense, c.to(torch.float64, c.device))
    ours = contract.evaluate(getattr(flashcl, c.function), replace(c, options=c.options | dict(backend=backend)))
    return _worst(ours, ref), _worst(contract.evaluate(dense, c), ref)


def _worst(results: dict[str, Tensor], ref: dict[str, Tensor]) -> float:
    return max(((results[k].double() - ref[k]).norm() / ref[k].norm()).item() for k in ref)


def _gradcheck(loss: str, backend: str, device: torch.device) -> bool:
    c = contract.case(loss, "t=0.5", n=6, d=4).to(torch.float64, device)
    leaves = [v.clone().requires_grad_() for v in c.tensors.values()]

    def call(*tensors):
        return getattr(flashcl, c.function)(**dict(zip(c.tensors, tensors)), **c.options, backend=backend)

    return gradcheck(call, leaves, raise_exception=False)
