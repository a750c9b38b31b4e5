"""Positives whose logits are O(N D): they stay out of the tiles, in full precision, forward and backward.

Both kinds answer these questions, with t_i the mean of the positives of row i:

    products    <x_i, t_i>, (N,) float64
    in_tiles    the same as tiles have it, which must cancel against their other products
    finish      dx_i = scale (dx_i + w_i t_i)
                dy_j = scale (dy_j + sum of w_i x_i / |P(i)| over the rows i of which j is a positive)

Added in the wide accumulators before the gradient is rounded, a positive cancels exactly what it must cancel. Of a
triangular problem dx receives both. What runs over rows in chunks is a registered operator: one node to torch.compile,
whatever N.
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
    """One positive per row i: the column (i + shift) mod M of this rank. In a triangular problem partners have each other."""

    shift: int

    def found(self) -> tuple[Tensor, ...]:
        """What was found out and has to be kept for the backward: nothing."""
        return ()

    def products(self, p: Problem, backend: str) -> Tensor:
        return ops.partner_products(p.x, p.y, self.shift, backend)

    def tile_ratio(self, p: Problem, products: Tensor, backend: str) -> Tensor:
        """Products as tiles have them, relative to what they are: (1,) float64, about 1."""
        return ops.tile_ratio(p.x, p.y, products, self.shift, backend)

    def in_tiles(self, p: Problem, products: Tensor, deviation: None, backend: str) -> Tensor:
        return products * self.tile_ratio(p, products, backend)

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

    group: str
    number: Tensor  # (N,) int32: of the label of each row among those of all ranks; what backends compare
    slot: Tensor  # (N,) int64: of the label of each row among those of this rank
    ordered: Tensor  # (N,) int32 `number`, sorted; without elements if there is no group
    inverse: Tensor  # (N,) float64: 1 / |P(i)|, how many positives each row has; 0 without any

    def found(self) -> tuple[Tensor, ...]:
        """What `of` has found out: with it a backward makes this again."""
        return self.number, self.slot, self.ordered, self.inverse

    @staticmethod
    def of(labels: Tensor, group: str) -> SameLabel:
        """labels: (N,) int64. Nobody looks at them again: the caller may write to them."""
        return SameLabel(group, *_numbered(labels, group))

    def products(self, p: Problem, backend: str) -> Tensor:
        ones = torch.ones_like(p.x[:, 0], dtype=p.stat_dtype)[None]
        return _label_products(p.x, self._sums(p.x, ones), self.slot) * self.inverse

    def in_tiles(self, p: Problem, products: Tensor, deviation: Tensor, backend: str) -> Tensor:
        """deviation: of the logits of the positives from p.center, (N,), as a sweep of p has summed it."""
        seen = (p.center + deviation * self.inverse) / p.logit_scale
        return torch.where(seen.isfinite(), seen, products)

    def finish(
        self, p: Problem, dx: Tensor | None, dy: None, weight: Tensor, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor | None, None]:
        if dx is not None:
            each = torch.mul(weight, self.inverse, out=torch.empty_like(weight))  # rounds
            _add_labels_(dx, p.x, each, self._sums(p.x, torch.stack([torch.ones_like(each), each])), self.slot)
            dx = ops.finish(dx, None, None, 0, p.logit_scale, dtype, backend=backend)
        return dx, None

    def _sums(self, x: Tensor, weights: Tensor) -> Tensor:
        return _label_sums(x, self.number, self.slot, self.ordered, weights, self.group)


# ---- operators -----------------------------------------------------------------------------------------------------------


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of which the first is (N, D), some rows at a time, side by side: bounds the wide copies made of them.

    On a GPU in chunks of 64 MiB of float32, since each is a launch; on a CPU of 2 MiB, which its caches hold. (float64: twice.)
    """
    elements = 2**24 if tensors[0].is_cuda else 2**19
    rows = max(elements // tensors[0].shape[1], 1)
    return zip(*(v.split(rows) for v in tensors))


def _empty_numbers(labels, group):
    number, inverse = (torch.empty_like(labels, dtype=dtype) for dtype in (torch.int32, torch.float64))
    return number, torch.empty_like(labels), number.new_empty(0), inverse


@ops.operator("numbered", fake=_empty_numbers)
def _numbered(labels: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """number, slot, ordered and inverse of `SameLabel`. The number of a label is its first place among all of them, sorted."""
    everywhere = (distributed.labels_of_all(labels, group) if group else labels).sort().values
    first = torch.searchsorted(everywhere, labels)
    others = torch.searchsorted(everywhere, labels, right=True) - first - 1
    number, slot = first.to(torch.int32), first
    ordered = number.new_empty(0)
    if group:
        ordered = number.sort().values
        slot = torch.searchsorted(ordered, number)
    return number, slot, ordered, others.double().reciprocal_().nan_to_num_(posinf=0.0)


@ops.operator("label_sums", fake=lambda x, number, slot, ordered, weights, group: weights.new_empty(*weights.shape, x.shape[1]))
def _label_sums(x: Tensor, number: Tensor, slot: Tensor, ordered: Tensor, weights: Tensor, group: str) -> Tensor:
    """Sums of weights[p, j] x_j over all rows j, of all ranks, with one label, for each label that occurs here.

    x: (N, D). number, slot, ordered: `SameLabel`. weights: (P, N). Returns: (P, N, D), of which the label of row i has the
    place slot[i], since how many labels there are is known to the device alone.
    """
    # float64: a label may have all rows, and float32 sums as long would show in the gradient of logit_scale.
    sums = torch.zeros(*weights.shape, x.shape[1], dtype=torch.float64, device=x.device)
    if not group:
        _add_by_slot_(sums, x, slot, weights)
        return sums.to(weights.dtype)
    for y, of_y, w in distributed.label_blocks(x, number, weights, group):
        if len(number):  # if not, the other ranks still need the rows of this one: walk on
            to = torch.searchsorted(ordered, of_y).clamp(max=len(number) - 1)
            # Rows whose label does not occur here count as 0, whatever they hold: a weight of 0 would make NaN of infinity.
            _add_by_slot_(sums, y.masked_fill((ordered[to] != of_y)[:, None], 0.0), to, w)
    return sums.to(weights.dtype)


def _add_by_slot_(sums: Tensor, x: Tensor, slot: Tensor, weights: Tensor) -> None:
    for a, k, *each in _in_chunks(x, slot, *weights):
        a = a.to(sums.dtype)
        for total, w in zip(sums, each):
            # In a fixed order: on a GPU index_put_ sorts (index_add_ does not), on a CPU it is serial in float64, not in float32.
            total.index_put_((k,), a * w[:, None], accumulate=True)


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
