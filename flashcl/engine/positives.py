"""Positives whose logits are O(N D): they stay out of the tiles, in full precision, forward and backward.

Both kinds answer the same two questions, with t_i the mean of the positives of row i:

    products    <x_i, t_i>, (N,) float64
    finish      dx_i = scale (dx_i + w_i t_i),  dy_j = scale (dy_j + sum over the rows i of which j is a positive of w_i x_i / |P(i)|)

Added in the wide accumulators before the gradient is rounded, a positive cancels exactly what it must cancel. Of a
triangular problem dx receives both. What runs over rows in chunks is a registered operator, so that torch.compile sees one node whatever N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcl.engine import distributed, ops
from flashcl.engine.problem import Problem


@dataclass(frozen=True)
class Partner:
    """One positive per row i: the column (i + shift) mod M of this rank. Of a triangular problem i is that of its partner."""

    shift: int

    def products(self, p: Problem, backend: str) -> Tensor:
        return ops.partner_products(p.x, p.y, self.shift, backend=backend)

    def finish(
        self, p: Problem, dx: Tensor | None, dy: Tensor | None, weight: Tensor, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor | None, Tensor | None]:
        of_partner = weight.roll(self.shift) if self.shift else weight  # of the row that a column is the partner of
        if dx is not None:
            w = weight + of_partner if p.triangular else weight
            dx = ops.finish(dx, p.y, w, self.shift, p.logit_scale, dtype, backend=backend)
        if dy is not None:
            dy = ops.finish(dy, p.x, of_partner, -self.shift, p.logit_scale, dtype, backend=backend)
        return dx, dy


@dataclass(frozen=True)
class SameLabel:
    """All other rows with the label of the row, on all ranks; x and y are the same embeddings. Rows without one have t_i = 0."""

    labels: Tensor  # (N,) integers
    count: Tensor  # (N,) int64: how many positives each row has
    group: str

    @staticmethod
    def of(labels: Tensor, group: str) -> SameLabel:
        return SameLabel(labels, _others_with_label(labels, group), group)

    def products(self, p: Problem, backend: str) -> Tensor:
        ones = torch.ones_like(p.x[:, 0], dtype=p.stat_dtype)[None]
        return _label_products(p.x, *_label_sums(p.x, self.labels, ones, self.group)) * self._inverse_count()

    def finish(
        self, p: Problem, dx: Tensor | None, dy: None, weight: Tensor, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor | None, None]:
        if dx is not None:
            each = weight * self._inverse_count().to(weight.dtype)
            weights = torch.stack([torch.ones_like(each), each])
            _add_labels_(dx, p.x, each, *_label_sums(p.x, self.labels, weights, self.group))
            dx = ops.finish(dx, None, None, 0, p.logit_scale, dtype, backend=backend)
        return dx, None

    def _inverse_count(self) -> Tensor:
        return torch.where(self.count > 0, 1 / self.count.double(), 0.0)


# ---- operators -----------------------------------------------------------------------------------------------------------


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of which the first is (N, D), some rows at a time, side by side: bounds the wide copies made of them.

    On a GPU in chunks of 64 MiB of float32, since each is a launch; on a CPU of 2 MiB, which its caches hold.
    """
    elements = 2**24 if tensors[0].is_cuda else 2**19
    rows = max(elements // tensors[0].shape[1], 1)
    return zip(*(v.split(rows) for v in tensors))


@ops.operator("others_with_label", fake=lambda labels, group: torch.empty_like(labels, dtype=torch.int64))
def _others_with_label(labels: Tensor, group: str) -> Tensor:
    """How many other rows, of all ranks, have the label of each row: (N,) int64."""
    ordered = (distributed.labels_of_all(labels, group) if group else labels).sort().values
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels) - 1


def _empty_sums(x, labels, weights, group):
    return weights.new_empty(*weights.shape, x.shape[1]), torch.empty_like(labels, dtype=torch.int64)


@ops.operator("label_sums", fake=_empty_sums)
def _label_sums(x: Tensor, labels: Tensor, weights: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Sums of weights[p, j] x_j over all rows j, of all ranks, with one label, for each label that occurs here.

    x: (N, D). labels: (N,). weights: (P, N). Returns: the sums (P, N, D), of which the label of row i has number slot[i],
    since how many labels there are is known to the device alone; slot (N,).
    """
    ordered = labels.sort().values
    slot, last = torch.searchsorted(ordered, labels), len(labels) - 1
    sums = weights.new_zeros(*weights.shape, x.shape[1])
    for y, of_y, w in distributed.label_blocks(x, labels, weights, group) if group else [(x, labels, weights)]:
        if last < 0:
            continue  # the other ranks still need the rows of this one: walk on
        to = torch.searchsorted(ordered, of_y).clamp(max=last)
        w = torch.where(ordered[to] == of_y, w, 0.0)  # labels that do not occur here
        for total, each in zip(sums, w):
            for b, k, v in _in_chunks(y, to, each):
                # On a GPU index_put_ sorts and so adds in a fixed order; index_add_ would add in any.
                total.index_put_((k,), b.to(total.dtype) * v[:, None], accumulate=True)
    return sums, slot


@ops.operator("label_products", fake=lambda x, sums, slot: x.new_empty(x.shape[0], dtype=torch.float64))
def _label_products(x: Tensor, sums: Tensor, slot: Tensor) -> Tensor:
    """<x_i, sum of the other rows with its label>, (N,) float64"""
    total = [((sums[0][k] - a.to(sums.dtype)) * a).sum(1) for a, k in _in_chunks(x, slot)]
    return torch.cat(total).double()


@ops.operator("add_labels_", fake=lambda *_: None, mutates=("dx",))
def _add_labels_(dx: Tensor, x: Tensor, each: Tensor, sums: Tensor, slot: Tensor) -> None:
    """dx_i += each_i (sum of x_j) + sum of each_j x_j, over the other rows j with its label"""
    for d, a, k, e in _in_chunks(dx, x, slot, each):
        a = a.to(d.dtype)
        d.addcmul_(sums[0][k] - a, e[:, None]).add_(sums[1][k] - a * e[:, None])
