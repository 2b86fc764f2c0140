"""Retention (Sun et al. 2023, "Retentive Network"): linear attention whose memory fades at one fixed rate per head.

    q, k = rotate(W_Q x), rotate(W_K x)/√d_k       θ_m = 10000^(−m/(d_k/2 − 1)), pairs (2m, 2m+1)
    S_t  = γ S_{t−1} + k_t v_tᵀ,  o_t = q_tᵀ S_t    γ_h = 1 − 2^(−5−h)
    out  = W_O( SiLU(W_G x) ⊙ RMSNorm_head(o) )

The published code also divides the pattern by row-dependent factors that the per-head norm removes again (exactly so only at eps = 0); they
are left out here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.parts.positions import rotate
from models.parts.precision import KeepsPrecision
from models.recurrent.linear_core import LinearCore, linear_record
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class RetentionConfig:
    """Args: n_heads: heads, each with its own γ. value_factor: width of values relative to d_model. gate: the SiLU output gate."""

    n_heads: int
    value_factor: float = 2.0
    gate: bool = True
    norm_eps: float = 1e-6
    chunk_size: int | None = None
    kind: str = "retention"


@register_mixer(RetentionConfig)
class Retention(KeepsPrecision):
    """Multi-scale retention of one layer. [batch, pos, d_model] -> same."""

    slots = ("state",)  # what it carries from call to call

    def __init__(self, config: RetentionConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        self.config, self.n_heads = config, config.n_heads
        d_value = int(d_model * config.value_factor)
        if d_model % (2 * config.n_heads):
            raise ValueError(
                f"Retention rotates pairs within heads: d_model ({d_model}) must be a multiple of 2·n_heads ({2 * config.n_heads})."
            )
        if d_value % config.n_heads:
            raise ValueError(
                f"The width of the values ({d_value}) must be a multiple of n_heads ({config.n_heads}); "
                f"it is value_factor ({config.value_factor}) times d_model ({d_model})."
            )
        self.d_key, self.d_head = d_model // config.n_heads, d_value // config.n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_value, bias=False)
        self.gate = nn.Linear(d_model, d_value, bias=False) if config.gate else None
        self.output = nn.Linear(d_value, d_model, bias=False)
        self.register_buffer(
            "log_decay",
            torch.log1p(-(2.0 ** (-5 - torch.arange(config.n_heads, dtype=torch.float64)))),
            persistent=False,
        )
        self.register_buffer(
            "theta", 10000.0 ** -torch.linspace(0, 1, self.d_key // 2, dtype=torch.float64), persistent=False
        )
        self.core = LinearCore(chunk_size=config.chunk_size)
        self.norm = Norm("rms", self.d_head, config.norm_eps, affine=False, axes="batch pos head d_head")
        self.hook_q = HookPoint("query", "batch pos head d_key")
        self.hook_k = HookPoint("key", "batch pos head d_key")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_rot_q = HookPoint("rotated_query", "batch pos head d_key")
        self.hook_rot_k = HookPoint("rotated_key", "batch pos head d_key")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        if config.gate:
            self.hook_gate = HookPoint("gate", "batch pos head d_head")

    exact_buffers = ("log_decay", "theta")
    log_decay: Tensor
    theta: Tensor

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]; `carried["state"]` [batch, head, state_k, state_v]."""
        q = self.hook_q(self.query(x).unflatten(-1, (self.n_heads, self.d_key)))
        k = self.hook_k(self.key(x).unflatten(-1, (self.n_heads, self.d_key)) * self.d_key**-0.5)
        v = self.hook_v(self.value(x).unflatten(-1, (self.n_heads, self.d_head)))
        angle = context.positions[:, :, None, None] * self.theta
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q = self.hook_rot_q(rotate(q, cosine, sine, interleaved=True))
        k = self.hook_rot_k(rotate(k, cosine, sine, interleaved=True))
        state = None if carried is None else carried["state"]
        decay = self.constant_factors()["log_decay"]
        o, state = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context, state, log_decay=decay)
        z = self.norm(self.hook_z(o.transpose(1, 2)))
        if self.gate is not None:
            z = z * self.hook_gate(F.silu(self.gate(x)).unflatten(-1, (self.n_heads, self.d_head)))
        return self.output(z.flatten(-2)), {"state": state} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {"query": self.hook_rot_q, "key": self.hook_rot_k, "value": self.hook_v}

    def constant_factors(self) -> dict[str, Tensor]:
        """log γ as `log_decay` [head], in float32 at least."""
        precise = torch.float64 if self.query.weight.dtype == torch.float64 else torch.float32
        return {"log_decay": self.log_decay.to(precise)}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return linear_record(
            "retention", self.core, self.n_heads, self.n_heads, self.n_heads, (self.n_heads, self.d_key, self.d_head)
        )
