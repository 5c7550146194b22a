"""Checks shared by the formats: a weight that has no quantized form is an error, never repaired in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from runner.errors import UserError

T = TypeVar("T")


class WeightError(UserError):
    """A weight that cannot be quantized; `named` puts the tensor's name in front."""


def named(name: str, function: Callable[..., T], *args: object) -> T:
    """function(*args), whose WeightError becomes a UserError that names the weight."""
    try:
        return function(*args)
    except WeightError as error:
        raise UserError(f"{name}: {error.problem}", fix=error.fix, key=error.key) from None


def as_bf16(weight: torch.Tensor) -> torch.Tensor:
    """bf16 of a floating-point weight; masters are rounded to bf16 before anything else happens to them."""
    if not weight.is_floating_point():
        raise WeightError(f"dtype {weight.dtype} is not floating point: is it quantized already?")
    if weight.dim() < 2:
        raise WeightError(f"shape {tuple(weight.shape)}: only matrices [..., out, in] are quantized")
    return weight.detach().to(torch.bfloat16)


def check_amax(amax: torch.Tensor, limit: float) -> None:
    """Raise WeightError if an amax is NaN or infinite, or so large that its grid leaves bf16.

    A NaN or an infinity in a group makes its amax NaN or infinite, so looking at amax alone is enough.
    """
    if amax.numel() == 0:
        return
    if not torch.isfinite(amax).all():
        kind = "NaN" if torch.isnan(amax).any() else "infinite"
        raise WeightError(f"holds {kind} values in {int((~torch.isfinite(amax)).sum())} of {amax.numel()} groups")
    if float(amax.max()) > limit:
        raise WeightError(f"holds the value {float(amax.max()):.4g}: its quantized form would overflow bf16")


def check_scale(scale: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Kept scales must be finite, positive and of the shape that the weight's grid has."""
    if tuple(scale.shape) != shape:
        raise WeightError(f"kept scales have shape {tuple(scale.shape)}, the grid needs {shape}")
    values = scale.float()
    if not (torch.isfinite(values) & (values > 0)).all():
        raise WeightError("kept scales hold values that are not positive and finite")
