"""Cross-attention (Vaswani et al. 2017, section 3.2.3): the text asks, and a source that was read before it answers.

    q = W_Q x,   k, v = W_K s, W_V s        x the text's stream, s the source's

Every token of the source is visible to every token of the text, but for the source's padding. Keys and values are made once and carried
from call to call with the source's mask, so that a text that goes on needs no source again. Everything else is the attention site's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.config import AttentionConfig
from models.attention.site import Attention
from models.context import Context
from models.mixers import register_mixer
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class CrossAttentionConfig(AttentionConfig):
    """As `AttentionConfig`, without positions unless they are asked for. `causal`, `window` and `mask` make no sense on a source."""

    position: Any = "none"
    causal: bool = False
    kind: str = "cross_attention"

    def check(self) -> None:
        super().check()
        for name, unset in (("causal", False), ("window", None), ("mask", None)):
            if getattr(self, name) != unset:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} on a cross-attention site; expected {unset!r}: a source is visible as a whole."
                )


@dataclass(frozen=True)
class Source:
    """What cross-attention reads: stream [batch or 1, source, d_model]; mask [batch or 1, source], True at real tokens (None: all)."""

    stream: Tensor
    mask: Tensor | None = None

    def for_batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Stream [batch, source, d_model] and mask [batch, source]; raises ValueError where the source is another number of sequences."""
        own, length = self.stream.shape[:2]
        if own not in (1, batch):
            raise ValueError(
                f"The source holds a batch of {own}, the tokens a batch of {batch}. Expected one source, or one for each."
            )
        mask = torch.ones(own, length, dtype=torch.bool, device=self.stream.device) if self.mask is None else self.mask
        return self.stream.expand(batch, -1, -1), mask.expand(batch, -1)


@register_mixer(CrossAttentionConfig)
class CrossAttention(Attention):
    """Reads `facts["source"]`, a `Source`. Its pattern's columns are the source's tokens; its slots hold their keys and values."""

    reads_source = True

    def __init__(self, config: CrossAttentionConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(config, d_model, switches)
        self.slots = (*self.slots, "source_mask")

    def _declare_hook_points(self) -> None:
        super()._declare_hook_points()
        read = [getattr(self, name, None) for name in ("hook_k", "hook_rot_k", "hook_v")]
        normed = [] if self.qk_norm is None else hook_points_of(self.qk_norm.key)
        for point in (*filter(None, read), *normed):
            point.axes = tuple("source" if axis == "pos" else axis for axis in point.axes)
        self.hook_pattern.meta = replace(self.hook_pattern.meta, columns="source token")

    def forward(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        context: Context,
        carried: dict[str, Tensor] | None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Attention.forward`; of the inputs only the queries' is read.

        Raises:
            ValueError: neither a source nor a carried one, or one of another batch.
        """
        read = x[0]
        if carried is None:
            source = context.fact("source")
            if not isinstance(source, Source):
                raise ValueError(
                    "Cross-attention needs a source. Expected facts={'source': ...} in the call, or a state that carries one."
                )
            read, mask = source.for_batch(x[0].shape[0])
        else:
            mask = carried["source_mask"]
        visible = mask if torch.compiler.is_compiling() or not bool(mask.all()) else None
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out, handed_on = super().forward((x[0], read, read), context.of_source(positions, visible), carried, stream)
        if context.keep_state:
            handed_on["source_mask"] = mask.clone()  # one of its own per layer, as a saved state has it
        return out, handed_on

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """None: runs keep factors of their own tokens, and keys and values are the source's. They keep the pattern as it is."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return super().describe() | {"kind": "cross_attention", "form": "dense"}


def hook_points_of(module: nn.Module) -> list[HookPoint]:
    """Every hook point of a module and of those below it."""
    return [value for item in module.modules() for value in vars(item).values() if isinstance(value, HookPoint)]
