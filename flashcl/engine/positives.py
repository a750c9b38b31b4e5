"""Positives whose logits are O(N D): they stay out of the tiles, in full precision, forward and backward.

Both kinds answer the same two questions, with t_i the mean of the positives of row i:

    mean_logits           <x_i, t_i>, (N,) float64
    add_gradients_        dx_i += w_i t_i,  dy_j += sum over the rows i of which j is a positive of w_i x_i / |P(i)|

Added in the wide accumulators before the gradient is rounded, a positive cancels exactly what it must cancel. Where x is
y, dx and dy are one accumulator, which receives both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partner:
    """One positive per row: the column index[i]. No column is the partner of two rows."""

    index: Tensor  # (N,) int64

    def mean_logits(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = _wide(x)
        products = (a.to(dtype) * y[j].to(dtype) for a, j in _in_chunks(x, self.index))
        return torch.cat([product.sum(1, dtype=torch.float64) for product in products])

    def add_gradients_(self, dx: Tensor | None, dy: Tensor | None, x: Tensor, y: Tensor, weight: Tensor) -> None:
        if dx is not None:
            for da, j, w in _in_chunks(dx, self.index, weight):
                da.addcmul_(y[j].to(da.dtype), w[:, None])
        if dy is not None:
            for a, j, w in _in_chunks(x, self.index, weight):
                dy.index_add_(0, j, a.to(dy.dtype) * w[:, None])


@dataclass(frozen=True)
class SameLabel:
    """All other rows with the label of the row; x and y are the same embeddings. Rows without one have t_i = 0."""

    group: Tensor  # (N,) int64: labels as numbers 0 ... N - 1
    count: Tensor  # (N,) how many positives each row has

    @staticmethod
    def of(labels: Tensor) -> SameLabel:
        # torch.unique would make the host wait for the number of groups.
        ordered, order = labels.sort(stable=True)
        starts = torch.cat([ordered.new_zeros(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
        group = torch.empty_like(order).scatter_(0, order, starts.cumsum(0))
        size = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
        return SameLabel(group, size[group] - 1)

    def mean_logits(self, x: Tensor, y: Tensor) -> Tensor:
        sums = self._group_sums(x, torch.ones(len(x), dtype=_wide(x), device=x.device))
        total = [((sums[k] - a.to(sums.dtype)) * a).sum(1) for a, k in _in_chunks(x, self.group)]
        return torch.cat(total).double() * self._inverse_count(torch.float64)

    def add_gradients_(self, dx: Tensor | None, dy: Tensor | None, x: Tensor, y: Tensor, weight: Tensor) -> None:
        ones, each = torch.ones_like(weight), weight * self._inverse_count(weight.dtype)
        for gradient, outer, inner in ((dx, each, ones), (dy, ones, each)):
            if gradient is None:
                continue
            sums = self._group_sums(x, inner)
            for g, a, k, o, i in _in_chunks(gradient, x, self.group, outer, inner):
                g.addcmul_(sums[k] - a.to(g.dtype) * i[:, None], o[:, None])

    def _inverse_count(self, dtype: torch.dtype) -> Tensor:
        return torch.where(self.count > 0, 1 / self.count.to(dtype), 0.0)

    def _group_sums(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sum of weight_i x_i over each group, (N, D): the number of groups is known to the device alone."""
        sums = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
        for a, k, w in _in_chunks(x, self.group, weight):
            # On a GPU index_put_ sorts and so adds in a fixed order; index_add_ would add in any.
            sums.index_put_((k,), a.to(w.dtype) * w[:, None], accumulate=True)
        return sums


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors a few rows at a time, side by side: bounds the wide copies that are made of them.

    By split, since a loop over row numbers would make torch.compile compile anew for each N.
    """
    return zip(*(v.split(1024) for v in tensors))
