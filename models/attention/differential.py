"""Differential attention (Ye et al. 2024): two softmax maps per head, one subtracted from the other.

    P = P₁ − λ P₂,   λ = exp(λq₁·λk₁) − exp(λq₂·λk₂) + λ_init,   λ_init = 0.8 − 0.6·exp(−0.3·layer)
    z = (1 − λ_init) · RMSNorm(P v)                                 (`DifferentialNormConfig`, a `post` part)

λ is one number per layer; its hook point holds it for every head and query, so that it can be swept anywhere: λ = 0 is P₁ alone.
A site needs d_head = d_model / (2 · n_heads) (the default) and values twice as wide. Pairs are maps (2h, 2h + 1), as in the authors'
code, or (h, h + n_heads), as in Hugging Face's DiffLlama, whose norm has no weights.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Part, Post, Reweight, Sizes, register_part
from models.parts.norms import Norm
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

PAIRINGS = ("adjacent", "halves")


def initial_lambda(layer: int) -> float:
    """λ_init of a layer, counted from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


@dataclass(frozen=True)
class DifferentialConfig:
    """Args: pairing: which maps make a head, `"adjacent"` or `"halves"`."""

    pairing: str = "adjacent"
    kind: str = "differential"

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise ValueError(f"Unknown pairing {self.pairing!r}. Expected one of {', '.join(PAIRINGS)}.")


@dataclass(frozen=True)
class DifferentialNormConfig:
    """(1 − λ_init) · RMSNorm of every head's z. Args: affine: one weight per entry of a head."""

    eps: float = 1e-5
    affine: bool = True
    kind: str = "differential_norm"


@register_part(DifferentialConfig)
class Differential(Reweight):
    """`hook_raw_pattern` of the site holds both maps; `hook_lambda` [batch, pos, head, 1] what the second is multiplied by."""

    maps_per_head = 2

    def __init__(self, config: DifferentialConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.adjacent = config.pairing == "adjacent"
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(sizes.d_head)) for _ in range(4)
        )
        self.lambda_init = initial_lambda(0)
        self.hook_lambda = HookPoint("lambda", "batch pos head one")

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        return {"lambda": (self.hook_lambda, "λ: share of the second map that is subtracted", None)}

    def initialise_own(self) -> None:
        """λ vectors start at N(0, 0.1²)."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Deeper layers subtract more."""
        self.lambda_init = initial_lambda(layer)

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, signed=True, rows_sum_to="1-λ")

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        first, second = (pattern[:, 0::2], pattern[:, 1::2]) if self.adjacent else pattern.chunk(2, dim=1)
        gained, lost = (self.lambda_q1 @ self.lambda_k1).exp(), (self.lambda_q2 @ self.lambda_k2).exp()
        batch, heads, length, _ = first.shape
        weight = self.hook_lambda((gained - lost + self.lambda_init).expand(batch, length, heads, 1))
        return first - weight.transpose(1, 2) * second


@register_part(DifferentialNormConfig)
class DifferentialNorm(Post):
    """The norm of every head by itself."""

    def __init__(self, config: DifferentialNormConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.norm = Norm("rms", sizes.d_value, config.eps, config.affine, "batch pos head d_value")
        self.factor = 1 - initial_lambda(0)

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Keeps gradients like those of an ordinary transformer."""
        self.factor = 1 - initial_lambda(layer)

    def forward(self, z: Tensor, stream: Tensor) -> Tensor:
        return self.norm(z) * self.factor
