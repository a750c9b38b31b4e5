"""The losses in numpy, by formulas that keep a positive and its negatives apart: exact where the dense ones cancel.

For the contract alone, in float64 or longdouble: an oracle that shares nothing with the engine or with `flashcl.reference`.
Each loss is its values and G, the gradient with respect to the logits s; what follows from G is common to all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Upstream = Callable[[int], np.ndarray]  # the gradient that a vector of so many values receives


def evaluate(function: str, tensors: dict[str, np.ndarray], options: dict, upstream: Upstream) -> dict[str, np.ndarray]:
    """{"value": ..., "grad x": ...} of a loss by name, two values where it returns a pair; in the dtype of the tensors."""
    given = [name for name, v in tensors.items() if v.ndim == 2]
    normalize = options.get("normalize")
    length = {k: np.sqrt((tensors[k] ** 2).sum(1, keepdims=True)) if normalize else 1 for k in given}
    e = {name: tensors[name] / length[name] for name in given}
    symmetric = function in ("nt_xent", "sup_con")
    x, y = [np.concatenate(list(e.values()))] * 2 if symmetric else e.values()
    scale = tensors["logit_scale"] if "logit_scale" in tensors else 1 / tensors.get("temperature", x.dtype.type(1))
    cosines = x @ y.T
    s = scale * cosines + tensors.get("logit_bias", 0) + tensors.get("col_bias", 0)
    if "row_bias" in tensors:
        s = s + tensors["row_bias"][:, None]
    values, g = _VALUES_AND_G[function](s, options, upstream)

    dx, dy = scale * g @ y, scale * g.T @ x
    dx = np.split(dx + dy, np.cumsum([len(v) for v in e.values()])[:-1]) if symmetric else (dx, dy)
    d_scale = (g * cosines).sum()
    gradients = dict(zip(given, dx), logit_scale=d_scale, temperature=-(scale**2) * d_scale)
    gradients |= dict(logit_bias=g.sum(), row_bias=g.sum(1), col_bias=g.sum(0))
    if normalize:
        for k in given:
            gradients[k] = (gradients[k] - e[k] * (e[k] * gradients[k]).sum(1, keepdims=True)) / length[k]
    results = {"value" if i == 0 else f"value {i + 1}": v for i, v in enumerate(values)}
    return {k: np.asarray(v) for k, v in (results | {f"grad {name}": gradients[name] for name in tensors}).items()}


def _reduced(loss: np.ndarray, count: int, options: dict, upstream: Upstream) -> tuple[list, np.ndarray]:
    """(the value, the gradient that reaches each row) of a vector of losses."""
    match options.get("reduction", "mean"):
        case "none":
            return [loss], upstream(len(loss))
        case "sum":
            return [loss.sum()], np.ones(len(loss))
        case _:
            return [loss.sum() / max(count, 1)], np.full(len(loss), loss.dtype.type(1) / max(count, 1))


def _log_sum_exp(s: np.ndarray) -> np.ndarray:
    top = s.max(1)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(s - top[:, None]).sum(1)) + top


def _softmax(s: np.ndarray) -> np.ndarray:
    lse = _log_sum_exp(s)[:, None]
    return np.exp(s - np.where(np.isfinite(lse), lse, np.inf))


def _against_one(s: np.ndarray, partner: np.ndarray, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and d loss_i / d s_ij of rows with one positive; the mass of the negatives is no difference from 1."""
    rows = np.arange(len(s))
    positive, negatives = s[rows, partner], np.where(dropped, -np.inf, s)
    negatives[rows, partner] = -np.inf
    loss = np.logaddexp(0, _log_sum_exp(negatives) - positive)
    mass = np.exp(_log_sum_exp(negatives) - positive - loss)
    g = mass[:, None] * _softmax(negatives)
    g[rows, partner] = -mass
    return loss, g


def _info_nce(s: np.ndarray, options: dict, upstream: Upstream):
    nothing, own = np.zeros((), bool), np.arange(len(s))
    loss, g = _against_one(s, own, nothing)
    columns = None
    if options.get("symmetric", True):
        loss_of_columns, columns = _against_one(s.T, own, nothing)
        loss = (loss + loss_of_columns) / 2
    values, u = _reduced(loss, len(loss), options, upstream)
    g = u[:, None] * g
    return values, g if columns is None else (g + (u[:, None] * columns).T) / 2


def _siglip(s: np.ndarray, options: dict, upstream: Upstream):
    z = 2 * np.eye(len(s)) - 1
    values, u = _reduced(np.logaddexp(0, -z * s).sum(1), len(s), options, upstream)
    return values, -u[:, None] * z * np.exp(-np.logaddexp(0, z * s))


def _nt_xent(s: np.ndarray, options: dict, upstream: Upstream):
    loss, g = _against_one(s, np.roll(np.arange(len(s)), len(s) // 2), np.eye(len(s), dtype=bool))
    values, u = _reduced(loss, len(loss), options, upstream)
    return values, u[:, None] * g


def _sup_con(s: np.ndarray, options: dict, upstream: Upstream):
    labels, own = options["labels"], np.eye(len(s), dtype=bool)
    positive = (labels[:, None] == labels) & ~own
    counts = positive.sum(1, keepdims=True)
    share = positive / np.maximum(counts, 1).astype(s.dtype)
    others, counted = np.where(own, -np.inf, s), counts[:, 0] > 0
    loss = np.where(counted, _log_sum_exp(others) - (share * s).sum(1), 0)
    values, u = _reduced(loss, counted.sum(), options, upstream)
    return values, (u * counted)[:, None] * (_softmax(others) - share)


def _similarity_logsumexp(s: np.ndarray, options: dict, upstream: Upstream):
    s = np.where(np.eye(*s.shape, dtype=bool), -np.inf, s) if options.get("exclude") else s
    none, axis = dict(reduction="none"), options.get("axis", "both")
    rows, u = _reduced(_log_sum_exp(s), 0, none, upstream)
    cols, v = _reduced(_log_sum_exp(s.T), 0, none, upstream)
    of_rows, of_cols = u[:, None] * _softmax(s), (v[:, None] * _softmax(s.T)).T
    return {"both": (rows + cols, of_rows + of_cols), "rows": (rows, of_rows), "cols": (cols, of_cols)}[axis]


_VALUES_AND_G = {
    "info_nce": _info_nce,
    "siglip": _siglip,
    "nt_xent": _nt_xent,
    "sup_con": _sup_con,
    "similarity_logsumexp": _similarity_logsumexp,
}
