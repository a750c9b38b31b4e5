"""The numeric contract: how near every loss value and every gradient must be to the truth, as arithmetic.

The truth `ref` is the dense formula of `flashcl.reference` in float64, on the same rounded inputs. A result holds when

    max|out - ref| <= 2 max|dense - ref| + 2 rounding            dense: the dense formula in the dtype of the inputs
    rms(out - ref) <= 2 rms(dense - ref) + 2 rounding            rounding: of ref to the dtype of out, see `_rounding`

and for bfloat16 and float16 inputs, where that dense formula is itself poor, also

    |out - ref|_2 <= t |ref|_2 + 4 |dense32 - ref|_2 + u         dense32: the dense formula in float32; t: `TIGHT`
                                                                 u: what ref loses in the dtype of out by underflow

The error of a dense formula is the largest over a few orders of the rows and features: a single number, such as the
gradient of a temperature, is right by luck in any one of them. (A 16-bit formula errs by rounding each logit, in every
order alike: there single numbers have only the tight bound.) Where ref is NaN or infinite, out must be so too, and
nowhere else. A dense formula that overflows where ref does not promises nothing, and leaves only the tight bound; a
relative error means nothing where ref vanishes, that is where dense32 has not one digit of it.

The dense formula in float64 cannot judge results in float64, nor losses near its own rounding: there the truth is
`flashcl.exact_formulas`.

`case` makes inputs for a loss in a regime, `check` judges one call: `flashcl check` and the tests consist of these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flashcl
from flashcl import exact_formulas, reference

TIGHT = {  # relative L2 error of (a value, a gradient) that the formats allow a kernel which rounds G to them
    torch.bfloat16: (2e-3, 8e-3),
    torch.float16: (5e-4, 2e-3),
}

# Losses of softmax down to here are right in float64 to 1e-8: they are differences of logits, of up to about 100.
RESOLVED = 1e-6

# ---- inputs ----------------------------------------------------------------------------------------------------------

Draw = Callable[[Tensor, int, torch.Generator], Tensor]  # (identities (N,), D) -> (N, D): a view of each identity


@dataclass(frozen=True)
class Regime:
    """A stage of training, or a corner of the input space: what embeddings look like there, and the temperature."""

    temperature: float
    draw: Draw


def _normal(ids: Tensor, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(len(ids), d, generator=generator, dtype=torch.float64)


def _centers(ids: Tensor, d: int, seed: int = 1) -> Tensor:
    """A direction for each identity, the same in every call. In few dimensions they stand on a circle, far apart."""
    if d == 1:
        return torch.where(ids % 2 == 0, 1.0, -1.0).double()[:, None]
    if d == 2:
        return torch.stack([torch.cos(2.4 * ids.double()), torch.sin(2.4 * ids.double())], dim=1)
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(int(ids.max()) + 1, d, generator=generator, dtype=torch.float64), dim=1)[ids]


def _random(ids, d, generator):
    return F.normalize(_normal(ids, d, generator), dim=1)


def _converged(ids, d, generator):
    return F.normalize(_centers(ids, d) + 0.1 / math.sqrt(d) * _normal(ids, d, generator), dim=1)


def _cone(ids, d, generator):
    mean = math.sqrt(d) * _centers(torch.zeros(1, dtype=torch.long), d)
    return F.normalize(3 * mean + _normal(ids, d, generator), dim=1)  # cosines around 9 / (9 + 1)


def _large(ids, d, generator):
    x = _random(ids, d, generator) * 100
    x[:2] = 100 / math.sqrt(d)  # the first logits are 1e4, the others spread below
    return x


def _collapsed(ids, d, generator):
    """Alike to a few percent. Of rows equal bit by bit the dense formula cancels every rounding, and shows no error."""
    return F.normalize(_centers(torch.zeros_like(ids), d) + 0.03 * _normal(ids, d, generator), dim=1)


def _duplicates(ids, d, generator):
    """Every fourth identity is that of the one before it: a negative as near as a positive."""
    distinct = _random(torch.arange(int(ids.max()) + 1), d, generator)
    return distinct[ids - (ids % 4 == 3).long()]


REGIMES = {
    "init": Regime(0.07, _random),
    "converged": Regime(0.05, _converged),  # p_ii > 0.999 in 64 or more dimensions
    "saturated": Regime(0.01, _converged),  # losses of 1e-20
    "cone": Regime(0.07, _cone),  # embeddings share a large mean, as those of deep networks do at initialisation
    "t=0.005": Regime(0.005, _random),
    "t=0.01": Regime(0.01, _random),
    "t=0.5": Regime(0.5, _random),
    "t=1": Regime(1.0, _random),
    "t=10": Regime(10.0, _random),
    "unnormalised": Regime(1.0, _normal),
    "large": Regime(1.0, _large),
    "collapsed": Regime(0.07, _collapsed),
    "duplicates": Regime(0.07, _duplicates),
}


@dataclass(frozen=True)
class Case:
    """One call. `tensors` receive gradients (matrices are embeddings, others scales and biases); `options` do not."""

    function: str  # its name in flashcl and in flashcl.reference
    tensors: dict[str, Tensor]
    options: dict[str, object]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """Embeddings in dtype, scales and biases in the dtype of the statistics."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {k: v.to(device, dtype if v.dim() == 2 else wide) for k, v in self.tensors.items()}
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, tensors=tensors, options=options)


LOSSES = ("info_nce", "info_nce one-way", "siglip", "nt_xent", "sup_con", "logsumexp", "logsumexp off-diagonal")


def case(loss: str, regime: str, n: int = 48, m: int | None = None, d: int = 16, seed: int = 0, **options) -> Case:
    """Inputs in float64 for one of LOSSES in one of REGIMES. m counts where the loss takes M != N; it is n + n // 2 + 1
    unless given. `options` go to the loss."""
    generator, r = torch.Generator().manual_seed(seed), REGIMES[regime]
    one_way = loss == "info_nce one-way" or loss.startswith("logsumexp")
    m = n if not one_way else n + n // 2 + 1 if m is None else m
    x, y = (r.draw(torch.arange(rows), d, generator) for rows in (n, m))
    t = torch.tensor(r.temperature, dtype=torch.float64)

    def made(function, options=options, **tensors):
        return Case(function, tensors, options)

    match loss:
        case "info_nce":
            return made("info_nce", x=x, y=y, logit_scale=1 / t)
        case "info_nce one-way":
            return made("info_nce", dict(symmetric=False) | options, x=x, y=y, temperature=t)
        case "siglip":
            return made("siglip", x=x, y=y, logit_scale=1 / t, logit_bias=-0.7 / t)
        case "nt_xent":
            return made("nt_xent", z1=x, z2=y, temperature=t)
        case "sup_con":
            labels = torch.randint(max(1, n // 3), (n,), generator=generator)  # of all sizes, some of one row
            return made("sup_con", dict(labels=labels) | options, z=r.draw(labels, d, generator), temperature=t)
        case "logsumexp" | "logsumexp off-diagonal":
            exclude = None if loss == "logsumexp" else "diagonal"
            biases = (torch.randn(rows, generator=generator, dtype=torch.float64) for rows in (n, m))
            tensors = dict(zip(("row_bias", "col_bias"), biases), x=x, y=y, logit_scale=1 / t)
            return made("similarity_logsumexp", dict(exclude=exclude) | options, **tensors)
        case _:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")


# ---- one evaluation --------------------------------------------------------------------------------------------------


def evaluate(function: Callable, c: Case, order: Order | None = None) -> dict[str, Tensor]:
    """{"value": ..., "grad x": ...}, two values where the function returns a pair.

    Vectors of values receive an upstream gradient that differs from row to row; `order` says how rows were reordered.
    """
    leaves = {name: v.detach().clone().requires_grad_() for name, v in c.tensors.items()}
    values = function(**leaves, **c.options)
    values = values if isinstance(values, tuple) else (values,)
    weights = [upstream(v, None if order is None else order.of_value(c, side)) for side, v in enumerate(values)]
    gradients = torch.autograd.grad(values, list(leaves.values()), weights)
    named = {"value" if i == 0 else f"value {i + 1}": v.detach() for i, v in enumerate(values)}
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients)}


def upstream(value: Tensor, order: Tensor | None = None) -> Tensor:
    """The upstream gradient of a value: of 8 bits of mantissa, so that it is the same number in every dtype."""
    if value.dim() == 0:
        return torch.ones_like(value)
    seed = torch.Generator().manual_seed(7 + len(value))
    weights = torch.randn(value.shape, generator=seed).bfloat16()
    if order is not None:
        weights = weights[order.cpu()]
    return weights.to(value)


# ---- the bounds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One bound on one quantity."""

    quantity: str  # "value", "grad x", ...
    bound: str  # "max", "rms", "tight" or "non-finite"
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed

    def __repr__(self) -> str:
        ratio = self.error / self.allowed if self.allowed else math.inf if self.error else 0.0
        return f"{self.quantity} {self.bound}: {self.error:.3g}, allowed {self.allowed:.3g} (x {ratio:.3g})"


@dataclass(frozen=True)
class Truth:
    """A reference value as high + low: where out is float64, high alone would be no better than out."""

    high: Tensor  # float64
    low: Tensor | float = 0.0

    def error(self, out: Tensor) -> Tensor:
        return (out.double() - self.high) - self.low


def judge(
    quantity: str,
    out: Tensor,
    truth: Truth,
    dense: list[Tensor],  # errors of the dense formula in the dtype of the inputs: one evaluation, or several
    dense32: list[Tensor] | None = None,  # errors of the dense formula in float32
    tight: float | None = None,  # the relative L2 error that the dtype allows, None for no such bound
) -> list[Finding]:
    """Every bound on one quantity."""
    ref = truth.high
    if out.shape != ref.shape:
        raise AssertionError(f"{quantity}: shape {tuple(out.shape)}, the reference has {tuple(ref.shape)}")
    rounded = ref.to(out.dtype)  # inf where the dtype holds no such number
    both = rounded.isfinite() & out.isfinite()
    same = (out == rounded) | (out.isnan() & rounded.isnan())
    findings = [Finding(quantity, "non-finite", int((~both & ~same).sum()), 0)]
    if not both.any():
        return findings
    error, ref = truth.error(out)[both], ref[both]
    if tight is not None and _l2(ref) <= 4 * _largest(_l2, dense32, both):
        tight = None
    for bound, norm in (("max", _max), ("rms", _rms)) if ref.numel() > 1 or tight is None else ():
        allowed = 2 * _largest(norm, dense, both) + 2 * _rounding(ref, out.dtype, norm)
        findings.append(Finding(quantity, bound, norm(error), allowed))
    if tight is not None:
        allowed = tight * _l2(ref) + 4 * _largest(_l2, dense32, both) + _underflow(ref, out.dtype)
        findings.append(Finding(quantity, "tight", _l2(error), allowed))
    return findings


def _largest(norm: Callable, errors: list[Tensor], where: Tensor) -> float:
    norms = [norm(error[where]) for error in errors]
    return math.inf if any(map(math.isnan, norms)) else max(norms)


def _rounding(ref: Tensor, dtype: torch.dtype, norm: Callable) -> float:
    """What ref loses in dtype: as measured, which knows underflow, and at least half a unit in the last place of it.

    The measured loss of one number may be 0 by luck, the half unit never is.
    """
    return max(norm(ref.to(dtype).double() - ref), torch.finfo(dtype).eps / 2 * norm(ref))


def _underflow(ref: Tensor, dtype: torch.dtype) -> float:
    """What ref loses in dtype beyond half a unit in the last place of each number: gradients of 1 / N end up below float16."""
    return max(_l2(ref.to(dtype).double() - ref) - torch.finfo(dtype).eps / 2 * _l2(ref), 0.0)


def _l2(a: Tensor) -> float:
    return a.norm().item()


def _max(a: Tensor) -> float:
    return a.abs().max().item()


def _rms(a: Tensor) -> float:
    return a.square().mean().sqrt().item()


def check(
    c: Case,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    function: Callable | None = None,
) -> list[Finding]:
    """Every bound on every value and gradient of one call. `function` takes the place of flashcl's own."""
    return Yardstick.of(c.to(dtype, device)).check(backend, function)


@dataclass(frozen=True)
class Yardstick:
    """What the results of a case are held against: the same for all backends, and most of the work."""

    case: Case
    dtype: torch.dtype
    truth: dict[str, Truth]
    dense: list[dict[str, Tensor]]
    dense32: list[dict[str, Tensor]] | None

    @staticmethod
    def of(c: Case) -> Yardstick:
        """c: embeddings in the dtype, and on the device, that is judged."""
        dtype, truth = next(v.dtype for v in c.tensors.values() if v.dim() == 2), truth_of(c)
        dense32 = dense_errors(c.to(torch.float32, c.device), truth) if dtype in TIGHT else None
        return Yardstick(c, dtype, truth, dense_errors(c, truth), dense32)

    def check(self, backend: str = "auto", function: Callable | None = None) -> list[Finding]:
        """Every bound on every value and gradient, of a backend or of `function`."""
        return self.findings(self.results(backend, function))

    def results(self, backend: str = "auto", function: Callable | None = None) -> dict[str, Tensor]:
        """What `evaluate` returns for flashcl's function on a backend, or for `function`."""
        if function is not None:
            return evaluate(function, self.case)
        c = replace(self.case, options=self.case.options | dict(backend=backend))
        return evaluate(getattr(flashcl, c.function), c)

    def findings(self, results: dict[str, Tensor]) -> list[Finding]:
        """Every bound on every value and gradient."""
        findings = []
        for quantity, truth in self.truth.items():
            tight = TIGHT[self.dtype][quantity.startswith("grad")] if self.dtype in TIGHT else None
            dense = [e[quantity] for e in self.dense]
            dense32 = None if self.dense32 is None else [e[quantity] for e in self.dense32]
            findings += judge(quantity, results[quantity], truth, dense=dense, dense32=dense32, tight=tight)
        return findings

    def worst(self, errors: dict[str, Tensor]) -> float:
        """The largest relative L2 error of all values and gradients."""
        relative = [errors[quantity].norm() / truth.high.norm() for quantity, truth in self.truth.items()]
        return torch.stack(relative).max().item()  # NaN if one is, unlike Python's max


def truth_of(c: Case) -> dict[str, Truth]:
    if next(iter(c.tensors.values())).dtype == torch.float64:
        return exact_truth(c, np.longdouble)
    ref = evaluate(getattr(reference, c.function), c.to(torch.float64, c.device))
    if ref["value"].abs().max() < RESOLVED:
        return exact_truth(c, np.float64)
    return {quantity: Truth(v) for quantity, v in ref.items()}


def exact_truth(c: Case, real: type) -> dict[str, Truth]:
    """What `evaluate` returns, by `exact_formulas` in numpy's float64 or longdouble (64 bits of mantissa on x86)."""

    def weights(n: int) -> np.ndarray:
        return upstream(torch.empty(n, dtype=torch.float64)).numpy()

    tensors = {name: v.double().cpu().numpy().astype(real) for name, v in c.tensors.items()}
    options = {name: v.cpu().numpy() if isinstance(v, Tensor) else v for name, v in c.options.items()}
    truth = {}
    for quantity, v in exact_formulas.evaluate(c.function, tensors, options, weights).items():
        high = v.astype(np.float64)
        low = np.where(np.isfinite(v), v - high.astype(np.longdouble), 0).astype(np.float64)
        truth[quantity] = Truth(torch.from_numpy(high).to(c.device), torch.from_numpy(low).to(c.device))
    return truth


def dense_errors(c: Case, truth: dict[str, Truth], orders: int = 16) -> list[dict[str, Tensor]]:
    """Errors of the dense formula on the tensors of c as they are, in several orders of rows, columns and features."""
    dense, errors = getattr(reference, c.function), []
    for seed in range(orders):
        order = Order.of(c, seed)
        result = order.undo(c, evaluate(dense, order.apply(c), order))
        errors.append(errors_of(result, truth))
    return errors


def errors_of(results: dict[str, Tensor], truth: dict[str, Truth]) -> dict[str, Tensor]:
    return {quantity: v.error(results[quantity]) for quantity, v in truth.items()}


def violations(*args, **kwargs) -> list[Finding]:
    """The findings of `check` that do not hold."""
    return [finding for finding in check(*args, **kwargs) if not finding.holds]


# ---- the same sums in another order ----------------------------------------------------------------------------------

# Names of tensors with an entry for each row, or for each column, of S.
ROWS, COLS = ("x", "z1", "z", "row_bias", "labels"), ("y", "z2", "col_bias")


@dataclass(frozen=True)
class Order:
    """A permutation of the rows, of the columns and of the features that changes no loss: positives stay positives."""

    rows: Tensor
    cols: Tensor
    features: Tensor

    @staticmethod
    def of(c: Case, seed: int) -> Order:
        """For inputs like those of c; the seed 0 gives the order that they have."""
        matrices = [v for v in c.tensors.values() if v.dim() == 2]
        n, m, d = len(matrices[0]), len(matrices[-1]), matrices[0].shape[1]
        generator = torch.Generator().manual_seed(seed)

        def shuffle(k: int) -> Tensor:
            order = torch.randperm(k, generator=generator) if seed else torch.arange(k)
            return order.to(c.device)

        paired = shuffle(min(n, m))
        rows, cols = (torch.cat([paired, len(paired) + shuffle(k - len(paired))]) for k in (n, m))
        return Order(rows, cols, shuffle(d))

    def apply(self, c: Case) -> Case:
        def reorder(named):
            return {k: self._index(k, v) if isinstance(v, Tensor) else v for k, v in named.items()}

        return replace(c, tensors=reorder(c.tensors), options=reorder(c.options))

    def undo(self, c: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
        back = Order(*(p.argsort() for p in (self.rows, self.cols, self.features)))
        undone = {}
        for name, v in results.items():
            if name.startswith("grad"):
                undone[name] = back._index(name.removeprefix("grad "), v)
            else:
                undone[name] = v if v.dim() == 0 else v[self.of_value(c, int(name != "value")).argsort()]
        return undone

    def of_value(self, c: Case, side: int) -> Tensor:
        """How the entries of a vector of values are ordered; side 1 is the second of two."""
        if c.function == "nt_xent":
            return torch.cat([self.rows, len(self.rows) + self.cols])
        return self.cols if side == 1 or c.options.get("axis") == "cols" else self.rows

    def _index(self, name: str, v: Tensor) -> Tensor:
        if name in ROWS:
            v = v[self.rows]
        elif name in COLS:
            v = v[self.cols]
        return v[:, self.features] if v.dim() == 2 else v
