"""Relative positions that depend on the query: Transformer-XL (Dai et al. 2019) and Music Transformer (Huang et al. 2018).

Transformer-XL's score (q_i + u)·k_j + (q_i + v)·W_r R_{i−j} is content q·k, plus the term `key_preference` u·k_j, plus the term
`relative` (q_i + v)·W_r R_{i−j}, R a sinusoid of the distance. Music Transformer adds the term `relative_embedding` q_i·E_{i−j} with a
learned vector per head and distance. All are scaled like the content. Both papers shift a query × distance array into a query × key
array; here it is gathered by distance, which is the same and also right for padded texts and for texts that go on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, ScoreTerm, Sizes, register_part
from models.parts.positions import sinusoidal


@dataclass(frozen=True)
class KeyPreferenceConfig:
    """u_h · k_j: what a head prefers to read, whoever asks."""

    kind: str = "key_preference"


@dataclass(frozen=True)
class RelativeConfig:
    """(q_i + v_h) · W_r R_{i−j}."""

    kind: str = "relative"


@dataclass(frozen=True)
class RelativeEmbeddingConfig:
    """q_i · E_{h, i−j}; distances beyond `longest` use the last vector."""

    longest: int = 512
    kind: str = "relative_embedding"


@register_part(KeyPreferenceConfig)
class KeyPreference(ScoreTerm):
    """`u` [head, d_head]."""

    role = "score_bias"

    def __init__(self, config: KeyPreferenceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.u = nn.Parameter(torch.empty(sizes.n_maps, sizes.d_head))

    def term(self, call: Call) -> Tensor:
        """[batch, head, 1, key]."""
        return torch.einsum("hd,bhkd->bhk", self.u, call.k)[:, :, None] * self.sizes.scale


@register_part(RelativeConfig)
class Relative(ScoreTerm):
    """`v` [head, d_head], `project` W_r: d_model -> head · d_head."""

    def __init__(self, config: RelativeConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.v = nn.Parameter(torch.empty(sizes.n_maps, sizes.d_head))
        self.project = nn.Linear(sizes.d_model, sizes.n_maps * sizes.d_head, bias=False)

    def term(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        index, distances = indexed_distances(call, self.sizes.causal)
        precise = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        waves = sinusoidal(distances.to(precise), self.sizes.d_model)
        r = self.project(waves.to(call.q.dtype)).unflatten(-1, (self.sizes.n_maps, -1))
        by_distance = torch.einsum("bhqd,nhd->bhqn", call.q + self.v[:, None], r) * self.sizes.scale
        return gathered(by_distance, index)


@register_part(RelativeEmbeddingConfig)
class RelativeEmbedding(ScoreTerm):
    """`table` [head, distance, d_head]; a site that reads the future has vectors for distances from −longest + 1 on."""

    def __init__(self, config: RelativeEmbeddingConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.first = 0 if sizes.causal else 1 - config.longest
        self.table = nn.Parameter(torch.empty(sizes.n_maps, config.longest - self.first, sizes.d_head))

    def term(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        index, distances = indexed_distances(call, self.sizes.causal)
        rows = self.table[:, distances.clamp(self.first, self.config.longest - 1) - self.first]
        return gathered(torch.einsum("bhqd,hnd->bhqn", call.q, rows) * self.sizes.scale, index)


def indexed_distances(call: Call, causal: bool) -> tuple[Tensor, Tensor]:
    """Every distance that occurs, ascending [distance], and which of them each cell has, [batch or 1, 1, query, key].

    Keys ahead of a causal query, which it cannot see, count as distance 0.

    Raises:
        ValueError: positions that are not whole numbers.
    """
    between = call.context.distances()
    if between.is_floating_point():
        raise ValueError("Relative position terms need whole positions; got fractional facts['positions'].")
    between = between.clamp(min=0) if causal else between
    least = int(between.min())
    return between - least, torch.arange(least, int(between.max()) + 1, device=between.device)


def gathered(by_distance: Tensor, index: Tensor) -> Tensor:
    """[batch, head, query, distance], [batch or 1, 1, query, key] -> [batch, head, query, key]."""
    return by_distance.gather(-1, index.expand(*by_distance.shape[:3], -1))
