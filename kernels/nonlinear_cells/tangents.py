"""Derivatives of elementwise functions: one forward pass gives the derivative of every unit at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor, ...]


def derivative(function: Callable[..., Tensors], arguments: Tensors, directions: Tensors) -> tuple[Tensors, Tensors]:
    """(function(*arguments), its derivative along `directions`), by forward differentiation, outside any graph."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), way) for x, way in zip(arguments, directions, strict=True)]
        parts = [forward_ad.unpack_dual(result) for result in function(*duals)]
        return (
            tuple(part.primal for part in parts),
            tuple(torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts),
        )
