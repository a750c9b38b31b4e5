"""`flashcl info`: what is installed here, and which backends can run."""

from __future__ import annotations

import platform

import torch

import flashcl
from flashcl.cli.text import default_device, describe, version
from flashcl.dtypes import DTYPES
from flashcl.engine import dispatch


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="versions, device, which backends are usable and why not")
    parser.set_defaults(run=run)


def run(args) -> int:
    for name, value in report():
        print(f"{name:<10} {value}")
    return 0


def report() -> list[tuple[str, str]]:
    """(name, text) lines."""
    device = default_device()
    lines = [
        ("flashcl", flashcl.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("extension", _extension()),
        ("device", describe(device)),
    ]
    lines += [(name, _use(name, device)) for name in dispatch.BACKENDS]
    auto = {dtype: dispatch.choose("auto", torch.empty(2, 2, dtype=dtype, device=device)) for dtype in DTYPES}
    by_dtype = ", ".join(f"{str(dtype).removeprefix('torch.')}: {name}" for dtype, name in auto.items())
    return [*lines, ("auto", auto[torch.float32] if len(set(auto.values())) == 1 else by_dtype)]


def _use(backend: str, device: torch.device) -> str:
    """For which dtypes it can be used or, if for none, why not for the one that every kernel has."""
    reasons = {dtype: dispatch.unusable(backend, device, dtype) for dtype in DTYPES}
    served = [str(dtype).removeprefix("torch.") for dtype, reason in reasons.items() if reason is None]
    return f"usable: {', '.join(served)}" if served else f"not usable: {reasons[torch.bfloat16]}"


def _extension() -> str:
    try:
        from flashcl import _C
    except ImportError as error:
        return f"flashcl._C is not there: {error}"
    built = _C.build_info()
    return f"flashcl._C for {', '.join(built.pop('architectures'))}; " + ", ".join(f"{k} {v}" for k, v in built.items())
