"""Mamba-2 / state-space duality (Dao & Gu 2024): gated linear attention with q = C, k = B, v = x and a decay chosen by each token.

    z, x, B, C, Δ = W_in u;   x, B, C = SiLU(conv(x, B, C));   Δ = softplus(Δ + b_Δ)
    S_t = exp(Δ_t A) S_{t−1} + Δ_t B_t x_tᵀ,   y_t = C_tᵀ S_t + D x_t      (A < 0: one number per head)
    out = W_out RMSNorm( y ⊙ SiLU(z) )                                     (norm over each group of channels)

Heads have width `d_head`; B and C are shared by the heads of a group. A short causal convolution smears tokens before they are written, so
the pattern's columns are positions after the convolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.short_convolution import causal_convolution
from models.recurrent.linear_core import LinearCore, grouped, initial_steps, linear_record
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class Mamba2Config:
    """Args:
    d_state: width of B and C. d_head: channels per head. expand: inner width over d_model. n_groups: sets of B and C.
    d_conv: taps of the causal convolution. dt_min, dt_max: range of the initial step sizes. a_max: initial |A| is drawn from U(1, a_max).
    """

    d_state: int = 64
    d_head: int = 64
    expand: int = 2
    n_groups: int = 1
    d_conv: int = 4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    a_max: float = 16.0
    norm_eps: float = 1e-5
    conv_bias: bool = True
    chunk_size: int | None = None
    kind: str = "mamba2"


@register_mixer(Mamba2Config)
class Mamba2(nn.Module):
    """The Mamba-2 mixer of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "conv")  # what it carries from call to call

    def __init__(self, config: Mamba2Config, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.d_conv < 1:
            raise ValueError(f"d_conv is {config.d_conv}; expected at least 1 tap (1: the token itself).")
        self.config = config
        self.d_inner = config.expand * d_model
        if self.d_inner % config.d_head:
            raise ValueError(
                f"The inner width {self.d_inner} (expand·d_model) must be a multiple of d_head ({config.d_head})."
            )
        self.n_heads = self.d_inner // config.d_head
        if self.n_heads % config.n_groups:
            raise ValueError(f"{self.n_heads} heads cannot share {config.n_groups} groups evenly.")
        self.widths = [self.d_inner, config.n_groups * config.d_state, config.n_groups * config.d_state]
        self.input = nn.Linear(d_model, self.d_inner + sum(self.widths) + self.n_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.widths), config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(sum(self.widths))) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.output = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.A_log, self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.conv._own_init = True  # type: ignore[attr-defined]
        self.core = LinearCore(chunk_size=config.chunk_size)
        group = "head" if config.n_groups == self.n_heads else "group"
        self.hook_conv = HookPoint("conv", "batch pos channel")
        self.hook_q = HookPoint("query", f"batch pos {group} d_state")
        self.hook_k = HookPoint("key", f"batch pos {group} d_state")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_write = HookPoint("write", "batch pos head")
        self.hook_log_decay = HookPoint("decay", "batch pos head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_skip = HookPoint("skip", "batch pos head d_head")
        self.hook_gate = HookPoint("gate", "batch pos channel")
        self.hook_scale = HookPoint("norm_scale", "batch pos group one")

    def initialise_own(self) -> None:
        """Published initial values: step sizes log-uniform in [dt_min, dt_max], |A| uniform in [1, a_max], D = 1, uniform convolution."""
        config = self.config
        with torch.no_grad():
            bound = config.d_conv**-0.5
            self.conv.uniform_(-bound, bound)
            self.dt_bias.copy_(initial_steps(self.n_heads, config.dt_min, config.dt_max))
            self.A_log.copy_(torch.log(1 + (config.a_max - 1) * torch.rand(self.n_heads)))

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries the core's `state` and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        config, length = self.config, u.shape[1]
        z, xbc, dt = self.input(u).split([self.d_inner, sum(self.widths), self.n_heads], dim=-1)
        before = None if carried is None else carried["conv"]
        xbc, window = causal_convolution(xbc, self.conv, self.conv_bias, context, before)
        x, b, c = self.hook_conv(F.silu(xbc)).split(self.widths, dim=-1)
        q = self.hook_q(c.unflatten(-1, (config.n_groups, config.d_state)))
        k = self.hook_k(b.unflatten(-1, (config.n_groups, config.d_state)))
        v = self.hook_v(x.unflatten(-1, (self.n_heads, config.d_head)))
        # as in the published code, 16-bit models compute step sizes, decays and the norm in float32
        precise = torch.float64 if u.dtype == torch.float64 else torch.float32
        write = self.hook_write(F.softplus(dt.to(precise) + self.dt_bias.to(precise)))
        log_decay = self.hook_log_decay(-write * self.A_log.to(precise).exp())
        y, state = self.core(
            grouped(q.transpose(1, 2), self.n_heads),
            grouped(k.transpose(1, 2), self.n_heads),
            v.transpose(1, 2),
            context,
            None if carried is None else carried["state"],
            log_decay=log_decay.transpose(1, 2),
            write=write.transpose(1, 2),
            **self.core_arguments(u),
        )
        y = self.hook_z(y.transpose(1, 2)) + self.hook_skip(self.D[:, None] * v)
        gated = (y.flatten(-2).to(precise) * self.hook_gate(F.silu(z))).unflatten(-1, (config.n_groups, -1))
        scale = self.hook_scale((gated.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt())
        out = self.output(((gated / scale).flatten(-2) * self.norm_weight).to(u.dtype))
        return out, {"state": state, "conv": window} if context.keep_state and length else {}

    def core_arguments(self, u: Tensor) -> dict[str, Tensor]:
        """What the core is given besides, from the layer's input [batch, pos, d_model]; nothing here."""
        return {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {
            "query": self.hook_q,
            "key": self.hook_k,
            "value": self.hook_v,
            "log_decay": self.hook_log_decay,
            "write": self.hook_write,
        }

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        config = self.config
        shape = (self.n_heads, config.d_state, config.d_head)
        return linear_record("mamba2", self.core, self.n_heads, config.n_groups, self.n_heads, shape)
