"""Routing Transformer's clusters (Roy et al. 2021): a token reads the earlier tokens whose keys fall to the same centroid as its query.

    cluster(x) = argmax_c μ_c · x / |x|                          of queries and of keys, per head
    μ_c ← decay μ_c + (1 − decay) · mean of its members          in training, then to unit length

This is the paper's definition. Its implementations give every centroid the same number of tokens, the nearest ones of the whole text, by
which a token's reading depends on later tokens; that selection is not here. Centroids are buffers: they move only in training mode, never
while hooks watch them, and have no gradient. Every token reads itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.stages import Call, Mask, Sizes, register_part
from workbench.instrument.hook_points import ACTIVE, HookPoint


@dataclass(frozen=True)
class RoutingConfig:
    """Args: clusters: centroids of a head. decay: of the moving average. seed: of the first centroids."""

    clusters: int
    decay: float = 0.999
    seed: int = 0
    kind: str = "routing"

    def __post_init__(self) -> None:
        if self.clusters < 1 or not 0 <= self.decay <= 1:
            raise ValueError(f"clusters is {self.clusters}, decay {self.decay}; expected at least 1 and 0 ≤ decay ≤ 1.")


@register_part(RoutingConfig)
class Routing(Mask):
    """`hook_query_affinity`, `hook_key_affinity`: cosines with the centroids; edit one to move a token. They carry no gradient, so they are
    cached only when asked for."""

    depends_on_call = True
    centroids: Tensor

    def __init__(self, config: RoutingConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        generator = torch.Generator().manual_seed(config.seed)
        first = torch.randn(sizes.n_maps, config.clusters, sizes.d_head, generator=generator)
        self.register_buffer("centroids", F.normalize(first, dim=-1))
        self.hook_query_affinity = HookPoint("query_affinity", f"batch {sizes.map_axis} query cluster", on_demand=True)
        self.hook_key_affinity = HookPoint("key_affinity", f"batch {sizes.map_axis} key cluster", on_demand=True)

    def visible(self, call: Call) -> Tensor:
        """[batch, map, query, key]."""
        q, k = F.normalize(call.q.detach(), dim=-1), F.normalize(call.k.detach(), dim=-1)
        asked = self.hook_query_affinity(q @ self.centroids.transpose(-1, -2))
        found = self.hook_key_affinity(k @ self.centroids.transpose(-1, -2))
        clusters = asked.argmax(-1), found.argmax(-1)
        if self.training and not ACTIVE.entries:
            self._move(q, clusters[0])
            self._move(k, clusters[1])
        return clusters[0][..., :, None] == clusters[1][..., None, :]

    @torch.no_grad()
    def _move(self, x: Tensor, cluster: Tensor) -> None:
        """Towards the mean of the members; a centroid without members stays. x [batch, map, pos, width], cluster [batch, map, pos]."""
        member = F.one_hot(cluster, self.config.clusters).to(x.dtype)
        count = member.sum((0, 2))[..., None]
        mean = torch.einsum("bhpc,bhpd->hcd", member, x) / count.clamp(min=1)
        moved = torch.where(count > 0, torch.lerp(mean, self.centroids, self.config.decay), self.centroids)
        self.centroids.copy_(F.normalize(moved, dim=-1))
