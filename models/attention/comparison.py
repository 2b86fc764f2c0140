"""Combined attention of Comateformer (2024), after CoDA (Tay et al. 2019): a map of likeness times a map of closeness, without softmax.

    match = tanh(q_i · k_j · scale)               in [−1, 1]: whether j agrees with i or contradicts it
    gate  = 2 σ(−‖q_i − k_j‖₁ · scale)            in (0, 1]: 1 where query and key coincide
    weight = match · gate                          rows sum to nothing in particular, and may subtract

Reconstructed: of the paper a description in words was at hand, with the factors of both maps at 1. It also offers distances centred by the
mean of the whole map; that mean looks ahead, so it is not here. In the paper 50, 40 and 30 % of the heads of BERT's first three layers are
of this kind; here it is whole layers.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from models.attention.stages import Call, Normaliser, Score, Sizes, register_part
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class ComparisonConfig:
    """Use with `normalise=AsScoredConfig()`."""

    kind: str = "comparison"


@register_part(ComparisonConfig)
class Comparison(Score):
    """`hook_match`, `hook_closeness` [batch, head, query, key]: the two maps, whose product the scores are."""

    def __init__(self, config: ComparisonConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.hook_match = HookPoint("match", f"batch {sizes.map_axis} query key")
        self.hook_closeness = HookPoint("closeness", f"batch {sizes.map_axis} query key")

    def forward(self, call: Call) -> Tensor:
        """[batch, map, query, key]."""
        scale = self.sizes.scale
        match = self.hook_match((call.q @ call.k.transpose(-1, -2) * scale).tanh())
        apart = (call.q[:, :, :, None] - call.k[:, :, None]).abs().sum(-1)
        return match * self.hook_closeness(2 * (-apart * scale).sigmoid())


@dataclass(frozen=True)
class AsScoredConfig:
    """Scores are the weights; 0 where a query may not read."""

    kind: str = "as_scored"


@register_part(AsScoredConfig)
class AsScored(Normaliser):
    """No competition between sources."""

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, signed=True, rows_sum_to="free", label="scores are the weights")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        return scores.masked_fill(scores.isneginf(), 0.0)
