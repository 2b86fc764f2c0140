"""The attention site: project → rotate → score → bias → mask → normalise → mix → post, each stage readable and editable.

    q, k, v = W_Q x, W_K x, W_V x            hook_q, hook_k, hook_v
    q, k    = rotate(q), rotate(k)           hook_rot_q, hook_rot_k          (RoPE only)
    s       = scale · q kᵀ + bias, masked    bias.hook_bias, hook_attn_scores
    p       = softmax(s)                     hook_pattern
    z       = p v                            hook_z
    out     = Σ_head W_O z                   hook_result (per head, on demand)

With nobody watching between scores and z the fused kernel (SDPA) runs and no query × key array exists, but for the mask that the
kernel is handed where there is a window, padding, ALiBi, or a text that goes on after a carried state: one for the whole batch and,
without ALiBi, for all heads. Watching scores or pattern makes this layer explicit, with the same result. Grouped-query attention
(Ainslie et al. 2023): head h reads key/value group ⌊h·n_kv/n_heads⌋; one group is multi-query attention (Shazeer 2019).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.positions import POSITIONS, PositionBias, Rotary
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class AttentionConfig:
    """Causal multi-head attention.

    Args:
        n_heads: query heads. n_key_value_heads: key/value groups (None: one per head; 1: multi-query).
        d_head: width of a head (None: d_model / n_heads).
        position: `"rope"`, `"alibi"` act here; `"learned"`, `"sinusoidal"` at the embedding; `"none"`.
        rope_base, rope_fraction, rope_interleaved: see `Rotary`.
        bias: biases on the projections. scale: score factor (None: d_head^-½). window: how many tokens back a token may read (None: all).
    """

    n_heads: int
    n_key_value_heads: int | None = None
    d_head: int | None = None
    position: str = "learned"
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    bias: bool = True
    scale: float | None = None
    window: int | None = None
    kind: str = "attention"


@register_mixer(AttentionConfig)
class Attention(nn.Module):
    """The attention site of one layer. Input and output [batch, pos, d_model]; see the module docstring for its stages."""

    slots = ("key", "value")  # what it carries from call to call

    def __init__(self, config: AttentionConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.position not in POSITIONS:
            raise ValueError(
                f"Unknown position {config.position!r}.{suggestion(config.position, POSITIONS)} Expected one of {', '.join(POSITIONS)}."
            )
        if config.window is not None and config.window < 1:
            raise ValueError(
                f"window is {config.window}; expected at least 1 (the token itself), or None for no limit."
            )
        self.config, self.switches = config, switches
        self.n_heads = config.n_heads
        self.n_kv = config.n_key_value_heads or config.n_heads
        if self.n_heads % self.n_kv:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({self.n_kv}).")
        if config.d_head is None and d_model % self.n_heads:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of n_heads ({self.n_heads}) unless d_head is given."
            )
        self.d_head = config.d_head or d_model // self.n_heads
        self.scale = config.scale if config.scale is not None else self.d_head**-0.5
        self.query = nn.Linear(d_model, self.n_heads * self.d_head, bias=config.bias)
        self.key = nn.Linear(d_model, self.n_kv * self.d_head, bias=config.bias)
        self.value = nn.Linear(d_model, self.n_kv * self.d_head, bias=config.bias)
        self.output = nn.Linear(self.n_heads * self.d_head, d_model, bias=config.bias)

        kv_head = "head" if self.n_kv == self.n_heads else "kv_head"
        self.hook_q = HookPoint("query", "batch pos head d_head")
        self.hook_k = HookPoint("key", f"batch pos {kv_head} d_head")
        self.hook_v = HookPoint("value", f"batch pos {kv_head} d_head")
        if config.position == "rope":
            self.rotary = Rotary(self.d_head, config.rope_base, config.rope_fraction, config.rope_interleaved)
            self.hook_rot_q = HookPoint("rotated_query", "batch pos head d_head")
            self.hook_rot_k = HookPoint("rotated_key", f"batch pos {kv_head} d_head")
        self.bias = PositionBias(self.n_heads) if config.position == "alibi" else None
        self.hook_attn_scores = HookPoint("scores", "batch head query key")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=PatternMeta())
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_result = HookPoint("result", "batch pos head d_model", on_demand=True, flag="use_attn_result")

    def forward(
        self, x: tuple[Tensor, Tensor, Tensor], context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix tokens.

        Args:
            x: inputs of queries, keys and values: [batch, pos, d_model] each (normally one tensor thrice), or [batch, pos, head, d_model]
                where heads have inputs of their own (split input).
            carried: `key` and `value` of earlier calls, [batch, pos, kv_head, d_head].
        """
        batch, length = x[0].shape[0], x[0].shape[1]
        if x[0].dim() == 3:
            q = self.query(x[0]).view(batch, length, self.n_heads, self.d_head)
            k = self.key(x[1]).view(batch, length, self.n_kv, self.d_head)
            v = self.value(x[2]).view(batch, length, self.n_kv, self.d_head)
        else:
            q, k, v = (self._project(own, w) for own, w in zip(x, (self.query, self.key, self.value), strict=True))
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if self.config.position == "rope":
            cosine, sine = self.rotary.angles(context.positions, q.dtype)
            q = self.hook_rot_q(self.rotary(q, cosine, sine))
            k = self.hook_rot_k(self.rotary(k, cosine, sine))
        if carried is not None:
            k = torch.cat([carried["key"], k], dim=1)
            v = torch.cat([carried["value"], v], dim=1)
        z = self.hook_z(self._mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context).transpose(1, 2))
        return self._out(z), {"key": k, "value": v} if context.keep_state else {}

    def _project(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """Each head projects an input of its own: [batch, pos, head, d_model] -> [batch, pos, head, d_head]."""
        out = torch.einsum("bphm,hdm->bphd", x, linear.weight.unflatten(0, (-1, self.d_head)))
        return out if linear.bias is None else out + linear.bias.unflatten(0, (-1, self.d_head))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q [batch, head, query, d_head], k and v [batch, kv_head, key, d_head] -> [batch, head, query, d_head]."""
        length = q.shape[2]
        if (
            self.hook_attn_scores.active
            or self.hook_pattern.active
            or (self.bias is not None and self.bias.hook_bias.active)
        ):
            return self._mix_explicitly(q, k, v, context)
        plain = self.bias is None and context.key_mask is None and self.config.window is None
        if plain and (context.offset == 0 or length == 1):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=context.offset == 0 and length > 1,
                scale=self.scale,
                enable_gqa=self.n_kv < self.n_heads,
            )
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask(q, context), scale=self.scale, enable_gqa=self.n_kv < self.n_heads
        )

    def _mix_explicitly(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if self.n_kv < self.n_heads:
            k = k.repeat_interleave(self.n_heads // self.n_kv, dim=1)
            v = v.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        scores = self.hook_attn_scores(torch.add(self._mask(q, context), q @ k.transpose(-1, -2), alpha=self.scale))
        return self.hook_pattern(scores.softmax(-1)) @ v

    def _mask(self, q: Tensor, context: Context) -> Tensor:
        """What is added to the scores: −inf where a query may not read, plus the position bias. [batch or 1, head or 1, query, key]."""
        mask = context.mask_to_add(q, self.config.window)
        if self.bias is None:
            return mask
        # one bias serves the whole batch, unless sequences differ by padding or somebody watches them apart
        batch = q.shape[0] if self.bias.hook_bias.active else mask.shape[0]
        return mask + self.bias(batch, context.positions, context.key_positions, q.dtype)

    def _out(self, z: Tensor) -> Tensor:
        if not self.hook_result.active:
            return self.output(z.flatten(-2))
        result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O))
        return result.sum(2) + self.b_O

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine the pattern."""
        rotated = self.config.position == "rope"
        return {
            "query": self.hook_rot_q if rotated else self.hook_q,
            "key": self.hook_rot_k if rotated else self.hook_k,
            "value": self.hook_v,
        }

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return {
            "kind": "attention",
            "form": "softmax",
            "n_heads": self.n_heads,
            "n_key_heads": self.n_kv,
            "n_value_heads": self.n_kv,
            "scale": self.scale,
            "strict": False,
            "alibi_slopes": None if self.bias is None else self.bias.slopes.tolist(),
            "window": self.config.window,
            "pattern": self.hook_pattern.meta.as_dict(),
            "state": None,
            "signals": [],
        }

    # Weights under TransformerLens's names and shapes.

    @property
    def W_Q(self) -> Tensor:
        """[head, d_model, d_head]."""
        return self.query.weight.unflatten(0, (self.n_heads, self.d_head)).transpose(1, 2)

    @property
    def W_K(self) -> Tensor:
        """[kv_head, d_model, d_head]."""
        return self.key.weight.unflatten(0, (self.n_kv, self.d_head)).transpose(1, 2)

    @property
    def W_V(self) -> Tensor:
        """[kv_head, d_model, d_head]."""
        return self.value.weight.unflatten(0, (self.n_kv, self.d_head)).transpose(1, 2)

    @property
    def W_O(self) -> Tensor:
        """[head, d_head, d_model]."""
        return self.output.weight.T.unflatten(0, (self.n_heads, self.d_head))

    @property
    def b_Q(self) -> Tensor:
        """[head, d_head]."""
        return self._bias_of(self.query, self.n_heads)

    @property
    def b_K(self) -> Tensor:
        """[kv_head, d_head]."""
        return self._bias_of(self.key, self.n_kv)

    @property
    def b_V(self) -> Tensor:
        """[kv_head, d_head]."""
        return self._bias_of(self.value, self.n_kv)

    @property
    def b_O(self) -> Tensor:
        """[d_model]."""
        weight = self.output.weight
        return self.output.bias if self.output.bias is not None else weight.new_zeros(weight.shape[0])

    def _bias_of(self, linear: nn.Linear, heads: int) -> Tensor:
        bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.weight.shape[0])
        return bias.unflatten(0, (heads, self.d_head))
