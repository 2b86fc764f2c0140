"""Transformer-XL's segments (Dai et al. 2019): a token reads its own segment and the hidden states of the `memory` tokens before it.

    h_all = [stop_gradient(memory) ; h];   q = W_Q h,   k = W_K h_all,   v = W_V h_all

What is carried from call to call are hidden states (what the layer's keys are made of), not keys and values, so that W_K and W_V learn
from the memory too; no gradient goes through the memory itself. Segments are counted in the text, so a text may be read in one call
(gradients then cross the borders of segments) or in any pieces, with the same result; the paper trains on calls of one segment each
(`models.segments.in_segments`). The paper's adaptive softmax at the end is not here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.attention.config import AttentionConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig
from models.attention.site import Attention
from models.attention.stages import Call, Mask, register_part
from models.context import Context
from models.mixers import register_mixer


@dataclass(frozen=True)
class RecentSegmentsConfig:
    """Args: segment: tokens of a segment. memory: tokens before the segment that can be read."""

    segment: int
    memory: int
    kind: str = "recent_segments"

    def __post_init__(self) -> None:
        if self.segment < 1 or self.memory < 0:
            raise ValueError(f"segment is {self.segment}, memory {self.memory}; expected at least 1 and at least 0.")


@register_part(RecentSegmentsConfig)
class RecentSegments(Mask):
    """Segments count from the beginning of the text."""

    def visible(self, call: Call) -> Tensor:
        """[batch or 1, 1, query, key]."""
        queries = call.context.positions
        first = queries // self.config.segment * self.config.segment - self.config.memory
        return call.context.key_positions[:, None, None, :] >= first[:, None, :, None]


@dataclass(frozen=True)
class TransformerXLConfig(AttentionConfig):
    """An attention site whose `mask` is a `RecentSegmentsConfig`; positions are terms of the score, not rotations."""

    position: Any = (KeyPreferenceConfig(), RelativeConfig())
    mask: Any = None
    kind: str = "transformer_xl"


@register_mixer(TransformerXLConfig)
class TransformerXL(Attention):
    """Carries `hidden` [batch, pos, d_model]: as many of the last tokens as can still be read (all of them where there is padding)."""

    def __init__(self, config: TransformerXLConfig, d_model: int, switches: dict[str, bool]) -> None:
        if not isinstance(config.mask, RecentSegmentsConfig):
            raise ValueError(f"mask is {config.mask!r}; expected RecentSegmentsConfig(segment=..., memory=...).")
        super().__init__(config, d_model, switches)
        own = [part.config.kind for part in self.parts if part.slots] + list(self.rotate)
        if own:
            raise ValueError(
                f"Parts that rotate or carry something of their own ({', '.join(own)}) do not go with a memory of hidden states. "
                "Expected terms of the score."
            )
        self.slots = ("hidden",)
        self.reach = config.mask.segment + config.mask.memory

    def forward(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        context: Context,
        carried: dict[str, Tensor] | None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As for an attention site; keys and values are those of the memory and of this call."""
        stream = x[0] if stream is None else stream
        k, v = x[1:]
        hidden, within = stream, replace(context, keep_state=False)
        if carried is not None:
            memory = carried["hidden"].detach()
            k, v = _after(memory, k), _after(memory, v)
            hidden = torch.cat([memory, stream], dim=1)
            within = within.knowing(memory.shape[1])
        out, _ = super().forward((x[0], k, v), within, None, stream)
        kept = hidden if context.key_mask is not None else hidden[:, -self.reach :]
        return out, {"hidden": kept} if context.keep_state else {}


def _after(memory: Tensor, x: Tensor) -> Tensor:
    """x [batch, pos, d_model], or [batch, pos, head, d_model] with an input for each head, behind the memory."""
    shape = memory if x.dim() == 3 else memory[:, :, None].expand(-1, -1, x.shape[2], -1)
    return torch.cat([shape, x], dim=1)
