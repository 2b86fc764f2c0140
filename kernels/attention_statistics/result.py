"""What the statistics are, and what can be read off them afterwards without looking at the pattern again."""

from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS = (
    "log_normaliser",
    "entropy",
    "largest",
    "first",
    "self",
    "previous",
    "distance",
    "received",
    "received_largest",
    "profile",
    "map",
)
WEIGHTS = ("share", "absolute", "signed")


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of patterns; what was not asked for is None. Rows that read nothing (padding, no visible key) are nan, at index −1.

    Args:
        weights: what a weight is: `"softmax"`; of a signed pattern its `"share"` (|α| divided by the row's sum of |α|), `"absolute"` (|α|)
            or `"signed"` (α). "Largest" means largest magnitude, with its sign.
        log_normaliser: log of what a row is divided by, [batch, head, query]. entropy: in nats, [batch, head, query].
        largest, largest_at: weight of the token read most, and its position, [batch, head, query].
        first, self_weight, previous: weight on the first real token, on the own token, on the token before it, [batch, head, query].
        distance, distance_squared: mean of |query − key| and of its square under the weights, [batch, head, query].
        features: Σ_j weight_ij feature_j, [batch, head, query, feature].
        received, received_largest: mean and largest weight that a key gets from the rows that can see it, [batch, head, key].
        profile: mean weight at each distance over the rows that can see a key there, [batch, head, distance].
        map: weight of largest magnitude in every bin of queries × keys, [batch, head, query_bin, key_bin].
        top_weights, top_keys: largest weights of each row, and where; weight 0 at −1 where a row sees fewer, [batch, head, query, rank].
        rows: False at rows that are padding, [batch, query]. readers: rows that can see a key, [batch, key].
        pairs: visible pairs at each distance, [batch, distance]. first_distance: distance of the first entry of `profile`.
    """

    weights: str
    rows: Tensor
    readers: Tensor
    pairs: Tensor
    first_distance: int
    log_normaliser: Tensor | None = None
    entropy: Tensor | None = None
    largest: Tensor | None = None
    largest_at: Tensor | None = None
    first: Tensor | None = None
    self_weight: Tensor | None = None
    previous: Tensor | None = None
    distance: Tensor | None = None
    distance_squared: Tensor | None = None
    features: Tensor | None = None
    received: Tensor | None = None
    received_largest: Tensor | None = None
    profile: Tensor | None = None
    map: Tensor | None = None
    top_weights: Tensor | None = None
    top_keys: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """One of the statistics; raises ValueError saying what to ask for when it was not computed."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} was not computed; name it among the statistics asked for")
        return value

    def mean(self, name: str) -> Tensor:
        """A row statistic averaged over rows that read something, [batch, head] (features: [batch, head, feature])."""
        value = self.need(name)
        return value.nanmean(2)

    def received_by_value(self, value_norms: Tensor, largest: bool = False) -> Tensor:
        """`received` (or the largest) times the length of the value read there, [batch, head, key].

        A sink that receives most of the weight and adds nothing to the output has a short value, and is small here.
        value_norms: ‖v_j‖, [batch, head or value group, key].
        """
        received = self.need("received_largest" if largest else "received")
        groups = value_norms.shape[1]
        if value_norms.shape != (received.shape[0], groups, received.shape[2]) or received.shape[1] % groups:
            raise ValueError(
                f"value_norms: expected [batch={received.shape[0]}, a divisor of {received.shape[1]} heads, key={received.shape[2]}], "
                f"got {list(value_norms.shape)}"
            )
        return received * value_norms.repeat_interleave(received.shape[1] // groups, 1).to(received)

    def sinks(self, threshold: float) -> Tensor:
        """Keys that receive more than `threshold` on average from the rows that can see them, True in [batch, head, key]."""
        return self.need("received") > threshold

    def sink_mass(self, threshold: float) -> Tensor:
        """Share of all weight that goes to the keys of `sinks(threshold)`, mean over rows, [batch, head]."""
        received = self.need("received")
        to_sinks = torch.where(self.sinks(threshold), received * self.readers[:, None].to(received), 0.0).sum(-1)
        return to_sinks / self.rows.sum(-1).to(received)[:, None]

    def binned_profile(self, linear: int = 16) -> tuple[list[tuple[int, int]], Tensor]:
        """The profile at distances 0 … linear − 1, and beyond them in bins that double: mean weight per visible pair.

        Returns (bins as (nearest, farthest) distance, [batch, head, bin]). Distances before the key (no causality) are left out.
        """
        profile = self.need("profile")
        bins = [(d, d) for d in range(min(linear, profile.shape[-1] + self.first_distance))]
        edge = linear
        while edge < profile.shape[-1] + self.first_distance:
            bins.append((edge, min(2 * edge, profile.shape[-1] + self.first_distance) - 1))
            edge *= 2
        pairs = self.pairs[:, None].to(profile)
        total = torch.where(pairs > 0, profile * pairs, 0.0)
        means = []
        for near, far in bins:
            part = slice(near - self.first_distance, far + 1 - self.first_distance)
            means.append(total[..., part].sum(-1) / pairs[..., part].sum(-1))
        return bins, torch.stack(means, -1)
