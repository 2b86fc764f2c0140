"""Tails of the weights between two heads: is one sign heavier than the other (Kosowski et al. 2025, section 5.5 and figure 9a)?"""

from dataclasses import dataclass
from typing import Any

from probes.bdh.capture import require_bdh
from probes.bdh.neuron_graph import parameter_product
from probes.bdh.neuron_graph_edges import WeightDistribution, distribution


def weight_distribution(
    model: Any, source_head: int = 0, target_head: int = 0, kind: str = "x", *, bins: int = 1000, centre: bool = False
) -> WeightDistribution:
    """Histogram, moments and σ_Q of all of G between two heads (figure 9a)."""
    return distribution(parameter_product(model, source_head, target_head, kind=kind, centre=centre), bins)


@dataclass(frozen=True)
class HeadPair:
    """One pair of heads in the census. positive_tail, negative_tail: entries beyond ± `noise` σ_Q.

    A head without a positive tail is what the paper calls inhibitory.
    """

    source_head: int
    target_head: int
    mean: float
    sd: float
    skewness: float
    excess_kurtosis: float
    sigma_q: float
    positive_tail: int
    negative_tail: int

    @property
    def has_positive_tail(self) -> bool:
        """At least ten entries, and twice as many as on the other side."""
        return self.positive_tail >= max(10, 2 * self.negative_tail)


def head_census(model: Any, kind: str = "x", *, noise: float = 4.0, centre: bool = False) -> list[HeadPair]:
    """Tails of G between every pair of heads; the paper finds 12 of 16 with a heavy right tail (section 5.5)."""
    model = require_bdh(model, variants=True)
    heads, out = range(model.config.n_heads), []
    for a in heads:
        for b in heads:
            found = weight_distribution(model, a, b, kind, centre=centre)
            moments = (found.mean, found.sd, found.skewness, found.excess_kurtosis, found.sigma_q)
            out.append(HeadPair(a, b, *moments, *found.tails(noise)))
    return out
