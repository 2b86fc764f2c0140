"""Landmark attention (Mohtashami & Jaggi 2023): earlier blocks are read through a landmark, the last token of each.

Every (block + 1)-th token is a landmark. A query weighs, in one softmax, the tokens of its own block and the landmarks of earlier
blocks; a landmark's weight is handed on to the tokens of its block by a softmax of their own:

    p_ij = softmax over {own block} ∪ {earlier landmarks} (s_i)_j                              j in the own block
    p_ij = (the same softmax)_landmark(b) · softmax over block b (s_i)_j                       j in an earlier block b
    p_ij = 0                                                                                  j a landmark

Rows sum to 1. With `retrieve`, each row and head keeps the blocks of its `retrieve` best landmarks only, as the paper does at inference.
`with_landmarks` puts the landmarks into a text. The paper's renumbering of positions of retrieved blocks is not here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.attention.stages import Call, Normaliser, Sizes, register_part
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

NOTHING = float("-inf")


@dataclass(frozen=True)
class LandmarkConfig:
    """Args: block: tokens between landmarks. retrieve: earlier blocks that a row may read (None: all)."""

    block: int
    retrieve: int | None = None
    kind: str = "landmark"

    def __post_init__(self) -> None:
        if self.block < 1 or (self.retrieve is not None and self.retrieve < 1):
            raise ValueError(f"block is {self.block}, retrieve {self.retrieve}; expected at least 1 each.")


@register_part(LandmarkConfig)
class Landmark(Normaliser):
    """`hook_block_gate`: the weight of every earlier block, 0 for the query's own and for later ones."""

    def __init__(self, config: LandmarkConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.hook_block_gate = HookPoint("block_gate", f"batch {sizes.map_axis} query block")

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, label="landmarks gate their block and are read themselves by nobody")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        context, size = call.context, self.config.block + 1
        keys = context.key_positions[:, None, None, :]
        block = (keys // size).expand(scores.shape)
        landmark = keys % size == self.config.block
        own = block == (context.positions // size)[:, None, :, None]
        seen = scores.isfinite()
        inside, entry = own & ~landmark & seen, ~own & landmark & seen
        alone = ~(inside | entry).any(-1, keepdim=True)  # padding that took a landmark's place reads itself
        inside = inside | (alone & seen)
        if self.config.retrieve is not None:
            entry = entry & _best(scores.masked_fill(~entry, NOTHING), self.config.retrieve)
        first = scores.masked_fill(~(inside | entry), NOTHING).softmax(-1)
        empty = scores.new_zeros(*scores.shape[:3], int(context.key_positions.max()) // size + 1)
        gate = self.hook_block_gate(empty.scatter_add(-1, block, first * entry))
        within = _softmax_by(block, scores.masked_fill(own | landmark | ~seen, NOTHING), empty)
        return first * inside + within * gate.gather(-1, block)


def _best(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest finite scores of each row."""
    least = scores.topk(min(count, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.isfinite() & (scores >= least)


def _softmax_by(group: Tensor, scores: Tensor, empty: Tensor) -> Tensor:
    """A softmax within each group of keys; 0 where scores are −inf. group like scores; empty [batch, map, query, group], zeros."""
    highest = empty.scatter_reduce(-1, group, scores.detach(), "amax", include_self=False)
    weights = (scores - highest.gather(-1, group).nan_to_num(neginf=0.0)).exp()
    total = empty.scatter_add(-1, group, weights).gather(-1, group)
    return weights / torch.where(total > 0, total, 1.0)


def with_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """Put the token `landmark` after every `block` tokens. [batch, pos] -> [batch, pos + pos // block]."""
    whole = tokens.shape[1] // block * block
    blocks = tokens[:, :whole].unflatten(1, (-1, block)) if whole else tokens.new_zeros(len(tokens), 0, block)
    marked = torch.cat([blocks, torch.full_like(blocks[..., :1], landmark)], dim=-1)
    return torch.cat([marked.flatten(1), tokens[:, whole:]], dim=1)
