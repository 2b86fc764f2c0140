"""Infini-attention (Munkhdalai et al. 2024): softmax attention within a segment, and a matrix memory of all segments before it.

    local_i = softmax attention of token i over its own segment (rotated queries and keys)
    read_i  = σ(q_i) M / (σ(q_i) · z)                        σ(x) = elu(x) + 1, per head; 0 while the memory is empty
    out_i   = W_O( g read_i + (1 − g) local_i )               g = sigmoid(β), one number per head
    at the end of a segment:  M += σ(K)ᵀ V,  z += Σ_j σ(k_j)                    update "linear"
                              M += σ(K)ᵀ (V − σ(K) M / (σ(K) z)), the same z     update "delta"

Queries and keys of the memory are not rotated. The output is linear in the values, so there is an exact pattern over all tokens: what the
mixer gives for the values of an identity matrix. With the linear update the memory's share of it is linear attention over earlier
segments. `state` is M, `normaliser` is z, after every token; they change at the ends of segments. One public reimplementation gates the
other way round.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context, to_add
from models.mixers import register_mixer
from models.parts.positions import Rotary
from models.recurrent.linear_core import linear_record, watched
from models.segments import SegmentGrid, real_tokens
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

UPDATES = ("linear", "delta")


@dataclass(frozen=True)
class InfiniConfig:
    """Args: segment: tokens of a segment. update: `"linear"` or `"delta"` (takes back what the keys recall before it writes)."""

    n_heads: int
    segment: int
    update: str = "linear"
    rope_base: float = 10000.0
    kind: str = "infini"


@register_mixer(InfiniConfig)
class Infini(nn.Module):
    """Infini-attention of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "normaliser", "key", "rotated_key", "value")
    strict = False

    def __init__(self, config: InfiniConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.update not in UPDATES:
            raise ValueError(
                f"Unknown update {config.update!r}.{suggestion(config.update, UPDATES)} Expected one of {UPDATES}."
            )
        if config.segment < 1 or d_model % config.n_heads:
            raise ValueError(
                f"segment is {config.segment}, d_model {d_model}, n_heads {config.n_heads}; expected a segment of at least one token and "
                "d_model a multiple of n_heads."
            )
        self.config, self.n_heads, self.d_head = config, config.n_heads, d_model // config.n_heads
        self.scale = self.d_head**-0.5
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.rotary = Rotary(self.d_head, config.rope_base)
        self.gate = nn.Parameter(torch.zeros(config.n_heads))
        axes = "batch pos head d_head"
        self.hook_q, self.hook_k, self.hook_v = (HookPoint(role, axes) for role in ("query", "key", "value"))
        self.hook_rot_q, self.hook_rot_k = HookPoint("rotated_query", axes), HookPoint("rotated_key", axes)
        self.hook_local_z, self.hook_memory_z = HookPoint("local_z", axes), HookPoint("memory_z", axes)
        self.hook_gate = HookPoint("gate", "batch pos head one")
        meta = PatternMeta(
            signed=config.update == "delta", rows_sum_to="free", effective=True, label="own segment and memory"
        )
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_z = HookPoint("z", axes)
        self.hook_state = HookPoint("state", "batch head state_k state_v", per_position=True)
        self.hook_normaliser = HookPoint("state", "batch head state_k", per_position=True)

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Carries M and z, and keys and values of the unfinished segment, [batch, place, head, d_head]."""
        shape = (self.n_heads, self.d_head)
        q, k, v = (
            hook(linear(x).unflatten(-1, shape))
            for hook, linear in ((self.hook_q, self.query), (self.hook_k, self.key), (self.hook_v, self.value))
        )
        cosine, sine = self.rotary.angles(context.positions, x.dtype)
        tokens = {"query": q, "key": k, "value": v}
        tokens |= {
            "rotated_query": self.hook_rot_q(self.rotary(q, cosine, sine)),
            "rotated_key": self.hook_rot_k(self.rotary(k, cosine, sine)),
        }
        gate = self.gate.sigmoid().to(x.dtype)[:, None].expand(*x.shape[:2], -1, -1)
        tokens["gate"] = self.hook_gate(gate)
        local, read, slots = self._read(tokens, context, carried, True)
        g = tokens["gate"]
        z = g * self.hook_memory_z(read) + (1 - g) * self.hook_local_z(local)
        z = watched(
            self.hook_pattern, context, z.transpose(1, 2), v.transpose(1, 2), lambda: self._pattern(tokens, context)
        )
        z = self.hook_z(z.transpose(1, 2))
        return self.output(z.flatten(-2)), slots if context.keep_state else {}

    def _pattern(self, tokens: dict[str, Tensor], context: Context) -> Tensor:
        """[batch, head, query, key]: what comes out for the values of an identity matrix."""
        q, g = tokens["query"], tokens["gate"]
        one_each = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)[None, :, None].expand(*q.shape[:3], -1)
        local, read, _ = self._read({**tokens, "value": one_each}, context, None, False)
        return (g * read + (1 - g) * local).transpose(1, 2)

    def _read(
        self, tokens: dict[str, Tensor], context: Context, carried: dict[str, Tensor] | None, hooked: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What tokens read of their segment and of the memory, [batch, pos, head, width] each, and the slots after the last token.

        A call in which states are watched is read piece by piece between the watched positions.
        """
        q, v = tokens["query"], tokens["value"]
        batch, length = q.shape[:2]
        precise = torch.promote_types(q.dtype, torch.float32)
        if carried is None:
            empty = q.new_zeros(batch, self.n_heads, self.d_head, v.shape[-1], dtype=precise)
            begun = {
                name: tokens[name].new_zeros(batch, self.config.segment, *tokens[name].shape[2:])
                for name in self.slots[2:]
            }
            carried = {"state": empty, "normaliser": empty.new_zeros(batch, self.n_heads, self.d_head), **begun}
        real, before = real_tokens(context, length, q.device), context.read_before
        watched_points = (self.hook_state, self.hook_normaliser) if hooked else ()
        stops = {t for point in watched_points if point.active for t in point.stops(context.offset, length)}
        pieces, start = [], 0
        for stop in sorted({*(t + 1 for t in stops), length}):
            piece = {name: tokens[name][:, start:stop] for name in ("query", "rotated_query", *self.slots[2:])}
            grid = SegmentGrid(before, real[:, start:stop], self.config.segment)
            *read, carried = self._read_piece(piece, grid, carried)
            pieces.append(read)
            before = before + real[:, start:stop].sum(1)
            if stop - 1 in stops:
                at = context.offset + stop - 1
                for name, point in (("state", self.hook_state), ("normaliser", self.hook_normaliser)):
                    if point.active and stop - 1 in point.stops(context.offset, length):
                        carried[name] = point.at(at, carried[name])
            start = stop
        local, memory = (torch.cat(parts, dim=1).to(q.dtype) for parts in zip(*pieces, strict=True))
        return local, memory, carried

    def _read_piece(
        self, tokens: dict[str, Tensor], grid: SegmentGrid, carried: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        state, normaliser = carried["state"], carried["normaliser"]
        q, rotated_q = (grid.sort(tokens[name]) for name in ("query", "rotated_query"))
        k, rotated_k, v = (grid.sort(tokens[name], carried[name]) for name in self.slots[2:])
        scores = torch.einsum("bsihd,bsjhd->bshij", rotated_q, rotated_k) * self.scale
        order = torch.arange(grid.length, device=q.device)
        local = (scores + to_add(order[None, :] <= order[:, None], q.dtype)).softmax(-1)
        local = torch.einsum("bshij,bsjhv->bsihv", local, v)
        write, ask, values = (F.elu(k) + 1).to(state), (F.elu(q) + 1).to(state), v.to(state)
        full = grid.filled().all(-1).to(state)[..., None, None, None]  # [batch or 1, segment, 1, 1, 1]
        read = []
        for s in range(grid.segments):
            read.append(recall(ask[:, s], state, normaliser))
            new = values[:, s]
            if self.config.update == "delta":
                new = new - recall(write[:, s], state, normaliser)
            state = state + full[:, s] * torch.einsum("bjhk,bjhv->bhkv", write[:, s], new)
            normaliser = normaliser + full[:, s, 0] * write[:, s].sum(1)
        begun = {name: grid.unfinished(kept) for name, kept in zip(self.slots[2:], (k, rotated_k, v), strict=True)}
        slots = {"state": state, "normaliser": normaliser, **begun}
        return grid.unsort(local), grid.unsort(torch.stack(read, dim=1)), slots

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """Queries, keys and values; the pattern also needs the rotations and the gate."""
        return {"query": self.hook_q, "key": self.hook_k, "value": self.hook_v}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals that a run keeps."""
        return {"gate": (self.hook_gate, "share of the memory", None)}

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads, width = self.n_heads, self.d_head
        return linear_record("infini", self, heads, heads, heads, (heads, width, width), "dense")


def recall(features: Tensor, state: Tensor, normaliser: Tensor) -> Tensor:
    """f M / (f · z), 0 where nothing was written. features [batch, place, head, state_k] -> [batch, place, head, state_v]."""
    weight = torch.einsum("bihk,bhk->bih", features, normaliser)[..., None]
    found = torch.einsum("bihk,bhkv->bihv", features, state)
    written = weight != 0
    return torch.where(written, found / torch.where(written, weight, 1.0), 0.0)
