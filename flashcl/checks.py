"""Arguments of the public functions: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from flashcl.dtypes import DTYPES, computed_dtype, statistic_dtype, to_statistic_dtype


def embeddings(group: object | None = None, **named: Tensor) -> None:
    """Matrices (rows, D) of one floating dtype on one device. Without a group there must be rows."""
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, D), got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.shape[1] == 0 or (x.shape[0] == 0 and group is None):
            raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(x.shape)}")
        if computed_dtype(x) != computed_dtype(first):
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {x.device}")
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{name} must have the D of {first_name}, {first.shape[1]}, got {x.shape[1]}")


def same_rows(first_name: str, first: Tensor, name: str, x: Tensor, why: str) -> None:
    if first.shape[0] != x.shape[0]:  # not len(), of which torch.export makes a constant
        raise ValueError(f"{name} must have the {first.shape[0]} rows of {first_name}, got {x.shape[0]}: {why}")


def scalar(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A number or a one-element real tensor, as a tensor on the device of x that passes gradients on."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
        return value.reshape(()).to(x.device)
    value, largest = number(name, value, "float or a one-element tensor"), torch.finfo(statistic_dtype(x)).max
    if largest < abs(value) < math.inf:
        raise ValueError(f"{name} must be within ±{largest:.2g}, what {str(statistic_dtype(x))[6:]} holds, got {value}")
    return _constant(value, x)


def number(name: str, value: float, kind: str = "float") -> float:
    """A number that is no tensor."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a {kind}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that float64 holds, got a larger one") from None


def _constant(value: float, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # `full` would make the number a constant of the graph, and the next one another graph
        return torch.zeros((), dtype=torch.float64, device=x.device) + value
    return torch.full((), value, dtype=statistic_dtype(x), device=x.device)


def logit_scale(x: Tensor, *, temperature: float | Tensor | None, logit_scale: float | Tensor | None) -> Tensor:
    """The one of the two that was given, as logit_scale = 1 / temperature."""
    if (temperature is None) == (logit_scale is None):
        raise ValueError(
            f"exactly one of temperature and logit_scale must be given, got temperature={temperature!r} and "
            f"logit_scale={logit_scale!r}"
        )
    return scalar("logit_scale", logit_scale, x) if temperature is None else inverse_temperature(temperature, x)


def inverse_temperature(temperature: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return to_statistic_dtype(scalar("temperature", temperature, x), x).reciprocal()
    value = number("temperature", temperature, "float or a one-element tensor")
    largest = torch.finfo(statistic_dtype(x)).max
    if not value > 0 or value * largest < 1:
        raise ValueError(f"temperature must be positive, and 1 / temperature at most {largest:.2g}, got {temperature}")
    # Before it is rounded, either way. PyTorch 2.11 makes a constant of a number in 1 / number.
    return _constant(value, x).reciprocal() if torch.compiler.is_compiling() else _constant(1 / value, x)


def vector(name: str, value: Tensor | None, rows: int, x: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def labels(value: Tensor, rows: int, z: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(value).__name__}")
    if value.shape != (rows,):
        raise ValueError(f"labels must have shape ({rows},), one for each row of z, got {tuple(value.shape)}")
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"labels must be integers or bools, got {value.dtype}")
    if value.device != z.device:
        raise ValueError(f"labels must be on the device of z, {z.device}, got {value.device}")


def one_of(name: str, value: object, allowed: tuple) -> None:
    if not (isinstance(value, (str, bool, type(None))) and value in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
