"""What stands on the command line. Where it cannot be done, argparse or `main` prints why and ends with exit code 2."""

from __future__ import annotations

import argparse
import math

import torch

from flashcl.cli.text import default_device


class UsageError(ValueError):
    """What was asked for cannot be done, for the reason in the message."""


def choose_device(name: str) -> torch.device:
    """Of --device auto, cpu or cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here")
    return default_device() if name == "auto" else torch.device(name)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
