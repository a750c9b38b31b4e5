"""The dense losses: every logit stored, every formula as its paper writes it, gradients by ordinary autograd.

This is the oracle that the fused kernels are tested against, and a slow but simple implementation to read. Nothing here
is shared with them. All functions can be differentiated twice.

What is computed in which dtype:

* float64 and float32 inputs: everything in that dtype; results come back in it.
* bfloat16 and float16 inputs: what a plain PyTorch user would get. Normalisation (if asked for) and the logits, that is
  ``x @ y.T``, the scale or temperature and the scalar bias, are rounded to the input dtype after each operation; the
  stored logits are then cast to float32, and softmax / log-sum-exp / sigmoid, sums and means run there, as under
  autocast. Results are float32. (A ``row_bias`` or ``col_bias`` of a wider dtype widens the logits when it is added,
  by PyTorch's ordinary promotion.)

Notation: s_ij is the logit of anchor x_i and candidate y_j, t the temperature, so s_ij = <x_i, y_j> / t or
logit_scale * <x_i, y_j>. Temperatures, scales and scalar biases are numbers or one-element tensors; tensors receive
gradients. ``reduction`` is "mean", "sum" or "none" (one value per anchor); the mean over no rows at all is NaN, as
elsewhere in PyTorch, except in `sup_con`.
"""

from __future__ import annotations

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    symmetric: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE: loss_i = -log( exp(s_ii) / sum_j exp(s_ij) ); symmetric: the mean of this and the same over columns.

    x is (N, D) and y is (M, D); y[i] is the positive of x[i] and every other row of y is a negative. N = M, or M >= N
    with symmetric=False. Give exactly one of temperature and logit_scale. Returns a scalar, or (N,) for "none".

    Source: van den Oord et al. 2018 (arXiv:1807.03748), eq. 4; the symmetric form is CLIP, Radford et al. 2021
    (arXiv:2103.00020), fig. 3.
    """
    _check_embeddings(x=x, y=y)
    if (temperature is None) == (logit_scale is None):
        raise ValueError(
            "expected exactly one of temperature and logit_scale, "
            f"got temperature={temperature!r} and logit_scale={logit_scale!r}"
        )
    n, m = len(x), len(y)
    if symmetric and n != m:
        raise ValueError(f"y: expected as many rows as x ({n}) with symmetric=True, got {m}")
    if n > m:
        raise ValueError(f"y: expected at least as many rows as x ({n}), got {m}")
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)

    if temperature is not None:
        s = x @ y.T / _scalar(temperature, "temperature")
    else:
        s = x @ y.T * _scalar(logit_scale, "logit_scale")
    s = _widen(s, x.dtype)
    loss = -s.log_softmax(dim=1).diagonal()
    if symmetric:
        loss = (loss - s.log_softmax(dim=0).diagonal()) / 2
    return _reduce(loss, reduction)


def siglip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """SigLIP: loss_i = sum_j -log sigmoid(z_ij s_ij), s_ij = logit_scale <x_i, y_j> + logit_bias, z_ii = 1, else -1.

    x and y are (N, D); y[i] is the positive of x[i]. "mean" is the sum over all pairs divided by N (not by N^2), "sum"
    the sum over all pairs, "none" the (N,) row sums.

    Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
    """
    _check_embeddings(x=x, y=y)
    n, m = len(x), len(y)
    if n != m:
        raise ValueError(f"y: expected as many rows as x ({n}), got {m}")
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)

    s = x @ y.T * _scalar(logit_scale, "logit_scale") + _scalar(logit_bias, "logit_bias")
    s = _widen(s, x.dtype)
    z = 2 * torch.eye(n, dtype=s.dtype, device=s.device) - 1
    # -logsigmoid(a) is softplus(-a), without the cut-off at 20 that costs F.softplus 2e-9.
    loss = -F.logsigmoid(z * s).sum(dim=1)
    return _reduce(loss, reduction)


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """NT-Xent: loss_i = -log( exp(s_{i,p(i)}) / sum_{a != i} exp(s_ia) ), p(i) the other view of i, over all 2N views.

    z1 and z2 are (N, D), two views of the same N samples; s is the (2N, 2N) similarity of z = [z1; z2] with itself.
    The mean runs over the 2N anchors; "none" returns (2N,), the rows of z1 first.

    Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709), eq. 1 (with normalize=True, its cosine similarity).
    """
    _check_embeddings(z1=z1, z2=z2)
    n = len(z1)
    if n != len(z2):
        raise ValueError(f"z2: expected as many rows as z1 ({n}), got {len(z2)}")
    z = torch.cat([z1, z2])
    if normalize:
        z = F.normalize(z, dim=1)

    s = z @ z.T / _scalar(temperature, "temperature")
    s = _widen(s, z.dtype)
    log_p = _log_softmax_over_others(s)
    loss = -torch.cat([log_p.diagonal(n), log_p.diagonal(-n)])  # (i, i + N) for the rows of z1, (i + N, i) for z2
    return _reduce(loss, reduction)


def sup_con(
    z: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.07, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """SupCon: loss_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{a != i} exp(s_ia) ).

    z is (N, D), labels (N,) of integers (or bools); P(i) = {p != i : labels[p] == labels[i]} are the positives of i.
    An anchor without a positive has loss 0 and does not count: the mean is over the anchors that have one. If none
    has, the result is 0 and its gradient is 0.

    Source: Khosla et al. 2020 (arXiv:2004.11362), eq. 2, the form L_out.
    """
    _check_embeddings(z=z)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {got}")
    if labels.shape != (len(z),):
        raise ValueError(f"labels: expected shape ({len(z)},), one label per row of z, got {tuple(labels.shape)}")
    if normalize:
        z = F.normalize(z, dim=1)

    s = z @ z.T / _scalar(temperature, "temperature")
    s = _widen(s, z.dtype)
    log_p = _log_softmax_over_others(s)
    positive = (labels[:, None] == labels[None, :]) & ~_diagonal(s)
    n_positive = positive.sum(dim=1)
    loss = -torch.where(positive, log_p, 0).sum(dim=1) / n_positive.clamp(min=1)
    if reduction == "mean":
        return loss.sum() / (n_positive > 0).sum().clamp(min=1)
    return _reduce(loss, reduction)


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    exclude: str | None = None,
    axis: str = "both",
) -> Tensor | tuple[Tensor, Tensor]:
    """row_lse_i = log sum_j exp(s_ij) and col_lse_j = log sum_i exp(s_ij), over the pairs that count.

    s_ij = logit_scale <x_i, y_j> + row_bias_i + col_bias_j; x is (N, D), y (M, D), row_bias (N,), col_bias (M,).
    exclude="diagonal" leaves the pairs (i, i) out. Returns (row_lse (N,), col_lse (M,)) for axis="both", row_lse alone
    for "rows", col_lse alone for "cols". A row or column without any pair gives -inf and passes no gradient on.

    Source: the denominator of the softmax losses above, e.g. van den Oord et al. 2018 (arXiv:1807.03748), eq. 4.
    """
    _check_embeddings(x=x, y=y)
    if exclude not in (None, "diagonal"):
        raise ValueError(f'exclude: expected None or "diagonal", got {exclude!r}')
    if axis not in ("both", "rows", "cols"):
        raise ValueError(f'axis: expected "both", "rows" or "cols", got {axis!r}')

    s = x @ y.T * _scalar(logit_scale, "logit_scale")
    if row_bias is not None:
        s = s + _vector(row_bias, "row_bias", len(x))[:, None]
    if col_bias is not None:
        s = s + _vector(col_bias, "col_bias", len(y))[None, :]
    s = _widen(s, x.dtype)
    if exclude == "diagonal":
        s = s.masked_fill(_diagonal(s), -torch.inf)
    if axis == "rows":
        return _logsumexp(s, dim=1)
    if axis == "cols":
        return _logsumexp(s, dim=0)
    return _logsumexp(s, dim=1), _logsumexp(s, dim=0)


def _widen(s: Tensor, input_dtype: torch.dtype) -> Tensor:
    """Logits in the dtype that losses are computed in: float64 for float64 inputs, else float32."""
    return s.to(torch.float64 if input_dtype == torch.float64 else torch.float32)


def _diagonal(s: Tensor) -> Tensor:
    """Where s_ii sits: a mask of the shape of s."""
    return torch.eye(*s.shape, dtype=torch.bool, device=s.device)


def _log_softmax_over_others(s: Tensor) -> Tensor:
    """s_ij - log sum_{a != i} exp(s_ia), for j != i.

    s_ii becomes the lowest finite number, which has weight exp(...) = 0 beside any other; -inf would make the gradient
    of a row with nothing else in it NaN.
    """
    return s.masked_fill(_diagonal(s), torch.finfo(s.dtype).min).log_softmax(dim=1)


def _logsumexp(s: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with gradient 0 (not NaN) where every entry is -inf."""
    empty = s.isneginf().all(dim=dim, keepdim=True)
    return s.masked_fill(empty, 0).logsumexp(dim=dim).masked_fill(empty.squeeze(dim), -torch.inf)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')


def _scalar(value: float | Tensor, name: str) -> float | Tensor:
    """A number as it is, a one-element tensor as 0-d: then it does not decide the dtype of the logits."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a one-element tensor, got shape {tuple(value.shape)}")
        return value.reshape(())
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{name}: expected a number or a one-element tensor, got {type(value).__name__}")


def _vector(value: Tensor, name: str, length: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(value.shape)}")
    return value


def _check_embeddings(**embeddings: Tensor) -> None:
    """Every argument a 2-d floating-point tensor, all of one width, dtype and device."""
    first_name, first = next(iter(embeddings.items()))
    for name, value in embeddings.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        if value.ndim != 2:
            raise ValueError(f"{name}: expected shape (rows, features), got {tuple(value.shape)}")
        if value.shape[1] != first.shape[1]:
            raise ValueError(f"{name}: expected {first.shape[1]} features like {first_name}, got {value.shape[1]}")
        if value.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {value.dtype}")
        if value.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} like {first_name}, got {value.device}")
