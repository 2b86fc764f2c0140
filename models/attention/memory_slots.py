"""Attention of a Recurrent Memory Transformer: a token reads the slots of a memory, and its own segment up to itself.

    weights = softmax([ q · k_slots ; q · k_tokens ])               hook_memory_scores, hook_attn_scores
    z       = weights_slots v_slots + weights_tokens v_tokens       hook_memory_pattern, hook_pattern

One softmax over both, in two hook points: `hook_pattern` has the text's tokens as its columns, as in every other architecture, and
`hook_memory_pattern` [batch, head, query, slot] is what they leave to the memory. When a segment is full, slots come as queries and read
its tokens: `hook_writing_pattern` [batch, head, slot, key], the weight of every token in the writing of its own segment (0 where that was
not written; the rest of a row goes to the memory). Where slots come from, and when, is the model's: `models.memory_tokens`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.config import AttentionConfig
from models.attention.site import Attention
from models.attention.stages import Call
from models.context import Context
from models.mixers import register_mixer
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.pieces import aloud


@dataclass(frozen=True)
class MemorySlotsConfig(AttentionConfig):
    """An attention site beside a memory. Positions are rotations or none; they count the slots first and then the segment.

    Args:
        slots: memory tokens. segment: tokens between two writings of the memory; all layers of a model agree on both.
        both_ways: slots that are read see each other in both directions; False: each sees those before it.
    """

    position: Any = "rope"
    slots: int = 4
    segment: int = 32
    both_ways: bool = True
    kind: str = "memory_slots"

    def __post_init__(self) -> None:
        if self.slots < 1 or self.segment < 1:
            raise ValueError(f"slots is {self.slots}, segment {self.segment}; expected at least 1 each.")

    @property
    def own_stages(self) -> tuple[tuple[str, str], ...]:
        """What a diagram of the model shows besides the stages of every attention site."""
        return ((f"{self.slots} memory slots", f"segments of {self.segment}"),)


@dataclass
class SlotsContext(Context):
    """What a layer must know when its keys are those of a memory, followed by those of tokens.

    Args:
        slots: keys of the memory. first: absolute position of the first token among the keys; None: there is none, or nobody asks.
        writing: the queries write the memory, [batch or 1, key]: True at tokens whose segment is being written. last: the number of all
            tokens of the text so far, for which the map of the writing has a column.
    """

    slots: int = 0
    first: int | None = None
    writing: Tensor | None = None
    last: int = 0


@register_mixer(MemorySlotsConfig)
class MemorySlots(Attention):
    """Carries `key` and `value` of the unfinished segment, [batch, place, kv_head, d_head]; the first layer also `state`
    [batch, slot, d_model], what its tokens read."""

    config: MemorySlotsConfig
    hook_state: HookPoint

    def __init__(self, config: MemorySlotsConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(config, d_model, switches)
        unfit = [
            name for name in ("score", "mask", "normalise", "softcap", "window") if getattr(config, name) is not None
        ]
        unfit += [name for name in ("bias", "reweight", "mix") if len(getattr(self, name))]
        unfit += [f"{name} positions" for name in sorted(config.embedded_positions)]
        if unfit or not self.causal:
            raise ValueError(
                f"Memory slots do not go with {', '.join(unfit) or 'causal=False'}: they are keys before every segment. Expected an "
                "ordinary causal softmax whose positions are rotations or none."
            )

    def _declare_hook_points(self) -> None:
        super()._declare_hook_points()
        meta = self.hook_pattern.meta
        self.hook_pattern.meta = replace(meta, rows_sum_to="free", exact=False, label="memory slots get the rest")
        self.hook_memory_scores = HookPoint("memory_scores", f"batch {self.sizes.map_axis} query slot")
        self.hook_memory_pattern = HookPoint("memory_pattern", "batch head query slot")
        self.hook_writing_pattern = HookPoint("writing_pattern", "batch head slot key")

    def placed(self, layer: int, earlier: list[Any]) -> None:
        """The first layer, where the memory enters, owns it."""
        super().placed(layer, earlier)
        if layer == 0:
            self.hook_state = HookPoint("state", "batch slot d_model", per_position=True)
            self.slots = ("state", *self.slots)

    def forward(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        context: Context,
        carried: dict[str, Tensor] | None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As for an attention site; `carried` begins with keys and values of the memory.

        Raises:
            TypeError: the model around it keeps no memory.
        """
        if not isinstance(context, SlotsContext):
            raise TypeError(
                "MemorySlotsConfig belongs to a model with a memory. Expected models.memory_tokens.RecurrentMemory."
            )
        return super().forward(x, context, carried, stream)

    @property
    def watched(self) -> bool:
        """Whether somebody watches which tokens are read, so that keys of the whole call are wanted."""
        return self._watched()

    def _watched(self) -> bool:
        own = (self.hook_memory_scores, self.hook_memory_pattern, self.hook_writing_pattern)
        return super()._watched() or any(point.active for point in own)

    def _fast(self, context: Context, length: int) -> bool:
        return getattr(context, "writing", None) is None and super()._fast(context, length)

    def _mix(self, q: Tensor | None, k: Tensor | None, v: Tensor, call: Call) -> Tensor:
        if getattr(call.context, "writing", None) is None:
            return super()._mix(q, k, v, call)
        assert q is not None and k is not None
        repeats = self.n_heads // self.n_kv
        call.q = q.transpose(1, 2)
        call.k, call.v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
        return self._mix_written(call)

    def _mix_written(self, call: Call) -> Tensor:
        """As a softmax over memory, tokens and the slots that write, with the map to the tokens passing its hook point."""
        context = call.context
        assert isinstance(context, SlotsContext) and context.writing is not None and context.first is not None
        count, first, own = context.slots, context.first, context.writing[:, None, None]
        scores = torch.add(self._mask(call, call.v.dtype), call.q @ call.k.transpose(-1, -2), alpha=self.scale)
        weights = scores.softmax(-1)
        read = weights[..., count : count + own.shape[-1]]
        behind = context.last - first - own.shape[-1]
        shown = F.pad(torch.where(own, read, 0.0), (first, behind))
        edited = aloud(self.hook_writing_pattern, shown)[..., first : first + own.shape[-1]]
        read = torch.where(own, edited, read)  # other columns are another segment's, and count when that is written
        weights = torch.cat([weights[..., :count], read, weights[..., count + own.shape[-1] :]], -1)
        return self.hook_z((weights @ call.v).transpose(1, 2))

    def _mix_explicitly(self, call: Call) -> Tensor:
        context = call.context
        assert isinstance(context, SlotsContext)
        if context.first is None:
            return super()._mix_explicitly(call)  # the memory by itself: nobody watches
        count, first, hidden = context.slots, context.first, float("-inf")
        mask = self._mask(call, call.v.dtype)
        if self.hook_mask.active:
            mask = mask.expand(call.v.shape[0], self.n_maps, -1, -1)
            mask = torch.cat([mask[..., :count], over_text(self.hook_mask, mask[..., count:], first, hidden)], -1)
        scores = torch.add(mask, call.q @ call.k.transpose(-1, -2), alpha=self.scale)
        of_slots = self.hook_memory_scores(scores[..., :count])
        of_tokens = over_text(self.hook_attn_scores, scores[..., count:], first, hidden)
        weights = torch.cat([of_slots, of_tokens], -1).softmax(-1)
        read = self.hook_memory_pattern(weights[..., :count]) @ call.v[:, :, :count]
        pattern = over_text(self.hook_pattern, weights[..., count:], first, 0.0)
        return self.hook_z((read + pattern @ call.v[:, :, count:]).transpose(1, 2))

    @property
    def form(self) -> str:
        """Products of the tokens' queries and keys do not tell what the memory is given."""
        return "dense"

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        config, record = self.config, super().describe()
        return record | {"parts": [f"memory: {config.slots} slots, segments of {config.segment}", *record["parts"]]}


def over_text(point: HookPoint, x: Tensor, first: int, fill: float) -> Tensor:
    """Pass a hook point with a column for every token of the text, also for those before `first`, of which nothing is kept.

    x: [batch, head, query, key] with keys from `first` on; same shape back.

    Raises:
        HookError: an edit of a column of which nothing is kept.
    """
    if not first or not point.active:
        return point(x)
    got = point(F.pad(x, (first, 0), value=fill))
    if not bool((got[..., :first] == fill).all()):
        raise HookError(
            f"The edit at {point.name!r} lets tokens before {first} be read, whose segments earlier calls finished: of them only the "
            f"memory is left. Expected keys from {first} on, or the whole text in one call."
        )
    return got[..., first:]
