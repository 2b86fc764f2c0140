"""The compressed memory of the Compressive Transformer (Rae et al. 2019): what leaves the memory is kept as one slot per few tokens.

    a token reads    its own segment and the `memory` tokens before it, one by one                      as in Transformer-XL
                     before these, slots of `rate` tokens each: k_slot = Σ_t w_t k_t, v_slot = Σ_t w_t v_t
    weights = softmax over both;   p_ij = weight_i(slot of j) · w_j   for a token j within a slot

A slot is a weighted mean of hidden states (the paper's mean pooling; learned weights w = softmax(`weigh`) per head and place make it a
convolution whose channels share their weights), and keys and values are linear, so the slot's score is the mean of its tokens' scores and
the map over tokens is exact. A slot's relative position is the mean of its tokens' as well; in the paper slots stand close together,
each one step from the next. Not here: the paper's full convolutions, which no map over tokens describes, and the losses that train them.
Use as `normalise` in a `TransformerXLConfig` whose mask reaches over memory and slots (`compressive_mixer`). What is carried are the hidden
states of the tokens; slots are made of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Normaliser, Sizes, register_part
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

NOTHING = float("-inf")


@dataclass(frozen=True)
class CompressionConfig:
    """Args: segment: tokens of a segment. memory: tokens before it that are read one by one. rate: tokens of a slot. learned: weigh the
    tokens of a slot by learned weights, not alike."""

    segment: int
    memory: int
    rate: int
    learned: bool = False
    kind: str = "compression"

    def __post_init__(self) -> None:
        if self.rate < 1 or self.segment < 1 or self.memory < 0:
            raise ValueError(
                f"segment is {self.segment}, memory {self.memory}, rate {self.rate}; expected at least 1, 0 and 1."
            )
        if self.segment % self.rate or self.memory % self.rate:
            raise ValueError(
                f"segment ({self.segment}) and memory ({self.memory}) must be multiples of rate ({self.rate}): slots are filled segment by "
                "segment."
            )


@register_part(CompressionConfig)
class Compression(Normaliser):
    """`hook_slot_pattern`: the weight of every slot, 0 for those that are read token by token or not yet. `weigh` [head, place]."""

    def __init__(self, config: CompressionConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if config.learned:
            self.weigh = nn.Parameter(torch.zeros(sizes.n_maps, config.rate))
        else:
            self.register_buffer("weigh", torch.zeros(sizes.n_maps, config.rate), persistent=False)
        self.hook_slot_pattern = HookPoint("slot_pattern", f"batch {sizes.map_axis} query slot")

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, label="tokens of a compressed slot share its weight out alike for every query")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        context, rate, config = call.context, self.config.rate, self.config
        keys = context.key_positions[:, None, None, :]
        slot, place = (keys // rate).expand(scores.shape), keys % rate
        share = self.weigh.softmax(-1)[:, None, :].expand(len(scores), -1, scores.shape[2], -1)
        share = share.gather(-1, place.expand(scores.shape))
        begun = context.positions // config.segment * config.segment - config.memory
        old = keys < begun[:, None, :, None]
        seen = scores.isfinite()
        empty = scores.new_zeros(*scores.shape[:3], int(context.key_positions.max()) // rate + 1)
        inside = (old & seen).to(scores.dtype)
        whole = empty.scatter_add(-1, slot, inside) == rate
        mean = empty.scatter_add(-1, slot, share * scores.masked_fill(~(old & seen), 0.0)).masked_fill(~whole, NOTHING)
        both = torch.cat([scores.masked_fill(old, NOTHING), mean], dim=-1).softmax(-1)
        recent, slots = both[..., : scores.shape[-1]], self.hook_slot_pattern(both[..., scores.shape[-1] :])
        return recent + slots.gather(-1, slot) * share * inside


def compressive_mixer(
    n_heads: int, segment: int, memory: int, slots: int, rate: int, **site: Any
) -> TransformerXLConfig:
    """Transformer-XL's attention over `memory` tokens before the segment and `slots` compressed ones before these."""
    reach = RecentSegmentsConfig(segment, memory + slots * rate)
    compression = CompressionConfig(segment, memory, rate, site.pop("learned", False))
    return TransformerXLConfig(n_heads=n_heads, mask=reach, normalise=compression, **site)
