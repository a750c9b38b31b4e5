"""`flashcl check`: the numeric contract on this machine, loss by loss, dtype by dtype, backend by backend."""

from __future__ import annotations

import torch
from torch.autograd import gradcheck

import flashcl
from flashcl import contract
from flashcl.cli.arguments import UsageError
from flashcl.cli.text import default_device, describe
from flashcl.contract import Yardstick
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
    print(f"relative error against float64 or better, the worst of all values and gradients in these cases: {', '.join(CASES)};")
    print("inf where dense PyTorch overflows in that dtype; the verdict is that of the contract (flashcl/contract.py) on each")
    print("value and gradient; float64 is also held against finite differences\n")
    print(f"{'loss':<24}{'dtype':<10}{'backend':<9}{'flashcl':>10}{'dense':>10}  verdict")
    asked = [args.backend] if args.backend else list(dispatch.BACKENDS)
    failures = sum(_report(loss, dtype, asked, device) for loss in contract.LOSSES for dtype in DTYPES)
    print()
    for backend in (name for name in asked if name in unusable):
        print(f"{backend} is not usable: {unusable[backend]}")
    print(f"{f'{failures} FAILED' if failures else 'all passed'}")
    return 1 if failures else 0


def _report(loss: str, dtype: torch.dtype, backends: list[str], device: torch.device) -> int:
    """Prints a line for each of the backends that serve the dtype. Returns for how many of them the contract does not hold."""
    backends = [name for name in backends if dispatch.unusable(name, device, dtype) is None]
    if not backends:
        return 0
    yardsticks = {name: Yardstick.of(contract.case(loss, **c).to(dtype, device)) for name, c in CASES.items()}
    dense = max(y.worst(y.dense[0]) for y in yardsticks.values())
    failures = 0
    for backend in backends:
        results = {name: y.results(backend) for name, y in yardsticks.items()}
        ours = max(y.worst(contract.errors_of(results[name], y.truth)) for name, y in yardsticks.items())
        found = {name: y.findings(results[name]) for name, y in yardsticks.items()}
        broken = [f"{name}: {f}" for name, findings in found.items() for f in findings if not f.holds]
        if dtype == torch.float64 and not _gradcheck(loss, backend, device):
            broken.append("gradcheck")
        verdict = "FAILED" if broken else "ok"
        print(f"{loss:<24}{str(dtype)[6:]:<10}{backend:<9}{ours:>10.1e}{dense:>10.1e}  {verdict}", flush=True)
        for line in broken:
            print(f"    {line}")
        failures += bool(broken)
    return failures


def _gradcheck(loss: str, backend: str, device: torch.device) -> bool:
    c = contract.case(loss, "t=0.5", n=6, d=4).to(torch.float64, device)
    leaves = [v.clone().requires_grad_() for v in c.tensors.values()]

    def call(*tensors):
        return getattr(flashcl, c.function)(**dict(zip(c.tensors, tensors)), **c.options, backend=backend)

    return gradcheck(call, leaves, raise_exception=False)
