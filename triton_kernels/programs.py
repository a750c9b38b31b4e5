"""Pair programs: which pairs count, and to which class they belong, from O(N + M) vectors.

A program is one or two device functions, handed to the kernels at compile time:

    drop(t, rows, cols, value)   the tile t (BN, BM), with value where a pair is dropped: logits with -inf, G with 0
    positive(rows, cols)         (BN, BM) bool: the pairs of class 1; there is none where all pairs are of one class

rows and cols are tuples of the vectors loaded beside the tile, (BN,) and (BM,) each. Past the edges of the matrix they
hold anything; the kernels drop those pairs themselves, after the program.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def keep_all(t, rows, cols, value):
    return t


@triton.jit
def may_hold_equal(row_id, col_id):
    """Whether the ranges of two vectors overlap. Ids are mostly ranges of integers: few tiles hold an equal pair."""
    return (tl.min(row_id) <= tl.max(col_id)) & (tl.min(col_id) <= tl.max(row_id))


@triton.jit
def drop_equal_ids(t, rows, cols, value):
    if may_hold_equal(rows[0], cols[0]):
        t = tl.where(rows[0][:, None] == cols[0][None, :], value, t)
    return t


@triton.jit
def equal_labels(rows, cols):
    positive = rows[1][:, None] == cols[1][None, :]
    if may_hold_equal(rows[0], cols[0]):
        positive &= rows[0][:, None] != cols[0][None, :]
    return positive


@triton.jit
def equal_ids(rows, cols):
    return rows[0][:, None] == cols[0][None, :]


class Program(NamedTuple):
    drop: triton.JITFunction
    positive: triton.JITFunction | None


PROGRAMS = {
    "all": Program(keep_all, None),
    "different": Program(drop_equal_ids, None),
    "by_label": Program(drop_equal_ids, equal_labels),
}
# Pairs of equal ids are the positives: what a sweep leaves of them are the products of partners, as tiles have them.
PARTNERS = Program(keep_all, equal_ids)
