"""Combiner, fixed pattern (Ren et al. 2021): every earlier token is read, those of earlier segments through a factorisation.

    p(j | i) = softmax over {own segment up to i} ∪ {earlier segments} at j                    j in the own segment
    p(j | i) = (the same softmax at segment r) · p(j | r)                                     j in an earlier segment r
    score of a segment: q_i · k_r;   p(j | r) = softmax_{j in r}(q_r · k_j);   q_r, k_r pooled over the segment's queries and keys

All scores are scaled alike. Rows sum to 1 and reach every earlier token. Mean or maximum pools; the released code can also pass what it
pools through networks of its own.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.attention.stages import Call, Normaliser, Sizes, register_part
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

POOLS = ("mean", "max")
NOTHING = float("-inf")


@dataclass(frozen=True)
class CombinerConfig:
    """Args: segment: tokens of a segment. pool: `"mean"` or `"max"`."""

    segment: int
    pool: str = "mean"
    kind: str = "combiner"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(
                f"Unknown pool {self.pool!r}.{suggestion(self.pool, POOLS)} Expected one of {', '.join(POOLS)}."
            )
        if self.segment < 1:
            raise ValueError(f"segment is {self.segment}; expected at least 1.")


@register_part(CombinerConfig)
class Combiner(Normaliser):
    """`hook_region_pattern`: the weight of every earlier segment; `hook_within`: p(j | segment of j)."""

    slots = ("pooled_query",)

    def __init__(self, config: CombinerConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.hook_region_scores = HookPoint("region_scores", f"batch {sizes.map_axis} query region")
        self.hook_region_pattern = HookPoint("region_pattern", f"batch {sizes.map_axis} query region")
        self.hook_within = HookPoint("within_region", f"batch {sizes.map_axis} key")

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, label="earlier segments share their weight out alike for every query")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        context, scale = call.context, self.sizes.scale
        queries = call.carry("pooled_query", call.q.transpose(1, 2)).transpose(1, 2)  # of all tokens so far
        region = (context.key_positions // self.config.segment).expand(scores.shape[0], -1)
        count = int(region.max()) + 1
        real = torch.ones_like(region, dtype=torch.bool) if context.key_mask is None else context.key_mask
        member = (region[..., None] == torch.arange(count, device=region.device)) & real[
            ..., None
        ]  # [batch, key, region]
        own = (context.positions // self.config.segment).expand(scores.shape[0], -1)
        earlier = torch.arange(count, device=region.device) < own[..., None]  # [batch, query, region]
        inside = region[:, None, None, :] == own[:, None, :, None]
        pooled_q, pooled_k = (self._pool(x, member) for x in (queries, call.k))
        region_scores = self.hook_region_scores(call.q @ pooled_k.transpose(-1, -2) * scale)
        both = torch.cat(
            [scores.masked_fill(~inside, NOTHING), region_scores.masked_fill(~earlier[:, None], NOTHING)], dim=-1
        ).softmax(-1)
        local, regions = both[..., : scores.shape[-1]], self.hook_region_pattern(both[..., scores.shape[-1] :])
        match = torch.einsum("bhrd,bhkd->bhrk", pooled_q, call.k) * scale
        shares = match.masked_fill(~member.transpose(1, 2)[:, None], NOTHING).softmax(-1).nan_to_num(0.0)
        within = self.hook_within(torch.einsum("bhrk,bkr->bhk", shares, member.to(shares.dtype)))
        return local + torch.einsum("bhqr,bkr->bhqk", regions, member.to(regions.dtype)) * within[:, :, None] * ~inside

    def _pool(self, x: Tensor, member: Tensor) -> Tensor:
        """x [batch, map, key, width], member [batch, key, region] -> [batch, map, region, width]; nobody reads unfinished segments."""
        if self.config.pool == "mean":
            total = torch.einsum("bhkd,bkr->bhrd", x, member.to(x.dtype))
            return total / member.sum(1)[:, None, :, None].clamp(min=1)
        apart = x[:, :, :, None].masked_fill(~member[:, None, :, :, None], NOTHING)
        return apart.amax(2).nan_to_num(neginf=0.0)
