"""n-gram heads (Akyürek et al. 2024, "In-context language learning"): heads that are told where to look.

A head of order n reads, uniformly, every token that follows an earlier occurrence of the last n tokens: query i reads key j ≤ i where the
tokens j − n .. j − 1 equal the tokens i − n + 1 .. i. A row without a match reads nothing. Order 0 reads the whole past, order 1 is an
induction head. No queries or keys are learned; values and output are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.stages import Call, Projection, Score, Sizes, register_part


@dataclass(frozen=True)
class ValuesOnlyConfig:
    """No queries and keys: for a score that looks at something else."""

    kind: str = "values_only"


@register_part(ValuesOnlyConfig)
class ValuesOnly(Projection):
    """The values' map alone."""

    projects = ("value",)


@dataclass(frozen=True)
class NGramConfig:
    """Args: orders: the order n of every head."""

    orders: tuple[int, ...]
    kind: str = "ngram"


@register_part(NGramConfig)
class NGram(Score):
    """Scores 0 where the n-gram matches, else −inf; use with `ValuesOnlyConfig()` and `EmptyRowsConfig()`."""

    slots = ("token_ids",)
    reads_tokens = True

    def __init__(self, config: NGramConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if len(config.orders) != sizes.n_heads or min(config.orders) < 0:
            raise ValueError(
                f"orders is {config.orders}; expected one number from 0 on for each of the {sizes.n_heads} heads."
            )

    def forward(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        if call.context.token_ids is None:
            raise ValueError(
                "n-gram heads look at the tokens. Expected facts={'token_ids': tokens} with start_at_layer."
            )
        positions = call.context.key_positions
        matches = ngram_matches(
            call.carry("token_ids", call.context.token_ids),
            positions - positions[:, :1],  # from 0 on, also where a layer does not know the beginning
            call.context.key_mask,
            self.config.orders,
        )[:, :, call.context.offset :]
        scores = torch.zeros(matches.shape, dtype=call.v.dtype, device=matches.device)
        return scores.masked_fill(~matches, float("-inf"))


def ngram_matches(ids: Tensor, positions: Tensor, real: Tensor | None, orders: tuple[int, ...]) -> Tensor:
    """True where the tokens before a key equal the last tokens of a query, [batch, order, query, key] over all tokens read.

    ids [batch, key], positions [batch or 1, key] of each token in its own text, real [batch, key] (None: no padding). Padding may lie
    anywhere, so earlier tokens are found by position; no padding is ever read.
    """
    batch, length = ids.shape
    at = positions.expand(batch, -1)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    spare = torch.where(real, at, length)  # padding is written where nobody looks
    by_position = ids.new_full((batch, length + 1), -1).scatter(1, spare, ids)

    def back(steps: int) -> Tensor:
        """The token `steps` before each token, −1 before the beginning. [batch, key]."""
        found = by_position.gather(1, (at - steps).clamp(min=0))
        return torch.where(at >= steps, found, -1)

    matching = real[:, None, :].expand(-1, length, -1)
    by_order = [matching]
    for step in range(max(orders)):
        query, key = back(step)[:, :, None], back(step + 1)[:, None, :]
        matching = matching & (query == key) & (query >= 0)
        by_order.append(matching)
    return torch.stack([by_order[order] for order in orders], dim=1)
