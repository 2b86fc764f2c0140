"""Rotary positions that also know when a token was: rotations by place and by time (TO-RoPE 2025; SynerGen's time-aware RoPE).

Every pair k = 0, 1, … of a head's entries is turned by an angle, of the place i and of the time τ:

    "sum"    i base^(−k/K) + τ/unit · time_base^(−k/K), in each of the K pairs (early fusion)
    "pairs"  the first P pairs by place, i base^(−k/P), the other T by time, τ/unit · time_base^(−k/T)
    "heads"  the first heads by place, the others by time, each with all K pairs

Times are `facts["times"]`, [batch or 1, key], any numbers; without them a token's time is its place. Scores depend on differences of places
and of times only. Reconstructed: SynerGen's own formula could not be had; the three ways are those of TO-RoPE's abstract.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.stages import Rotation, Sizes, register_part
from models.context import Context
from models.parts.positions import rotate
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

SPLITS = ("sum", "pairs", "heads")


@dataclass(frozen=True)
class TimeRopeConfig:
    """Args: split: see the module docstring. share: of the pairs or heads that are turned by place. unit: the time of one step."""

    split: str = "pairs"
    share: float = 0.5
    base: float = 10000.0
    time_base: float = 10000.0
    unit: float = 1.0
    kind: str = "time_rope"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(
                f"Unknown split {self.split!r}.{suggestion(self.split, SPLITS)} Expected one of {', '.join(SPLITS)}."
            )
        if not 0 <= self.share <= 1 or self.unit <= 0:
            raise ValueError(f"share is {self.share}, unit {self.unit}; expected 0 ≤ share ≤ 1 and a unit above 0.")


@implements("synergen", "position", "TimeRope", note="the time-aware rotations alone, in TO-RoPE's forms")
@register_part(TimeRopeConfig)
class TimeRope(Rotation):
    """Pairs are (k, k + half), as in `Rotary`."""

    def __init__(self, config: TimeRopeConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if sizes.d_head % 2:
            raise ValueError(f"Rotations turn pairs: d_head is {sizes.d_head}, expected an even number.")

    def prepare(self, positions: Tensor, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [batch or 1, pos, key group or 1, d_head / 2]."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        pairs, config, heads = self.sizes.d_head // 2, self.config, self.sizes.n_key_maps
        first = round(config.share * pairs) if config.split == "pairs" else pairs
        rest = pairs - first if config.split == "pairs" else pairs
        times = self._times(positions, context).to(precise) / config.unit
        place = _angles(positions.to(precise), config.base, first)
        time = _angles(times, config.time_base, rest)
        if config.split == "sum":
            angle = place + time
        elif config.split == "pairs":
            both = max(len(place), len(time))  # either may be the same for all sequences
            angle = torch.cat([part.expand(both, -1, -1, -1) for part in (place, time)], dim=-1)
        else:
            by_place = torch.arange(heads, device=positions.device) < round(config.share * heads)
            angle = torch.where(by_place[:, None], place, time)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _times(self, positions: Tensor, context: Context) -> Tensor:
        """Of the tokens at `positions`, which are those of this call, [batch or 1, pos]."""
        times = context.fact("times")
        if times is None:
            return positions
        known = context.key_positions.shape[1]
        if times.dim() != 2 or times.shape[1] != known:
            raise ValueError(
                f"facts['times'] has shape {tuple(times.shape)}; expected [batch or 1, key] with key = {known}, all tokens read so far and "
                "now."
            )
        return times[:, context.offset :].to(positions.device)

    def forward(self, x: Tensor, prepared: tuple[Tensor, Tensor], name: str) -> Tensor:
        cosine, sine = prepared
        if cosine.shape[2] > 1 and name == "query":  # a head is turned as the keys that it reads
            repeats = x.shape[2] // cosine.shape[2]
            cosine, sine = (part.repeat_interleave(repeats, dim=2) for part in prepared)
        return rotate(x, cosine, sine, interleaved=False)


def _angles(steps: Tensor, base: float, pairs: int) -> Tensor:
    """Of `pairs` pairs, the first turns by 1 per step, the last the slowest. steps [batch or 1, pos] -> [batch or 1, pos, 1, pair]."""
    share = torch.arange(pairs, device=steps.device, dtype=steps.dtype) / max(1, pairs)
    return steps[..., None, None] * base**-share
