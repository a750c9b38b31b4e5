"""What reports of several commands say alike: the machine and versions in words, sizes, tables."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform

import torch

from flashcl.backends import onednn


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """The device in words, for reports that carry measurements."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"CPU: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    """With its family and model: virtual machines hide the generation in its name, and much of its speed depends on it."""
    fields = onednn.processor()
    if "model name" not in fields:  # not Linux, or not x86
        return platform.processor() or "unknown"
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def version(package: str, missing: str = "not installed") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right, the first to the left. A row that is shorter than the header ends in free text."""
    full = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(map(len, column)) for column in zip(*full)]
    widths[0] = max(len(row[0]) for row in [header, *rows])

    def line(row: list[str]) -> str:
        cells = row if len(row) == len(header) else row[:-1]
        aligned = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return "  ".join(aligned if cells is row else [*aligned, row[-1]])

    return "\n".join([line(header), "-" * len(line(header)), *map(line, rows)])


def size(count: float) -> str:
    """Bytes in words."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    value = count / 1024**power
    return f"{value:.{1 if power and value < 100 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
