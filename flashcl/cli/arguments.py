"""Numbers on the command line: argparse turns what these raise into a message and exit code 2."""

from __future__ import annotations

import argparse
import math


def at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
