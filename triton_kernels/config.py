"""The tile of every kernel on every GPU generation, with the reason beside it. Nothing is tuned at run time.

The numbers rest on compiled code (registers, spills, shared memory: tests/compile_budget.py prints them), those of 16 bits
on sm_90 also on timings (bench/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 256  # no tile has more rows or columns


@dataclass(frozen=True)
class Tile:
    BN: int  # rows of S in a tile
    BM: int  # columns of S in a tile
    BK: int  # of D in a step
    warps: int
    stages: int  # steps in flight
    tma: bool = False  # load through tensor descriptors where the alignment of the tensors allows it
    precision: str = "ieee"  # of float32 products; 16-bit operands are taken as they are
    GROUP: int = 8  # tiles of a column that run together: 8 x 128 rows of x stay in L2 while y passes by


@dataclass(frozen=True)
class Entry:
    """The tiles of one kernel: of a rectangle of S, and the square ones of a triangle on its diagonal."""

    tile: Tile
    square: Tile


def _entry(BN: int, BM: int, *rest, square: tuple | None = None, **options) -> Entry:
    tile = Tile(BN, BM, *rest, **options)
    return Entry(tile, Tile(*square, **options) if square else tile)


# Entries are named by what the epilogue has to keep in registers beside the tile. A value per column weighs most: a thread
# holds 32 or 64 columns, and with two classes or with biases there are several values for each.
#   sweep    s, exp(s) and the totals of rows and columns     sweep2   with two classes, or with biases
#   grad     s, G and the coefficients of rows and columns    grad2    with two classes, or with biases
#   sigmoid  s, exp(-|s|), a polynomial
# No entry spills on any of its generations; "spills" below is said of the next larger tile.
#
# 16 bits: BK = 64 is 128 bytes, the widest swizzle of shared memory.
_MMA16 = {  # sm_80, sm_86, sm_89: 64 KiB of shared memory in 3 stages, which the 99 KiB of sm_86 and sm_89 hold as well
    "sweep": _entry(128, 128, 64, 8, 3),  # 8 warps: 64 accumulators in a thread; 4 warps spill
    "sweep2": _entry(128, 128, 64, 8, 3, square=(64, 64, 64, 4, 3)),  # 128 x 128 spills on the diagonal
    "grad": _entry(128, 128, 64, 8, 3),
    "grad2": _entry(128, 64, 64, 8, 3, square=(64, 64, 64, 4, 3)),  # 128 x 128 spills
    "sigmoid": _entry(128, 128, 64, 8, 3),
}
_SM90_16 = {
    # Two CTAs to a multiprocessor, one of which multiplies while the other takes statistics: 8 % faster than 256 x 128.
    "sweep": _entry(128, 128, 64, 4, 3, tma=True),
    "sweep2": _entry(128, 128, 64, 8, 4, tma=True),
    # 8 warps: the products stay in registers beside G, for the gradient of the scale; 4 warps spill. 16 tiles of a column
    # together: 6 % faster than 8.
    "grad": _entry(128, 128, 64, 8, 4, tma=True, GROUP=16),
    "grad2": _entry(128, 64, 64, 8, 4, square=(64, 64, 64, 4, 4), tma=True),
    "sigmoid": _entry(128, 128, 64, 8, 4, tma=True),  # 4 warps spill
}
_SM100_16 = {  # the accumulator lies in tensor memory; a thread reads half a row of it, 64 columns of 128
    "sweep": _entry(128, 64, 64, 8, 4, square=(64, 64, 64, 4, 4), tma=True),  # 128 x 128 spills for some sizes
    "sweep2": _entry(128, 64, 64, 8, 4, square=(64, 64, 64, 4, 4), tma=True),
    # 128 x 128 spills for some sizes, and 4 warps on the diagonal
    "grad": _entry(128, 64, 64, 8, 4, square=(64, 64, 64, 8, 4), tma=True),
    "grad2": _entry(64, 64, 64, 8, 4, tma=True),  # 128 x 64, and 4 warps, spill
    "sigmoid": _entry(128, 128, 64, 8, 4, tma=True),
}

# float32: six bfloat16 products each, of operands split into three parts, which takes registers for all. They cost the
# tensor cores what three of TF32 do, and err by 2^-24 where those err by 2^-22: more than the contract allows. On sm_100
# Triton 3.7.1 makes an empty kernel of bf16x6 and `sigmoid`: there it is three of TF32.
_SMALL32 = _entry(64, 64, 32, 4, 3, precision="bf16x6")  # the largest tile that does not spill with mma.sync
_MMA32 = dict.fromkeys(_MMA16, _SMALL32)
_SM90_32 = {
    "sweep": _entry(128, 128, 32, 8, 3, tma=True, precision="bf16x6"),
    "sweep2": _entry(64, 64, 32, 4, 3, tma=True, precision="bf16x6"),
    # 128 x 128 spills on the diagonal, where sizes are multiples of 16
    "grad": _entry(128, 128, 32, 8, 3, square=(64, 64, 32, 4, 3), tma=True, precision="bf16x6"),
    "grad2": _entry(64, 64, 32, 4, 3, tma=True, precision="bf16x6"),
    "sigmoid": _entry(128, 128, 32, 8, 3, tma=True, precision="bf16x6"),
}
_SM100_32 = {
    # 128 x 128 spills for some sizes
    "sweep": _entry(128, 64, 32, 8, 3, square=(64, 64, 32, 4, 3), tma=True, precision="tf32x3"),
    "sweep2": _entry(64, 64, 32, 4, 3, tma=True, precision="tf32x3"),
    "grad": _entry(128, 64, 32, 8, 3, square=(64, 64, 32, 4, 3), tma=True, precision="tf32x3"),
    "grad2": _entry(64, 64, 32, 8, 3, tma=True, precision="tf32x3"),  # 4 warps spill
    "sigmoid": _entry(128, 64, 32, 8, 3, tma=True, precision="tf32x3"),  # 128 x 128 spills
}

INTERPRETER = 0  # no GPU: see triton.runtime.interpreter. Its time goes by operations, not by elements
_INTERPRETED = dict.fromkeys(_MMA16, _entry(64, 64, 64, 4, 1))

_TABLE = {  # architecture -> entries for 16 bits, entries for float32
    INTERPRETER: (_INTERPRETED, _INTERPRETED),
    80: (_MMA16, _MMA32),
    86: (_MMA16, _MMA32),
    89: (_MMA16, _MMA32),
    90: (_SM90_16, _SM90_32),
    100: (_SM100_16, _SM100_32),
    120: (_MMA16, _MMA32),  # mma.sync and 99 KiB of shared memory, like sm_89
}


def entry(arch: int, kernel: str, dtype: torch.dtype) -> Entry:
    """The entry for an architecture (90 is sm_90): that of the nearest one below where the table has none."""
    nearest = max(known for known in _TABLE if known <= arch)
    sixteen_bits, float32 = _TABLE[nearest]
    return (sixteen_bits if dtype.itemsize == 2 else float32)[kernel]
