"""GateLoop (Katsch 2023, arXiv 2311.01927): linear recurrence whose decay is complex, so every token also turns the memory.

    q, k, v = W_Q x, W_K x, W_V x                      real
    a_t     = r_t e^{iθ_t},  r = σ(W_r x), θ = W_θ x   magnitude and phase, chosen by each token
    S_t     = a_t S_{t−1} + k_t v_tᵀ                   complex
    o_t     = Re(q_tᵀ S_t),   out = W_O( o ⊙ SiLU(W_G x) )

Turning the memory is turning keys and queries: with Θ = cumsum(θ) and H_t = e^{−iΘ_t} S_t, the same recurrence in a frame that turns
along, H_t = r_t H_{t−1} + (e^{−iΘ_t} k_t) v_tᵀ is real gated linear attention on twice the rows,

    k'_t = k_t (cos Θ_t, −sin Θ_t),   q'_t = q_t (cos Θ_t, −sin Θ_t),   α_ij = Σ_d q_id k_jd cos(Θ_id − Θ_jd) Π_{j<s≤i} r_sd

rotary position embedding with angles that the data choose. `hook_state` is (Re H, Im H); the angle Θ is carried beside it.
The paper uses heads of width 1 ("maximally headed"). The authors' repository holds another model (real, tied gates), so this follows the
paper; its norms are not described there, and the block around it is the usual pre-norm one.
"""

from dataclasses import dataclass
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.recurrent.linear_core import LinearCore, linear_record
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class GateLoopConfig:
    """Args: n_heads: heads. d_head: width of a head's queries, keys and values (None: d_model / n_heads). gate: the SiLU output gate."""

    n_heads: int
    d_head: int | None = None
    gate: bool = True
    chunk_size: int | None = None
    kind: str = "gateloop"


@register_mixer(GateLoopConfig)
class GateLoop(nn.Module):
    """GateLoop of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "angle")

    def __init__(self, config: GateLoopConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.d_head is None and d_model % config.n_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of n_heads ({config.n_heads}), or d_head given.")
        self.config, self.n_heads = config, config.n_heads
        self.d_head = config.d_head or d_model // config.n_heads
        width = self.n_heads * self.d_head
        self.query = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width, bias=False)
        self.magnitude = nn.Linear(d_model, width)
        self.phase = nn.Linear(d_model, width)
        self.gate = nn.Linear(d_model, width, bias=False) if config.gate else None
        self.output = nn.Linear(width, d_model, bias=False)
        self.core = LinearCore(chunk_size=config.chunk_size)
        self.hook_q = HookPoint("query", "batch pos head d_key")
        self.hook_k = HookPoint("key", "batch pos head d_key")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_log_magnitude = HookPoint("log_magnitude", "batch pos head d_key")
        self.hook_phase = HookPoint("phase", "batch pos head d_key")
        self.hook_log_decay = HookPoint("decay", "batch pos head state_k")
        self.hook_rot_q = HookPoint("rotated_query", "batch pos head state_k")
        self.hook_rot_k = HookPoint("rotated_key", "batch pos head state_k")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        if config.gate:
            self.hook_gate = HookPoint("gate", "batch pos head d_head")

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]; carries `state` [batch, head, 2 d_key, state_v] and `angle`, Θ so far [batch, head, d_key]."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.n_heads, self.d_head))

        q, k, v = self.hook_q(heads(self.query(x))), self.hook_k(heads(self.key(x))), self.hook_v(heads(self.value(x)))
        logits = heads(self.magnitude(x))
        precise = logits if logits.dtype == torch.float64 else logits.float()
        log_magnitude = self.hook_log_magnitude(F.logsigmoid(precise))
        phase = self.hook_phase(heads(self.phase(x)).to(precise.dtype)).double()  # sums of many turns need the digits
        if context.mask is not None:
            phase = phase * context.mask[..., None, None]
        before = 0 if carried is None else carried["angle"][:, None]
        angle = before + phase.cumsum(1)
        turn = torch.cat([angle.cos(), -angle.sin()], dim=-1).to(x.dtype)
        q, k = self.hook_rot_q(torch.cat([q, q], -1) * turn), self.hook_rot_k(torch.cat([k, k], -1) * turn)
        log_decay = self.hook_log_decay(torch.cat([log_magnitude, log_magnitude], dim=-1))
        state = None if carried is None else carried["state"]
        moved = (t.transpose(1, 2) for t in (q, k, v))
        o, state = self.core(*moved, context, state, log_decay=log_decay.transpose(1, 2))
        z = self.hook_z(o.transpose(1, 2))
        if self.gate is not None:
            z = z * self.hook_gate(heads(F.silu(self.gate(x))))
        out = self.output(z.flatten(-2))
        return out, {"state": state, "angle": angle[:, -1].remainder(2 * pi)} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {
            "query": self.hook_rot_q,
            "key": self.hook_rot_k,
            "value": self.hook_v,
            "log_decay": self.hook_log_decay,
        }

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals besides the factors: {name: (point, label, unit)}."""
        return {"phase": (self.hook_phase, "mean turn", "radians")}

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads = self.n_heads
        return linear_record("gateloop", self.core, heads, heads, heads, (heads, 2 * self.d_head, self.d_head))
