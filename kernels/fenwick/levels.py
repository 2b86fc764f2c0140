"""The levels of log-linear attention: how far back a token lies, counted in powers of two that split the past like a Fenwick tree.

    level(i, j) = 0 for j = i,  else the number of binary digits of (i xor j)

For a token at position i the past falls into at most log2(i) + 1 buckets, one per level: level m > 0 holds 2^(m-1)
neighbouring tokens, and exists where digit m - 1 of i is 1. Going from t - 1 to t, with 2^m the largest power of two that
divides t, levels 0 … m + 1 become level m + 1, and level 0 is left to token t. Tokens beyond the last level count as the last.
Guo et al. 2025, arXiv 2506.04761, section 3.
"""

import torch
from torch import Tensor


def n_levels_for(length: int) -> int:
    """Levels that texts of this many tokens need."""
    return max(1, (length - 1).bit_length() + 1)


def digits(x: Tensor) -> Tensor:
    """Number of binary digits of non-negative integers; 0 for 0."""
    return torch.frexp(x.to(torch.float64)).exponent.long()


def level(i: Tensor, j: Tensor, n_levels: int) -> Tensor:
    """The level at which position i sees position j; the last level takes what lies beyond it."""
    return digits(i ^ j).clamp(max=n_levels - 1)


def level_later(before: Tensor, now: Tensor, n_levels: int) -> Tensor:
    """Where the buckets of position `before` are as seen from `now` >= before: [*shape of now, n_levels].

    A bucket of level m stays until the first multiple of 2^m after `before`, and from then on is where token `before` is.
    """
    own = torch.arange(n_levels, device=now.device)
    return torch.maximum(own, level(now, before, n_levels).unsqueeze(-1))


def regrouped(state: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """Level states seen from `before` as seen from `now`: buckets that have become one are added.

    state [batch, head, level, state_k, state_v]; before, now [batch]. Nothing is merged before the first token (-1).
    """
    n_levels = state.shape[2]
    target = level_later(before.clamp(min=0), now.maximum(before).clamp(min=0), n_levels)  # [batch, level]
    moves = torch.nn.functional.one_hot(target, n_levels).to(state.dtype)
    return torch.einsum("bhlkv,blm->bhmkv", state, moves)
