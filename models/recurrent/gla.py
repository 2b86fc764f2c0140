"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): every token chooses how fast each row of the memory fades.

    q, k, v = W_Q x, W_K x, W_V x
    log a_t = log σ( W_2 W_1 x_t + b ) / τ            one number per key channel (low-rank), or per head (`decay="scalar"`)
    S_t     = diag(a_t) S_{t−1} + k_t v_tᵀ,  o_t = q_tᵀ S_t / √d_k
    out     = W_O( RMSNorm_head(o) ⊙ SiLU(W_G x) )

The scalar form is the simplification that Mamba-2's and RetNet's kernels allow; τ = 16 lets memories begin slow (a ≈ 0.96).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.recurrent.linear_core import LinearCore, linear_record
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

DECAYS = ("vector", "scalar")


@dataclass(frozen=True)
class GLAConfig:
    """Args:
    n_heads: heads. key_factor, value_factor: width of all keys and of all values over d_model.
    decay: `"vector"`, one per key channel, or `"scalar"`, one per head. decay_rank: width of the vector gate's bottleneck.
    decay_temperature: τ. gate: the SiLU output gate.
    """

    n_heads: int
    key_factor: float = 0.5
    value_factor: float = 1.0
    decay: str = "vector"
    decay_rank: int = 16
    decay_temperature: float = 16.0
    gate: bool = True
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    kind: str = "gla"


@register_mixer(GLAConfig)
class GLA(nn.Module):
    """Gated linear attention of one layer. [batch, pos, d_model] -> same."""

    slots = ("state",)

    def __init__(self, config: GLAConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        self.config, self.n_heads = config, config.n_heads
        keys, values = int(d_model * config.key_factor), int(d_model * config.value_factor)
        for name, width in (("keys", keys), ("values", values)):
            if width < 1 or width % config.n_heads:
                raise ValueError(f"The width of the {name} ({width}) must be a multiple of n_heads ({config.n_heads}).")
        if config.decay not in DECAYS:
            raise ValueError(
                f"Unknown decay {config.decay!r}.{suggestion(config.decay, DECAYS)} Expected one of {DECAYS}."
            )
        self.d_key, self.d_head = keys // config.n_heads, values // config.n_heads
        vector = config.decay == "vector"
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, keys, bias=False)
        self.value = nn.Linear(d_model, values, bias=False)
        self.decay_in = nn.Linear(d_model, config.decay_rank, bias=False) if vector else None
        self.decay = nn.Linear(config.decay_rank if vector else d_model, keys if vector else config.n_heads)
        self.gate = nn.Linear(d_model, values, bias=False) if config.gate else None
        self.output = nn.Linear(values, d_model, bias=False)
        self.core = LinearCore(scale=self.d_key**-0.5, chunk_size=config.chunk_size)
        self.norm = Norm("rms", self.d_head, config.norm_eps, axes="batch pos head d_head")
        self.hook_q = HookPoint("query", "batch pos head d_key")
        self.hook_k = HookPoint("key", "batch pos head d_key")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_log_decay = HookPoint("decay", "batch pos head d_key" if vector else "batch pos head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        if config.gate:
            self.hook_gate = HookPoint("gate", "batch pos head d_head")

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]; carries `state` [batch, head, state_k, state_v]."""
        q = self.hook_q(self.query(x).unflatten(-1, (self.n_heads, self.d_key)))
        k = self.hook_k(self.key(x).unflatten(-1, (self.n_heads, self.d_key)))
        v = self.hook_v(self.value(x).unflatten(-1, (self.n_heads, self.d_head)))
        logits = self.decay(x if self.decay_in is None else self.decay_in(x))
        if self.config.decay == "vector":
            logits = logits.unflatten(-1, (self.n_heads, self.d_key))
        # 16-bit models compute decays in float32: near 1 they have no digits to lose
        precise = logits if logits.dtype == torch.float64 else logits.float()
        log_decay = self.hook_log_decay(F.logsigmoid(precise) / self.config.decay_temperature)
        state = None if carried is None else carried["state"]
        moved = (t.transpose(1, 2) for t in (q, k, v))
        o, state = self.core(*moved, context, state, log_decay=log_decay.transpose(1, 2))
        z = self.norm(self.hook_z(o.transpose(1, 2)))
        if self.gate is not None:
            z = z * self.hook_gate(F.silu(self.gate(x)).unflatten(-1, (self.n_heads, self.d_head)))
        return self.output(z.flatten(-2)), {"state": state} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {"query": self.hook_q, "key": self.hook_k, "value": self.hook_v, "log_decay": self.hook_log_decay}

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads = self.n_heads
        return linear_record("gla", self.core, heads, heads, heads, (heads, self.d_key, self.d_head))
