"""Queries and keys of paired maps from one shared base: Shared DIFF Transformer (2025).

    W_i = W + A_i B_i   for the maps i = 1, 2 of a head, A_i [d_head, rank] per head, B_i [rank, d_model] per layer

Reconstructed: of the paper only the abstract was at hand, which says "shared base matrix" and "low-rank updates" for queries and keys;
the rank, and whether B_i is per head, are choices made here. Scores split exactly into base·base, base·low-rank, low-rank·base and
low-rank·low-rank (`score_split`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.stages import Projection, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class SharedBaseConfig:
    """Args: rank: of the update of each map."""

    rank: int = 8
    kind: str = "shared_base"


@register_part(SharedBaseConfig)
class SharedBase(Projection):
    """Base and low-rank maps for queries and keys; values are projected as ever."""

    def linear(self, name: str, width: int, bias: bool) -> nn.Module:
        if name == "value":
            return super().linear(name, width, bias)
        if self.sizes.maps_per_head != 2:
            raise ValueError("SharedBaseConfig is for heads of two maps. Expected reweight=DifferentialConfig().")
        if bias:
            raise ValueError(f"SharedBaseConfig has no bias for {name!r}. Expected bias=False, or a tuple without it.")
        heads = self.sizes.n_heads if name == "query" else self.sizes.n_kv
        axis = self.sizes.map_axis if name == "query" else self.sizes.key_axis
        return LowRankPair(self.sizes, heads, self.config.rank, name, axis)


class LowRankPair(nn.Module):
    """d_model -> maps (2h, 2h + 1) of every head. `hook_base` and `hook_low_rank` [batch, pos, map, d_head] sum to its output."""

    bias = None

    def __init__(self, sizes: Sizes, heads: int, rank: int, name: str, axis: str) -> None:
        super().__init__()
        self.base = nn.Linear(sizes.d_model, heads * sizes.d_head, bias=False)
        self.down = nn.Parameter(torch.empty(2, rank, sizes.d_model))
        self.up = nn.Parameter(torch.empty(heads, 2, sizes.d_head, rank))
        self.hook_base = HookPoint(f"{name}_base", f"batch pos {axis} d_head")
        self.hook_low_rank = HookPoint(f"{name}_low_rank", f"batch pos {axis} d_head")

    def initialise_own(self) -> None:
        """Updates start as large as the base (`down` is drawn like it), so that the two maps of a head differ from the beginning."""
        nn.init.normal_(self.up, std=self.up.shape[-1] ** -0.5)

    @property
    def weight(self) -> Tensor:
        """The merged map, [map · d_head, d_model]."""
        base = self.base.weight.unflatten(0, (self.up.shape[0], 1, -1))
        return (base + torch.einsum("hidr,irm->hidm", self.up, self.down)).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, pos, d_model] -> [batch, pos, map · d_head]."""
        heads = self.up.shape[0]
        base = self.base(x).unflatten(-1, (heads, -1)).repeat_interleave(2, dim=2)
        low = torch.einsum("bpm,irm,hidr->bphid", x, self.down, self.up).flatten(2, 3)
        return (self.hook_base(base) + self.hook_low_rank(low)).flatten(-2)


def score_split(site: Any, cache: Any, prefix: str, context: Any) -> dict[str, Tensor]:
    """Content scores of a site with a shared base as four terms, `{"base·base", ...}`, each [batch, map, query, key].

    cache: of a run that kept `<prefix>.query.hook_base`, `.query.hook_low_rank` and the same of `.key`. context: positions of the run
    (`models.context.Context`); rotations are linear, so that they split too.
    """
    turned: dict[str, dict[str, Tensor]] = {}
    for name in ("query", "key"):
        turned[name] = {}
        for part in ("base", "low_rank"):
            x = cache[f"{prefix}.{name}.hook_{part}"]
            for rotation in site.rotate.values():
                x = rotation(x, rotation.prepare(context.positions, context, x.dtype), name)
            repeats = site.n_maps // x.shape[2] if name == "key" else 1
            turned[name][part] = x.transpose(1, 2).repeat_interleave(repeats, dim=1)
    return {
        f"{a}·{b}": q @ k.transpose(-1, -2) * site.scale
        for a, q in turned["query"].items()
        for b, k in turned["key"].items()
    }
