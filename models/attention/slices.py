"""Attention without some projections (Hosseini & Hosseini 2024, "You need to pay better attention"): heads read slices of the input.

Optimised attention leaves out W_V, efficient attention W_K and W_V. Super attention also mixes values over places before they are read:
`models.attention.value_alignment`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Projection, register_part


@dataclass(frozen=True)
class SliceConfig:
    """Args: names: the projections to leave out, of `"query"`, `"key"`, `"value"`."""

    names: tuple[str, ...] = ("value",)
    kind: str = "slice"


@register_part(SliceConfig)
class SliceProjection(Projection):
    """The identity in the place of the named maps."""

    def linear(self, name: str, width: int, bias: bool) -> nn.Module:
        if name not in self.config.names:
            return super().linear(name, width, bias)
        if width != self.sizes.d_model or bias:
            raise ValueError(
                f"A slice of the input in the place of W for {name!r} needs heads × width = d_model ({self.sizes.d_model}, got {width}) "
                "and no bias."
            )
        return Slices(width)


class Slices(nn.Module):
    """The identity, told like a linear map."""

    bias = None
    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x
