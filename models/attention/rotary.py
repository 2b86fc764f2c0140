"""Queries and keys changed before they meet: rotary positions, norms of queries and keys, and scores that sharpen with length."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.stages import Part, Rotation, Sizes, register_nested, register_part
from models.context import Context
from models.parts.norms import Norm
from models.parts.positions import Rotary
from models.parts.rope_scaling import RopeScaling

register_nested(RopeScaling)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021); see `models.parts.positions.Rotary` and, for `scaling`, `models.parts.rope_scaling`."""

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None
    kind: str = "rope"


@register_part(RopeConfig)
class Rope(Rotation):
    """Turns pairs of entries by angles in proportion to the position."""

    def __init__(self, config: RopeConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.rotary = Rotary(sizes.d_head, config.base, config.fraction, config.interleaved, config.scaling)

    def prepare(self, positions: Tensor, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines; a scaling that depends on the length looks at the longest text of the call."""
        length = int(context.key_positions.max()) + 1 if self.rotary.needs_length else None
        return self.rotary.angles(positions, dtype, length)

    def forward(self, x: Tensor, prepared: tuple[Tensor, Tensor], name: str) -> Tensor:
        return self.rotary(x, *prepared)


@dataclass(frozen=True)
class SSMaxConfig:
    """Scores times s_h · log n for a query that can see n tokens (Nakanishi 2025, "Scalable-softmax"): rows stay sharp in long texts."""

    kind: str = "ssmax"


@register_part(SSMaxConfig)
class SSMax(Rotation):
    """Scales queries, which is the same as scaling the rows of the scores. `s` [head] starts at 1."""

    def __init__(self, config: SSMaxConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.s = nn.Parameter(torch.ones(sizes.n_maps))

    def prepare(self, positions: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """log n, [batch or 1, pos, 1, 1]."""
        return (positions + 1).to(dtype).log()[:, :, None, None]

    def forward(self, x: Tensor, prepared: Tensor, name: str) -> Tensor:
        return x * prepared * self.s[:, None] if name == "query" else x


@dataclass(frozen=True)
class QKNormConfig:
    """Queries and keys normalised before they meet (Henry et al. 2020; Qwen 3, OLMo 2, ...).

    Args:
        norm: `"rms"` or `"layer"`. over: `"head"` normalises every head by itself with one set of weights, `"all"` all heads together.
        affine: learn weights. after_rotation: normalise rotated queries and keys instead of those that will be rotated.
    """

    norm: str = "rms"
    eps: float = 1e-6
    over: str = "head"
    affine: bool = True
    after_rotation: bool = False
    kind: str = "qk_norm"

    def __post_init__(self) -> None:
        if self.over not in ("head", "all"):
            raise ValueError(f"Unknown over {self.over!r}. Expected 'head' or 'all'.")


@register_part(QKNormConfig)
class QKNorm(Part):
    """Norms of queries (`query`) and keys (`key`), each with `hook_scale` and `hook_normalized`."""

    stage = "qk_norm"

    def __init__(self, config: QKNormConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)

        def norm(heads: int, axis: str) -> Norm:
            if config.over == "head":
                return Norm(config.norm, sizes.d_head, config.eps, config.affine, f"batch pos {axis} d_head")
            return Norm(config.norm, sizes.d_head * heads, config.eps, config.affine, "batch pos all_heads")

        self.query = norm(sizes.n_maps, sizes.map_axis)
        self.key = norm(sizes.n_key_maps, sizes.key_axis)

    def forward(self, x: Tensor, name: str) -> Tensor:
        """x [batch, pos, head, d_head], of queries or keys; same shape."""
        norm: Any = self.query if name == "query" else self.key
        if self.config.over == "head":
            return norm(x)
        return norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])
