"""Biases that depend on the distance alone, as one number per head and distance instead of one per cell."""

import math

import torch
from torch import Tensor


def alibi_bias(slopes: Tensor, distances: range) -> Tensor:
    """−slope · |query − key| for every distance, [head, distance] (Press et al. 2022, ALiBi). slopes [head]."""
    away = torch.arange(distances.start, distances.stop, dtype=torch.float64, device=slopes.device).abs()
    return -slopes.double()[:, None] * away


def t5_bias(table: Tensor, distances: range, bidirectional: bool = False, max_distance: int = 128) -> Tensor:
    """T5's learned bias of buckets of distances, [head, distance] (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the other half grow logarithmically up to `max_distance`, and everything farther shares the
    last. With `bidirectional`, keys after the query have buckets of their own. table: [bucket, head].
    """
    buckets = table.shape[0]
    distance = torch.arange(distances.start, distances.stop, device=table.device)
    ahead = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        ahead = (distance < 0) * buckets
    distance = distance.abs() if bidirectional else distance.clamp(min=0)
    exact = buckets // 2
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return table[ahead + torch.where(distance < exact, distance, far)].T.double()
