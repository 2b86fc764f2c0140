"""What a memory is asked to get right when it writes: the loss of e = M(k) - v, and its derivative by M(k).

    l2      ½ |e|²                                     slope e                       Titans, Memora (the ½ is in the step size)
    lp      Σ |e|^p                                    p tanh(a e) (e² + ε)^((p-1)/2), the smooth form of the paper       Moneta
    huber   ½ |e|² if |e| <= δ, else δ Σ |e|           e,  else δ sign(e): the whole token switches                       Yaad
    huber_coordinate   the same coordinate by coordinate, the usual Huber loss: slope clamp(e, -δ, δ)

Behrouz et al. 2025, arXiv 2504.13173 (Moneta, Yaad, Memora); Behrouz et al. 2024, arXiv 2501.00663 (Titans).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("l2", "lp", "huber", "huber_coordinate")
SMOOTH = 1e-6


@dataclass(frozen=True)
class Loss:
    """kind: one of LOSSES. p: the power of lp. sharpness: a of its smooth sign. The threshold δ of the Huber losses comes per token."""

    kind: str = "l2"
    p: float = 3.0
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(f"loss: expected one of {list(LOSSES)}, got {self.kind!r}")

    @property
    def needs_threshold(self) -> bool:
        """Whether a threshold per token must be given."""
        return self.kind.startswith("huber")

    def value(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """[..., pos, state_v] -> [..., pos]; threshold [..., pos]."""
        if self.kind == "lp":
            return error.abs().pow(self.p).sum(-1)
        half = 0.5 * error.square()
        if threshold is None:
            return half.sum(-1)
        if self.kind == "huber_coordinate":
            bound = threshold.unsqueeze(-1)
            return torch.where(error.abs() <= bound, half, bound * (error.abs() - 0.5 * bound)).sum(-1)
        inside = error.square().sum(-1) <= threshold.square()
        return torch.where(inside, half.sum(-1), threshold * error.abs().sum(-1))

    def slope(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """The derivative by M(k), of the shape of error."""
        if self.kind == "lp":
            return self.p * torch.tanh(self.sharpness * error) * (error.square() + SMOOTH).pow((self.p - 1) / 2)
        if threshold is None:
            return error
        bound = threshold.unsqueeze(-1)
        if self.kind == "huber_coordinate":
            return torch.maximum(torch.minimum(error, bound), -bound)
        inside = error.square().sum(-1, keepdim=True) <= bound.square()
        return torch.where(inside, error, bound * error.sign())
