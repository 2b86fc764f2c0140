"""BAM, the Bayesian attention mechanism (Bianchessi et al. 2025): a prior over distances beside the content, one per head.

The prior is a generalised Gaussian, whose logarithm is added to the scores:

    bias_ij = −(|j − i − μ_h| + ε)^{β_h} · e^{s_h},   μ_h = 2·sinh(loc_h)

β = 1, μ = 0 is ALiBi; β = 0 is no position at all; β < 0 prefers what is far away. The paper writes (|x − μ| / α)^β; the released code
learns s with e^s in the place of α^−β, as here. Slopes of ALiBi are the initial e^s. `SSMaxConfig` beside it gives the paper's SSMax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, ScoreTerm, Sizes, register_part
from models.parts.positions import alibi_slopes


@dataclass(frozen=True)
class BAMConfig:
    """Args: shape, location: initial β and loc, trained like the scale. epsilon: keeps 0^β finite."""

    shape: float = 1.0
    location: float = 0.0
    epsilon: float = 1e-5
    kind: str = "bam"


@register_part(BAMConfig)
class BAM(ScoreTerm):
    """`shape`, `scale`, `location` [head]; `hook_bias` is the log prior, up to a constant of each row."""

    def __init__(self, config: BAMConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.shape = nn.Parameter(torch.full((sizes.n_maps,), config.shape))
        self.scale = nn.Parameter(alibi_slopes(sizes.n_maps).log())
        self.location = nn.Parameter(torch.full((sizes.n_maps,), config.location))

    def term(self, call: Call) -> Tensor:
        """[batch or 1, head, query, key]."""
        shape, scale, location = (p[:, None, None] for p in (self.shape, self.scale, self.location))
        off = (-call.context.distances().to(call.q.dtype) - 2 * location.sinh()).abs() + self.config.epsilon
        return -(off**shape) * scale.exp()
