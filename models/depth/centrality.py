"""Graphormer's centrality encoding (Ying et al. 2021): what enters the first block is told how many neighbours a node has.

    h_i ← x_i + z[degree of node i]

Degrees are `facts["degrees"]`, whole numbers [batch or 1, key]; without the fact every token has two neighbours, one on either
side. In a graph with directions the paper adds a second table for edges that lead in; one graph without directions is what this is for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.context import Context
from models.wiring import Notes, Wiring, register_wiring, repeated
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class CentralityConfig:
    """Args: most: degrees beyond share the last vector."""

    most: int = 16
    kind: str = "centrality"

    label, words = "Centrality", "nodes know their degree"  # what a diagram says of it

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most is {self.most}; expected at least 1.")


@register_wiring(CentralityConfig)
class Centrality(Wiring):
    """`table` z [degree, d_model]; `hook_degree_embed` [batch, pos, d_model]. Blocks run once, one after the other."""

    def __init__(self, config: CentralityConfig, model: Any) -> None:
        super().__init__()
        self.config, self.visits = config, repeated(model.n_layers, 1)
        self.table = nn.Parameter(torch.empty(config.most + 1, model.d_model))
        self.hook_degree_embed = HookPoint("degree_embed", "batch pos d_model")

    def begin(self, x: Tensor, context: Context) -> Notes:
        degrees = context.fact("degrees")
        if degrees is None:
            degrees = torch.full_like(context.positions, 2, dtype=torch.long)
        else:
            known = context.key_positions.shape[1]
            if degrees.dim() != 2 or degrees.shape[1] != known or degrees.is_floating_point():
                raise ValueError(
                    f"facts['degrees'] has shape {tuple(degrees.shape)} and type {degrees.dtype}; expected whole numbers [batch or 1, key] "
                    f"with key = {known}, all nodes read so far and now."
                )
            degrees = degrees[:, context.offset :].to(x.device)
        return {"degrees": degrees.clamp(0, self.config.most)}

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        return x if layer else x + self.hook_degree_embed(self.table[notes["degrees"]].expand_as(x))
