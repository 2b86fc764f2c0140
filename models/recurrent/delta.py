"""DeltaNet, Gated DeltaNet and Kimi Delta Attention: a memory that takes back what a key recalls before it writes.

    q, k, v = SiLU(conv(W x));   q, k <- q/|q|, k/|k| per head;   β = σ(W_β x)          (· 2 if `negative_eigenvalues`)
    S <- A_t S_{t−1};   S_t = S + β_t k_t (v_t − Sᵀ k_t)ᵀ;   o_t = S_tᵀ q_t / √d_k
    out = W_O( RMSNorm_head(o) ⊙ gate(x) )

    decay = "none"    A = 1                                               DeltaNet, Yang et al. 2024, arXiv 2406.06484
    decay = "scalar"  log A = −exp(a) softplus(W_A x + b), per head       Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464; Qwen3-Next
    decay = "vector"  the same per key channel, W_A of low rank           KDA, Kimi Linear 2025, arXiv 2510.26692

The convolution smears tokens before they are written, so the pattern's columns are positions after the convolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.parts.short_convolution import causal_convolution
from models.recurrent.delta_core import DeltaCore
from models.recurrent.linear_core import grouped, initial_steps, linear_record
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

DECAYS = ("none", "scalar", "vector")
GATES = ("none", "silu", "sigmoid")


@dataclass(frozen=True)
class DeltaConfig:
    """Args:
    n_heads: heads of values and writes. d_key, d_value: widths of a head. n_key_heads: heads of queries and keys (None: as many), shared
    by groups of value heads. decay: `"none"`, `"scalar"` or `"vector"`. gate: of the output, `"none"`, `"silu"` or `"sigmoid"`.
    low_rank: width of the bottleneck of the vector decay and of its gate (None: full gate; a vector decay needs it).
    d_conv: taps of the causal convolution. negative_eigenvalues: β in (0, 2), so that a write can flip what is recalled.
    dt_min, dt_max, a_max: initial step sizes are log-uniform in [dt_min, dt_max], exp(a) uniform in [0, a_max].
    """

    n_heads: int
    d_key: int
    d_value: int
    n_key_heads: int | None = None
    decay: str = "none"
    gate: str = "none"
    low_rank: int | None = None
    d_conv: int = 4
    negative_eigenvalues: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    a_max: float = 16.0
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    kind: str = "delta"


@register_mixer(DeltaConfig)
class Delta(nn.Module):
    """The delta rule of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "conv")

    def __init__(self, config: DeltaConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        for name, known in (("decay", DECAYS), ("gate", GATES)):
            given = getattr(config, name)
            if given not in known:
                raise ValueError(f"Unknown {name} {given!r}.{suggestion(given, known)} Expected one of {known}.")
        if config.decay == "vector" and config.low_rank is None:
            raise ValueError("A vector decay needs low_rank, the width of its bottleneck.")
        self.config, self.n_heads = config, config.n_heads
        self.n_key_heads = config.n_key_heads or config.n_heads
        if config.n_heads % self.n_key_heads:
            raise ValueError(f"{config.n_heads} heads cannot share {self.n_key_heads} key heads evenly.")
        keys, values = self.n_key_heads * config.d_key, config.n_heads * config.d_value
        self.widths = [keys, keys, values]
        self.input = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.widths), config.d_conv))
        self.conv._own_init = True  # type: ignore[attr-defined]
        self.write = nn.Linear(d_model, config.n_heads, bias=False)
        self.decay: nn.Module | None = None
        if config.decay != "none":
            wide = config.n_heads * (config.d_key if config.decay == "vector" else 1)
            self.decay = _projection(d_model, config.low_rank if config.decay == "vector" else None, wide)
            self.dt_bias = nn.Parameter(torch.zeros(wide))
            self.A_log = nn.Parameter(torch.zeros(config.n_heads))
            for parameter in (self.dt_bias, self.A_log):
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.gate = None if config.gate == "none" else _projection(d_model, config.low_rank, values)
        self.output = nn.Linear(values, d_model, bias=False)
        self.core = DeltaCore(scale=config.d_key**-0.5, chunk_size=config.chunk_size)
        self.norm = Norm("rms", config.d_value, config.norm_eps, axes="batch pos head d_head")
        head = "head" if self.n_key_heads == config.n_heads else "kv_head"
        self.hook_conv = HookPoint("conv", "batch pos channel")
        self.hook_q = HookPoint("query", f"batch pos {head} d_key")
        self.hook_k = HookPoint("key", f"batch pos {head} d_key")
        self.hook_unit_q = HookPoint("unit_query", f"batch pos {head} d_key")
        self.hook_unit_k = HookPoint("unit_key", f"batch pos {head} d_key")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_write = HookPoint("write", "batch pos head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        if config.decay != "none":
            axes = "batch pos head d_key" if config.decay == "vector" else "batch pos head"
            self.hook_log_decay = HookPoint("decay", axes)
        if self.gate is not None:
            self.hook_gate = HookPoint("gate", "batch pos head d_head")

    def initialise_own(self) -> None:
        """Published initial values of convolution and decay."""
        config = self.config
        with torch.no_grad():
            bound = config.d_conv**-0.5
            self.conv.uniform_(-bound, bound)
            if config.decay != "none":
                self.dt_bias.copy_(initial_steps(len(self.dt_bias), config.dt_min, config.dt_max))
                self.A_log.copy_(torch.log(config.a_max * torch.rand(config.n_heads).clamp(min=1e-3)))

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries the core's `state` and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        config = self.config
        before = None if carried is None else carried["conv"]
        mixed, window = causal_convolution(self.input(x), self.conv, None, context, before)
        q, k, v = self.hook_conv(F.silu(mixed)).split(self.widths, dim=-1)
        q = self.hook_unit_q(unit(self.hook_q(q.unflatten(-1, (self.n_key_heads, config.d_key)))))
        k = self.hook_unit_k(unit(self.hook_k(k.unflatten(-1, (self.n_key_heads, config.d_key)))))
        v = self.hook_v(v.unflatten(-1, (self.n_heads, config.d_value)))
        strongest = 2.0 if config.negative_eigenvalues else 1.0
        write = self.hook_write(strongest * torch.sigmoid(self.write(x)))
        log_decay = self._log_decay(x)
        o, state = self.core(
            grouped(q.transpose(1, 2), self.n_heads),
            grouped(k.transpose(1, 2), self.n_heads),
            v.transpose(1, 2),
            context,
            None if carried is None else carried["state"],
            write=write.transpose(1, 2),
            log_decay=None if log_decay is None else log_decay.transpose(1, 2),
            **self.core_arguments(x),
        )
        z = self.norm(self.hook_z(o.transpose(1, 2)))
        if self.gate is not None:
            opened = F.silu(self.gate(x)) if config.gate == "silu" else torch.sigmoid(self.gate(x))
            z = z * self.hook_gate(opened.unflatten(-1, (self.n_heads, config.d_value)))
        return self.output(z.flatten(-2)), {"state": state, "conv": window} if context.keep_state else {}

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """[batch, pos, head] or [batch, pos, head, d_key], in float32 at least."""
        if self.decay is None:
            return None
        logits = self.decay(x)
        precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
        steps = F.softplus(logits.to(precise) + self.dt_bias.to(precise))
        rate = self.A_log.to(precise).exp()
        if self.config.decay == "vector":
            steps, rate = steps.unflatten(-1, (self.n_heads, self.config.d_key)), rate[:, None]
        return self.hook_log_decay(-rate * steps)

    def core_arguments(self, x: Tensor) -> dict[str, Tensor]:
        """What the core is given besides, from the layer's input [batch, pos, d_model]; nothing here."""
        return {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        points = {"query": self.hook_unit_q, "key": self.hook_unit_k, "value": self.hook_v, "write": self.hook_write}
        return points if self.decay is None else {**points, "log_decay": self.hook_log_decay}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals besides the factors: {name: (point, label, unit)}."""
        return self.core.signals

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        config, heads = self.config, self.n_heads
        shape = (heads, config.d_key, config.d_value)
        return linear_record("delta", self.core, heads, self.n_key_heads, heads, shape, form="delta")


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(Σ x² + eps) over the last axis: length 1, in float32 at least."""
    precise = x if x.dtype == torch.float64 else x.float()
    return (precise * torch.rsqrt(precise.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _projection(d_model: int, rank: int | None, width: int) -> nn.Module:
    """A linear map without biases, through a bottleneck if there is one."""
    if rank is None:
        return nn.Linear(d_model, width, bias=False)
    return nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width, bias=False))
