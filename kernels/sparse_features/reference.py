"""The same as dense equations: what every dictionary library does, and the oracle of the sparse form. Any dtype.

z = x Wᵀ + b,   f = ReLU(z) where z is among the k largest of its row, else 0,   y = f D
"""

import torch
from torch import Tensor


def top_codes(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """Dense codes f [row, feature] with at most k positive numbers per row."""
    z = x @ weight.T + bias
    return _keep(z, z.topk(k, dim=-1).indices)


def batch_top_codes(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """Dense codes f [row, feature]: the k · row largest of the whole batch."""
    z = x @ weight.T + bias
    return _keep(z.flatten(), z.flatten().topk(k * len(x)).indices).view_as(z)


def decode_dense(codes: Tensor, dictionary: Tensor) -> Tensor:
    """[row, feature] and [feature, d] -> [row, d]."""
    return codes @ dictionary


def _keep(z: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen).relu())
