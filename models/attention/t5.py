"""T5's relative position bias (Raffel et al. 2020): one learned number per head and bucket of distances, logarithmic beyond half of the
buckets. Encoders spend half of them on keys ahead of the query. T5 leaves its scores unscaled (`AttentionConfig(scale=1.0)`)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Part, ScoreTerm, Sizes, register_part


@dataclass(frozen=True)
class T5BiasConfig:
    """Args: buckets, max_distance: distances from max_distance on share the last bucket. shared: all layers use the first one's table."""

    buckets: int = 32
    max_distance: int = 128
    shared: bool = True
    kind: str = "t5"


def t5_bucket(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of each distance = query position − key position (any shape); not `causal`: keys ahead use the upper half of the buckets."""
    ahead = torch.zeros_like(distance, dtype=torch.long)
    if not causal:
        buckets //= 2
        ahead = (distance < 0).long() * buckets
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(distance < exact, distance.long(), far)


@register_part(T5BiasConfig)
class T5Bias(ScoreTerm):
    """`table` [bucket, head]; None in layers that use the first layer's."""

    def __init__(self, config: T5BiasConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.table: nn.Parameter | None = nn.Parameter(torch.empty(config.buckets, sizes.n_maps))
        self.owner: list[T5Bias] = [self]  # in a list, so that a shared table is registered once

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Use the table of the first layer that has one."""
        if self.config.shared and earlier:
            self.table, self.owner = None, [earlier[0]]  # type: ignore[list-item]

    def term(self, call: Call) -> Tensor:
        """[batch or 1, head, query, key]."""
        table = self.owner[0].table
        assert table is not None
        config, causal = self.config, self.sizes.causal and not call.context.cross
        bucket = t5_bucket(call.context.distances()[:, 0], config.buckets, config.max_distance, causal)
        return table[bucket].permute(0, 3, 1, 2)
