"""The truth that every provider is held against: value and gradients in float64, from formulas of their own.

Nothing here is shared with flashcl or with `flashcl.reference`, and no N x N matrix is stored. Where the gradients of
all rows would take too long, those of a sample of rows are computed, each still over all of its pairs; where one pass
over all pairs in float64 would, it runs in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcl.cli.bench.suites import Workload
from flashcl.contract import Case

AFFORDABLE_FLOPS = {"cuda": 3e14, "cpu": 5e11}  # some seconds
BLOCK_BYTES = {"cuda": 2**29, "cpu": 2**26}
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Exact:
    """`values` is what `measure.evaluate` returns, of the matrices only the `rows`."""

    what: str  # in words, for the reader of the results
    values: dict[str, Tensor]
    rows: dict[str, Tensor]
    magnitudes: dict[str, float]  # of the sums that may cancel: the sum of their terms without the signs

    def errors(self, out: dict[str, Tensor]) -> dict[str, float]:
        """Relative L2 errors of the quantities that are in both."""
        return {name: _ratio(self._error(out, name).norm(), self._size(name)) for name in self.values if name in out}

    def worst_rows(self, out: dict[str, Tensor]) -> dict[str, float]:
        """For each matrix the largest error of a row, relative to the size of its rows: one row that nobody wrote is
        lost in the sum over all. Rows that are not in the sample must at least be finite and not zero, as must those in it
        whose gradient is not next to nothing."""
        found = {}
        for name in self.rows.keys() & out.keys():
            sizes = self.values[name].norm(dim=1)
            typical = sizes.square().mean().sqrt().item()
            something = torch.ones(len(out[name]), dtype=torch.bool, device=sizes.device)
            something[self.rows[name]] = sizes > 1e-6 * typical
            written = out[name].isfinite().all() and out[name][something].any(dim=1).all()
            found[name] = _ratio(self._error(out, name).norm(dim=1).max(), typical) if written else math.inf
        return found

    def _error(self, out: dict[str, Tensor], name: str) -> Tensor:
        mine = out[name][self.rows[name]] if name in self.rows else out[name]
        return mine.to(self.values[name].dtype) - self.values[name]

    def _size(self, name: str) -> float:
        return self.magnitudes.get(name) or self.values[name].norm().item()


def _ratio(error: Tensor, size: float) -> float:
    error = error.item()
    return error / size if size and math.isfinite(error) else 0.0 if error == 0 else math.inf


def exact(work: Workload, case: Case, affordable: float | None = None) -> Exact:
    affordable = affordable or AFFORDABLE_FLOPS[case.device.type]
    dtype = torch.float64 if 2.0 * work.n**2 * work.d <= affordable else torch.float32
    logits = _Logits(work, case, dtype)
    value = logits.value()
    if 8.0 * work.n**2 * work.d <= affordable:
        rows, what = torch.arange(work.n, device=case.device), f"{dtype}, all gradients"
        gradients, magnitudes = logits.all_gradients()
    else:
        rows, what = _spread(work.n, case.device), f"{dtype}, gradients of {SAMPLED_ROWS} rows"
        gradients, magnitudes = logits.gradients_of(rows), {}
    values = dict(value=value) | _by_argument(case, gradients, rows)
    indices = _rows_by_argument(case, rows)
    return Exact(what.removeprefix("torch."), values, {k: v for k, v in indices.items() if k in values}, magnitudes)


def _spread(n: int, device) -> Tensor:
    """A sample that holds the first and the last row, and as many of each half: nt_xent has its views there."""
    return torch.linspace(0, n - 1, SAMPLED_ROWS, dtype=torch.float64, device=device).round().long()


def _matrices(case: Case) -> list[str]:
    return [name for name, v in case.tensors.items() if v.dim() == 2]


def _by_argument(case: Case, gradients: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """From gradients of the two sides of S and of the scale to gradients of the arguments of the loss."""
    names = _matrices(case)
    if case.function in ("nt_xent", "sup_con"):  # both sides are z
        dz = gradients["x"] + gradients["y"]
        first = rows < len(case.tensors[names[0]])
        matrices = [dz[first], dz[~first]][: len(names)]
    else:
        matrices = [gradients["x"], gradients["y"]]
    found = dict(zip((f"grad {name}" for name in names), matrices))
    if "scale" in gradients:
        for name in ("logit_scale", "temperature", "logit_bias"):
            if name in case.tensors:
                found[f"grad {name}"] = gradients[{"logit_bias": "bias"}.get(name, "scale")]
        if "temperature" in case.tensors:  # scale = 1 / temperature
            found["grad temperature"] = -found["grad temperature"] / case.tensors["temperature"].to(dz.dtype) ** 2
    return found


def _rows_by_argument(case: Case, rows: Tensor) -> dict[str, Tensor]:
    names = _matrices(case)
    if case.function in ("nt_xent", "sup_con"):
        half = len(case.tensors[names[0]])
        return dict(zip((f"grad {name}" for name in names), [rows[rows < half], rows[rows >= half] - half]))
    return {f"grad {name}": rows for name in names}


class _Logits:
    """S of one loss, any block of it, and what the loss makes of it; I and J are indices of rows and of columns."""

    def __init__(self, work: Workload, case: Case, dtype: torch.dtype):
        self.loss, self.n, self.device = work.loss, work.n, case.device
        self.own = case.function in ("nt_xent", "sup_con")  # S is of one set with itself, without the diagonal
        matrices = [case.tensors[name].to(dtype) for name in _matrices(case)]
        self.x, self.y = [torch.cat(matrices)] * 2 if self.own else matrices
        named = {name: v.to(dtype) for name, v in case.tensors.items() if v.dim() == 0}
        self.scale = named["logit_scale"] if "logit_scale" in named else 1 / named["temperature"]
        self.bias = named.get("logit_bias", 0)
        self.all = torch.arange(self.n, device=self.device)
        self.labels = case.options.get("labels")
        if self.loss == "sup_con":
            self.positives = self.labels.bincount()[self.labels] - 1
            self.anchors = (self.positives > 0).sum().clamp(min=1)
        self.block = max(1, BLOCK_BYTES[self.device.type] // (self.n * dtype.itemsize))

    def s(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, cosines) of a block."""
        cosines = self.x[i] @ self.y[j].T
        s = self.scale * cosines + self.bias
        return s.masked_fill_(i[:, None] == j, -torch.inf) if self.own else s, cosines

    def targets(self, i: Tensor, j: Tensor) -> Tensor:
        """How the weight of row i is spread over its positives."""
        if self.loss == "sup_con":
            same = (self.labels[i][:, None] == self.labels[j]) & (i[:, None] != j)
            return same / self.positives[i].clamp(min=1)[:, None].to(self.x.dtype)
        partner = (i + self.n // 2) % self.n if self.loss == "nt_xent" else i
        return (partner[:, None] == j).to(self.x.dtype)

    def positive(self) -> Tensor:
        """The logit of each row's positive, or the mean of several: O(N D)."""
        if self.loss == "sup_con":
            sums = self.x.new_zeros(int(self.labels.max()) + 1, self.x.shape[1]).index_add_(0, self.labels, self.x)
            return self.scale * (self.x * (sums[self.labels] - self.x)).sum(1) / self.positives.clamp(min=1)
        partner = self.y.roll(self.n // 2, 0) if self.loss == "nt_xent" else self.y
        return self.scale * (self.x * partner).sum(1) + self.bias

    def value(self) -> Tensor:
        """The loss; keeps the log-sum-exps of rows and columns for the gradients."""
        self.row_lse = torch.empty(self.n, dtype=self.x.dtype, device=self.device)
        self.col_lse = torch.full_like(self.row_lse, -torch.inf)
        positive, softplus = self.positive(), self.x.new_zeros(())
        for i in self.all.split(self.block):
            s, _ = self.s(i, self.all)
            if self.loss == "siglip":
                softplus += torch.nn.functional.softplus(s, threshold=1000).sum()
                continue
            self.row_lse[i] = s.logsumexp(1)
            if self.loss == "info_nce":
                self.col_lse = torch.logaddexp(self.col_lse, s.logsumexp(0))
        match self.loss:
            case "siglip":  # softplus(-s) = softplus(s) - s
                return (softplus - positive.sum()) / self.n
            case "info_nce":
                return ((self.row_lse + self.col_lse) / 2 - positive).mean()
            case "sup_con":
                return ((self.row_lse - positive) * (self.positives > 0)).sum() / self.anchors
        return (self.row_lse - positive).mean()

    def g(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of the loss with respect to a block of S, cosines)."""
        s, cosines = self.s(i, j)
        if self.loss == "siglip":
            return (s.sigmoid() - self.targets(i, j)) / self.n, cosines
        g = (s - self.row_lse[i][:, None]).exp_() - self.targets(i, j)
        if self.loss == "sup_con":
            return g * (self.positives[i] > 0)[:, None] / self.anchors, cosines
        if self.loss == "info_nce":
            g = (g + (s - self.col_lse[j]).exp_() - self.targets(i, j)) / 2
        return g / self.n, cosines

    def all_gradients(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        dx, dy = torch.empty_like(self.x), torch.zeros_like(self.y)
        terms = torch.zeros(4, dtype=self.x.dtype, device=self.device)  # of scale and bias, signed and not
        for i in self.all.split(self.block):
            g, cosines = self.g(i, self.all)
            dx[i] = self.scale * (g @ self.y)
            dy += self.scale * (g.T @ self.x[i])
            terms += torch.stack([(g * cosines).sum(), g.sum(), (g * cosines).abs().sum(), g.abs().sum()])
        scale, bias, of_scale, of_bias = terms
        magnitudes = {
            "grad logit_scale": of_scale,
            "grad temperature": of_scale * self.scale**2,
            "grad logit_bias": of_bias,
        }
        return dict(x=dx, y=dy, scale=scale, bias=bias), {name: v.item() for name, v in magnitudes.items()}

    def gradients_of(self, rows: Tensor) -> dict[str, Tensor]:
        return dict(
            x=self.scale * torch.cat([self.g(i, self.all)[0] @ self.y for i in rows.split(self.block)]),
            y=self.scale * torch.cat([self.g(self.all, j)[0].T @ self.x for j in rows.split(self.block)]),
        )
