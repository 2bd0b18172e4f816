"""Distances between floating-point tensors, in units of their last place."""

import torch
from torch import Tensor


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers apart, element by element; 0.0 and -0.0 are one number."""
    return (_order(a) - _order(b)).abs()


def _order(x: Tensor) -> Tensor:
    """Integers in the order of the floating numbers, one apart for neighbours."""
    width = torch.int32 if x.dtype == torch.float32 else torch.int16
    bits = x.contiguous().view(width).long()
    return torch.where(bits < 0, torch.iinfo(width).min - bits, bits)


def largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def ulp(x: Tensor) -> Tensor:
    """Distance from x >= 0 to the next larger number."""
    return torch.nextafter(x, torch.full_like(x, torch.inf)) - x
