"""Pair programs: what becomes of a logit between the product and the reduction, from O(N + M) vectors.

A program is two device functions, handed to the kernels at compile time:

    logit(s, rows, cols)   the tile s (BN, BM), with -inf where a pair is dropped
    positive(rows, cols)   (BN, BM) bool: the pairs of class 1; None where the program knows one class only

rows and cols are tuples of the vectors loaded beside the tile, (BN,) and (BM,) each. Past the edges of the matrix they
hold anything; the kernels drop those pairs themselves, after the program.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def keep(s, rows, cols):
    return s


@triton.jit
def may_hold_equal(row_id, col_id):
    """Whether the ranges of two vectors overlap. Ids are mostly ranges of integers: few tiles hold an equal pair."""
    return (tl.min(row_id) <= tl.max(col_id)) & (tl.min(col_id) <= tl.max(row_id))


@triton.jit
def drop_equal_ids(s, rows, cols):
    if may_hold_equal(rows[0], cols[0]):
        s = tl.where(rows[0][:, None] == cols[0][None, :], float("-inf"), s)
    return s


@triton.jit
def one_class(rows, cols):
    return None


@triton.jit
def equal_labels(rows, cols):
    positive = rows[1][:, None] == cols[1][None, :]
    if may_hold_equal(rows[0], cols[0]):
        positive &= rows[0][:, None] != cols[0][None, :]
    return positive


class Program(NamedTuple):
    logit: triton.JITFunction
    positive: triton.JITFunction
    classes: int


PROGRAMS = {
    "all": Program(keep, one_class, 1),
    "different": Program(drop_equal_ids, one_class, 1),
    "by_label": Program(drop_equal_ids, equal_labels, 2),
}
