"""Data whose dictionary is known: more sparse features than dimensions, added up. The oracle of every dictionary method.

x = Σ_i f_i d_i + noise,   f_i = 0 with probability 1 − p_i, else uniform in [0.5, 1.5],   d_i of length 1
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class PlantedFeatures:
    """A random dictionary and rows made from it.

    Args:
        n_features, d: directions and dimensions. active: mean number of active features per row. noise: standard deviation per dimension.
        decay: probability of feature i falls as (i + 1)^(−decay): 0 for all alike. mean: length of a constant vector added to every row.
    """

    def __init__(
        self, n_features: int = 64, d: int = 32, active: float = 3.0, noise: float = 0.0, decay: float = 0.0,
        mean: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, d, generator=generator, dtype=torch.float64)
        self.directions = (directions / directions.norm(dim=-1, keepdim=True)).float()
        weight = torch.arange(1, n_features + 1, dtype=torch.float64) ** -decay
        self.probability = (weight * active / weight.sum()).clamp_max(0.9).float()
        constant = torch.randn(d, generator=generator)
        self.constant = constant / constant.norm() * mean
        self.noise, self.seed = noise, seed

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x [row, d] and the true codes [row, feature]."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 10**6 + seed)
        shape = (count, len(self.directions))
        codes = (torch.rand(shape, generator=generator) < self.probability) * (
            0.5 + torch.rand(shape, generator=generator)
        )
        noise = self.noise * torch.randn(count, self.directions.shape[1], generator=generator)
        return codes @ self.directions + self.constant + noise, codes


@dataclass(frozen=True)
class Match:
    """How well a dictionary holds the true directions. `mean_cosine` (MMCS) averages, over true directions, the cosine of the nearest
    learned one; `recall` counts those above the limit, `precision` the learned directions that are near a true one, `f1` joins them."""

    mean_cosine: float
    precision: float
    recall: float
    f1: float
    partner: Tensor  # int64 [true feature]: its nearest learned feature


def match_dictionaries(learned: Tensor, true: Tensor, limit: float = 0.9) -> Match:
    """Compare directions [learned feature, d] with [true feature, d]; signs count. Alive learned features only should be passed."""
    if not len(learned):
        return Match(0.0, 0.0, 0.0, 0.0, torch.full((len(true),), -1))
    unit = [rows.detach() / rows.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12) for rows in (learned, true)]
    cosine = unit[1] @ unit[0].T
    best, partner = cosine.max(1)
    recall = float((best > limit).double().mean())
    precision = float((cosine.max(0).values > limit).double().mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Match(float(best.double().mean()), precision, recall, f1, partner)
