"""`DeltaCore`: the hooked form of the gated delta rule, shared by DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    S   <- diag(exp(log_decay_t)) S_{t−1}
    u_t  = write_t (v_t − Sᵀ k_t)                 hook_pseudo_value: what is really written, the key's old value taken back
    S_t  = S + k_t u_tᵀ                           hook_state[t], after token t is read and written
    o_t  = scale · S_tᵀ q_t
    α    = M (I + L)⁻¹ diag(write)                hook_pattern: o = α v exactly, erasure included (`pattern_parts` takes it apart)

It takes the place of `LinearCore`: same hook points, same arguments, same rules for edits and padding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.delta_rule import PatternFactors, delta_rule_and_pseudo_values, effective_pattern
from models.context import Context
from models.recurrent.linear_core import watched, without_padding
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel
from workbench.instrument.patterns import PatternMeta


class DeltaCore(nn.Module):
    """Parameter-free. Tensors are [batch, head, pos, width]; `mode` is `"chunked"`, `"parallel"` (one chunk) or `"recurrent"`."""

    transparent_in_names = True

    def __init__(self, scale: float = 1.0, chunk_size: int | None = None) -> None:
        super().__init__()
        self.scale, self.strict, self.chunk_size = scale, False, chunk_size
        self.mode = "chunked"
        meta = PatternMeta(signed=True, rows_sum_to="free", effective=True)
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_state = HookPoint("state", "batch head state_k state_v", per_position=True)
        self.hook_pseudo_value = HookPoint("pseudo_value", "batch head pos state_v", editable=False, on_demand=True)
        self.hook_surprise = HookPoint("surprise", "batch head pos", editable=False, on_demand=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        state: Tensor | None,
        write: Tensor,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix values and update the state. Padding neither writes, erases nor lets time pass.

        Args:
            q, k: [batch, head, pos, state_k], keys of length 1 (or write · |k|² ≤ 2). v: [batch, head, pos, state_v].
            write: [batch, head, pos]. log_decay: None, [head], [batch, head, pos] or [batch, head, pos, state_k].
            state: from an earlier call, [batch, head, state_k, state_v].

        Returns:
            output [batch, head, pos, state_v] and the state after the last token.
        """
        length = q.shape[2]
        masked, log_decay = without_padding(context, q, write, log_decay)
        assert masked is not None
        options: dict[str, Any] = {"log_decay": log_decay, "scale": self.scale}
        stops = self.hook_state.stops(context.offset, length) if self.hook_state.active else []
        output, pseudo, final = delta_rule_and_pseudo_values(
            q,
            k,
            v,
            masked,
            **options,
            initial_state=state,
            chunk_size=max(1, length) if self.mode == "parallel" else self.chunk_size,
            mode="recurrent" if self.mode == "recurrent" else "chunked",
            stops=stops or None,
            on_state=(lambda t, s: self.hook_state.at(context.offset + t, s)) if stops else None,
        )
        self.hook_pseudo_value(pseudo)
        if self.hook_surprise.active:
            size = torch.linalg.vector_norm(v.to(pseudo.dtype), dim=-1).clamp(min=torch.finfo(pseudo.dtype).tiny)
            self.hook_surprise(torch.linalg.vector_norm(pseudo, dim=-1) / size)
        return watched(self.hook_pattern, context, output, v, lambda: effective_pattern(q, k, masked, **options)), final

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals of the rule, for the mixer's `signal_points`."""
        return {"surprise": (self.hook_surprise, "size of what is written over the size of the value", None)}


def pattern_parts(model: HookedModel, tokens: Any, layer: int, **kwargs: Any) -> PatternFactors:
    """The pattern of a delta-rule layer taken apart: α = (match @ erase · write) · decay, each a map to look at.

    Args:
        tokens: [batch, pos], or text. Further arguments as for `run_with_cache` (`hooks`, ...).

    Returns:
        `PatternFactors`: match [batch, head, query, key], what the query finds; erase [batch, head, key, key], how later writes rewrite
        earlier ones; decay [batch, head, query, key], None without or with a decay per key channel (then inside the others);
        write [batch, head, key].

    Raises:
        ValueError: the layer is no delta rule.
    """
    record = model.mixers[range(model.n_layers)[layer]].describe()
    if record["form"] != "delta":
        raise ValueError(
            f"Layer {layer} is {record['kind']!r} ({record['form']}), no delta rule. Expected a DeltaNet, Gated DeltaNet or KDA layer."
        )
    factors = model.state_factors(tokens, layer, **kwargs)
    _, parts = effective_pattern(
        factors["query"],
        factors["key"],
        factors["write"],
        log_decay=factors.get("log_decay"),
        scale=record["scale"],
        factors=True,
    )
    return parts
