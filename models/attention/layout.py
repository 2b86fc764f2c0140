"""Skim-Attention (Nguyen et al. 2021): who reads whom follows from where tokens stand on the page, once for all layers.

    e_j = Σ_c E_c[coordinate_c of token j]         of `facts["layout"]`; without it a text is one line, token j at column j
    score_ij = (W_Q e_i) · (W_K e_j) · scale       in the first layer that has this part; the others use the same map

Values are the text's: `project=ValuesOnlyConfig()`. What tokens say changes nothing of who reads them. The paper's model is an encoder with
coordinates of boxes (left, top, right, bottom, width, height): `coordinates=6`; here any number of whole numbers per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Part, Score, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class LayoutScoreConfig:
    """Args: coordinates: numbers that say where a token stands. grid: how many values each has, from 0 on. width: of the embedding."""

    coordinates: int = 2
    grid: int = 1024
    width: int = 32
    kind: str = "layout_score"

    def __post_init__(self) -> None:
        if min(self.coordinates, self.grid, self.width) < 1:
            raise ValueError(
                f"coordinates is {self.coordinates}, grid {self.grid}, width {self.width}; expected at least 1 each."
            )


class LayoutMap(nn.Module):
    """Embedding, queries and keys of places. `tables` [coordinate, value, width]."""

    def __init__(self, config: LayoutScoreConfig, sizes: Sizes) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.empty(config.coordinates, config.grid, config.width))
        self.query, self.key = (nn.Linear(config.width, sizes.n_maps * sizes.d_head) for _ in range(2))


@register_part(LayoutScoreConfig)
class LayoutScore(Score):
    """`map` holds the weights (None in layers that use the first one's); `hook_layout_scores` fires there alone and edits all layers."""

    def __init__(self, config: LayoutScoreConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.map: LayoutMap | None = LayoutMap(config, sizes)
        self.owner: list[LayoutScore] = [self]  # in a list, so that shared weights are registered once
        self.hook_layout_scores: HookPoint | None = HookPoint("layout_scores", f"batch {sizes.map_axis} query key")

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Use the map of the first layer that has one."""
        if earlier:
            self.map, self.owner, self.hook_layout_scores = None, [earlier[0]], None  # type: ignore[list-item]

    def forward(self, call: Call) -> Tensor:
        """[batch, map, query, key]."""
        owner = self.owner[0]
        return call.context.once(("layout", id(owner)), lambda: owner._scores(call))

    def _scores(self, call: Call) -> Tensor:
        assert self.map is not None and self.hook_layout_scores is not None
        where, shape = self._where(call), (self.sizes.n_maps, self.sizes.d_head)
        embedded = torch.stack([table[where[..., c]] for c, table in enumerate(self.map.tables)]).sum(0)
        q = self.map.query(embedded[:, call.context.offset :]).unflatten(-1, shape)
        k = self.map.key(embedded).unflatten(-1, shape)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.sizes.scale
        return self.hook_layout_scores(scores.expand(len(call.stream), -1, -1, -1))

    def _where(self, call: Call) -> Tensor:
        """Coordinates of all tokens read so far and now, [batch or 1, key, coordinate].

        Raises:
            ValueError: a layout of another shape or off the grid.
        """
        config, at = self.config, call.context.key_positions
        given = call.context.fact("layout")
        if given is None:
            first = at.long()[..., None]
            given = torch.cat([first, first.new_zeros(*first.shape[:-1], config.coordinates - 1)], dim=-1)
        given = torch.as_tensor(given, device=at.device)
        if given.dim() != 3 or given.shape[1:] != (at.shape[1], config.coordinates):
            raise ValueError(
                f"facts['layout'] has shape {tuple(given.shape)}; expected [batch or 1, key, coordinate] = "
                f"(·, {at.shape[1]}, {config.coordinates}), of all tokens read so far and now."
            )
        if int(given.min()) < 0 or int(given.max()) >= config.grid:
            raise ValueError(
                f"A token stands at {int(given.min() if int(given.min()) < 0 else given.max())}; expected coordinates from 0 to "
                f"{config.grid - 1} (grid={config.grid})."
            )
        return given.long()
