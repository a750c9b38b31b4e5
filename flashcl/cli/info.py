"""`flashcl info`: what is installed here, and which backends can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import flashcl
from flashcl.engine import dispatch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """The device in words, for reports that carry measurements."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"CPU: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "unknown")
    except OSError:  # not Linux
        return platform.processor() or "unknown"


def version(package: str, missing: str = "not installed") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing


def _extension() -> str:
    try:
        from flashcl import _C
    except ImportError as error:
        return f"flashcl._C is not there: {error}"
    built = _C.build_info()
    return f"flashcl._C for {', '.join(built.pop('architectures'))}; " + ", ".join(f"{k} {v}" for k, v in built.items())
