"""Tensors for the tests of messages, and what makes two of them the same."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit: NaNs and the sign of zero count."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integer = BITS[a.itemsize]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def sparse(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 9
    # Not by a product, which would make zeros of either sign.
    return values.where(torch.rand(shape, generator=generator) < density, 0).to(dtype)


def around_zero(seed: int = 0) -> Tensor:
    """Many negative, and some so small that squares and half precision lose them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 8, 8, generator=generator) - 0.8
    small = torch.rand(x.shape, generator=generator) < 0.1
    return torch.where(small, x.abs() * 1e-25, x).requires_grad_()
