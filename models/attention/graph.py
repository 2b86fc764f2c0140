"""Graphormer's spatial encoding (Ying et al. 2021): a learned number per head for every distance in a given graph.

    bias_ij = b_h[distance between node i and node j],   one more b_h for nodes that no path joins

Distances are `facts["graph_distances"]`, whole numbers [batch or 1, key, key], −1 where no path joins two nodes (`shortest_paths` makes
them of a graph's edges). Without the fact a text is a chain: each token is joined with the next. What nodes get by their degree is
`models.depth.centrality`. Not here: the paper's encoding of the edges along a path, and its virtual node.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, ScoreTerm, Sizes, register_part
from workbench.lab.catalogue import implements


@dataclass(frozen=True)
class GraphDistanceConfig:
    """Args: longest: distances beyond share the last number."""

    longest: int = 16
    kind: str = "graph_distance"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}; expected at least 1.")


@implements(
    "graphormer", "position", "GraphDistance", note="without edges along paths; degrees: models.depth.centrality"
)
@register_part(GraphDistanceConfig)
class GraphDistance(ScoreTerm):
    """`table` [distance, head]; its last row is for nodes that no path joins."""

    def __init__(self, config: GraphDistanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.table = nn.Parameter(torch.empty(config.longest + 2, sizes.n_maps))

    def term(self, call: Call) -> Tensor:
        """[batch or 1, head, query, key]."""
        distance, longest = self._distances(call), self.config.longest
        row = torch.where(distance < 0, longest + 1, distance.clamp(max=longest))
        return self.table[row].permute(0, 3, 1, 2)

    def _distances(self, call: Call) -> Tensor:
        """[batch or 1, query, key]."""
        given, context = call.context.fact("graph_distances"), call.context
        if given is None:
            return context.distances()[:, 0].abs().long()
        known = context.key_positions.shape[1]
        if given.dim() != 3 or given.shape[1:] != (known, known) or given.is_floating_point():
            raise ValueError(
                f"facts['graph_distances'] has shape {tuple(given.shape)} and type {given.dtype}; expected whole numbers "
                f"[batch or 1, key, key] with key = {known}, all nodes read so far and now."
            )
        return given[:, context.offset :].to(context.positions.device)


def shortest_paths(edges: Tensor) -> Tensor:
    """Steps from node to node, int64 [..., node, node], −1 where no path leads; edges [..., node, node], True from i to j."""
    count = edges.shape[-1]
    step, reached = edges.bool().to(torch.float32), torch.eye(count, device=edges.device).expand(edges.shape).bool()
    distance = torch.where(reached, 0, -1)
    for length in range(1, count):
        wider = reached | (reached.to(torch.float32) @ step > 0)
        distance = torch.where(wider & ~reached, length, distance)
        reached = wider
    return distance
