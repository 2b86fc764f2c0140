"""Talking-heads attention (Shazeer et al. 2020): heads mix their scores before the softmax, and their weights behind it.

    s'_h = s_h + Σ_g A_hg s_g          `TalkingScoresConfig`, a term of the score: A is the paper's first projection less the identity
    p'_h = p_h + Σ_g B_hg p_g          `TalkingWeightsConfig`, a reweighting: B is the second less the identity

A = B = 0 is ordinary attention, near which training starts. What is mixed before the softmax is the content, q·k; terms of position are
added to it. The paper lets the numbers of heads differ on the two sides; here they are the same.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Reweight, ScoreTerm, Sizes, register_part
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class TalkingScoresConfig:
    """Named among the positions, where terms of the score are: `position=("rope", TalkingScoresConfig())`."""

    kind: str = "talking_scores"


@dataclass(frozen=True)
class TalkingWeightsConfig:
    """Rows sum to 1 + Σ_g B_hg, and entries may be negative."""

    kind: str = "talking_weights"


@register_part(TalkingScoresConfig)
class TalkingScores(ScoreTerm):
    """`mix` A [head, head]; `hook_bias` is what the other heads say."""

    needs_content = True
    role = "score_bias"

    def __init__(self, config: TalkingScoresConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.mix = nn.Parameter(torch.empty(sizes.n_maps, sizes.n_maps))

    def term(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        return torch.einsum("hg,bgqk->bhqk", self.mix, call.content)


@register_part(TalkingWeightsConfig)
class TalkingWeights(Reweight):
    """`mix` B [head, head]."""

    def __init__(self, config: TalkingWeightsConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.mix = nn.Parameter(torch.empty(sizes.n_maps, sizes.n_maps))

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, signed=True, rows_sum_to="free", label="heads mix their maps")

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern + torch.einsum("hg,bgqk->bhqk", self.mix, pattern)
