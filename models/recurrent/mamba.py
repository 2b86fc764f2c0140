"""Mamba (Gu & Dao 2023, arXiv 2312.00752): a selective state space, where every channel keeps a small memory with its own clock.

    x, z = W_in u;   x = SiLU(conv(x));   δ, B, C = W_x x;   Δ = softplus(W_Δ δ + b)
    h_t[c] = exp(Δ_t[c] A[c]) ⊙ h_{t−1}[c] + Δ_t[c] x_t[c] B_t          A < 0: one number per channel and state; hook_state[t]
    y_t[c] = C_t · h_t[c]  (+ D[c] x_t[c])                              hook_z, without the skip
    out = W_out( y ⊙ SiLU(z) )

Falcon Mamba divides δ, B and C by their root mean square first (`norm_factors`).

Every channel has a pattern of its own: y[c] = α_c x[c] with α_c,ij = C_iᵀ exp(A_c Σ_{j<s≤i} Δ_sc) B_j Δ_jc (the hidden attention of Ali,
Zimerman & Wolf 2024, arXiv 2403.01590). `hook_pattern` is their mean over each of `n_heads` groups of neighbouring channels, which is
what a page can draw; it reproduces no channel and only reports. `hook_channel_pattern` is exact and can be edited, and exists when asked
for; `channel_patterns` gives it for some channels. Columns are positions after the convolution, which smears tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal_scan import selective_pattern, selective_scan
from models.context import Context
from models.mixers import register_mixer
from models.parts.short_convolution import causal_convolution
from models.recurrent.linear_core import initial_steps, refuse_continued
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class MambaConfig:
    """Args:
    d_state: numbers that each channel remembers. expand: channels over d_model. dt_rank: width of δ (None: d_model / 16, rounded up).
    n_heads: groups of channels whose mean pattern is shown. norm_factors: divide δ, B and C by their root mean square.
    d_conv: taps of the causal convolution. dt_min, dt_max: range of the initial step sizes. bias: of the projections in and out.
    """

    d_state: int = 16
    expand: int = 2
    dt_rank: int | None = None
    n_heads: int = 4
    d_conv: int = 4
    norm_factors: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    norm_eps: float = 1e-6
    bias: bool = False
    conv_bias: bool = True
    chunk_size: int | None = None
    kind: str = "mamba"


class SelectiveCore(nn.Module):
    """The hooked selective scan. Parameter-free; `mode` is `"chunked"`, `"parallel"` (one chunk) or `"recurrent"`."""

    transparent_in_names = True

    def __init__(self, n_heads: int, chunk_size: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.chunk_size = n_heads, chunk_size
        self.mode = "chunked"
        meta = PatternMeta(signed=True, rows_sum_to="free", exact=False, effective=True, kind="mean")
        whole = PatternMeta(signed=True, rows_sum_to="free", effective=True)
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta, editable=False, on_demand=True)
        self.hook_channel_pattern = HookPoint("channel_pattern", "batch channel query key", meta=whole, on_demand=True)
        self.hook_state = HookPoint("state", "batch channel state_n", per_position=True)

    def forward(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, context: Context, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan and read. Padding neither writes nor lets time pass.

        Args:
            x, dt: [batch, pos, channel]. a: [channel, state_n]. b, c: [batch, pos, state_n]. state: [batch, channel, state_n].

        Returns:
            y [batch, pos, channel] without the skip, and the state after the last token.
        """
        if context.mask is not None:
            dt = dt * context.mask[..., None].to(dt.dtype)
        length = x.shape[1]
        stops = self.hook_state.stops(context.offset, length) if self.hook_state.active else []
        y, final = selective_scan(
            x,
            dt,
            a,
            b,
            c,
            initial_state=state,
            chunk_size=max(1, length) if self.mode == "parallel" else self.chunk_size,
            mode="recurrent" if self.mode == "recurrent" else "chunked",
            stops=stops or None,
            on_state=(lambda t, s: self.hook_state.at(context.offset + t, s)) if stops else None,
        )
        if self.hook_channel_pattern.active:
            refuse_continued(self.hook_channel_pattern, context)
            true = selective_pattern(dt, a, b, c)
            edited = self.hook_channel_pattern(true)
            if edited is not true:
                y = y + torch.einsum("bcqk,bkc->bqc", edited - true, x.to(true.dtype)).to(y.dtype)
        if self.hook_pattern.active:
            refuse_continued(self.hook_pattern, context)
            width = x.shape[2] // self.n_heads
            weights = a.new_full((width,), 1 / width)
            groups = [list(range(g * width, (g + 1) * width)) for g in range(self.n_heads)]
            means = [selective_pattern(dt, a, b, c, channels=group, weights=weights) for group in groups]
            self.hook_pattern(torch.stack(means, dim=1))
        return y, final


@register_mixer(MambaConfig)
class Mamba(nn.Module):
    """The Mamba mixer of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "conv")

    def __init__(self, config: MambaConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        self.config, self.n_heads = config, config.n_heads
        self.d_inner = config.expand * d_model
        if self.d_inner % config.n_heads:
            raise ValueError(
                f"The channels ({self.d_inner}) must be a multiple of n_heads ({config.n_heads}), the groups shown."
            )
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.widths = [self.dt_rank, config.d_state, config.d_state]
        self.input = nn.Linear(d_model, 2 * self.d_inner, bias=config.bias)
        self.conv = nn.Parameter(torch.empty(self.d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(self.d_inner)) if config.conv_bias else None
        self.select = nn.Linear(self.d_inner, sum(self.widths), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.d_inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, config.d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.output = nn.Linear(self.d_inner, d_model, bias=config.bias)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for parameter in (self.conv, self.dt_weight, self.A_log):
            parameter._own_init = True  # type: ignore[attr-defined]
        self.core = SelectiveCore(config.n_heads, config.chunk_size)
        self.hook_v = HookPoint("value", "batch pos channel")
        self.hook_k = HookPoint("key", "batch pos state_n")
        self.hook_q = HookPoint("query", "batch pos state_n")
        self.hook_dt = HookPoint("step", "batch pos channel")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_skip = HookPoint("skip", "batch pos channel")
        self.hook_gate = HookPoint("gate", "batch pos channel")

    def initialise_own(self) -> None:
        """Published initial values: A = −1 … −d_state in every channel, step sizes log-uniform, uniform convolution."""
        config = self.config
        with torch.no_grad():
            for parameter, fan in ((self.conv, config.d_conv), (self.dt_weight, self.dt_rank)):
                parameter.uniform_(-(fan**-0.5), fan**-0.5)
            self.dt_bias.copy_(initial_steps(self.d_inner, config.dt_min, config.dt_max))
            self.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.A_log))

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries `state` [batch, channel, state_n] and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        x, z = self.input(u).chunk(2, dim=-1)
        x, window = causal_convolution(
            x, self.conv, self.conv_bias, context, None if carried is None else carried["conv"]
        )
        x = self.hook_v(F.silu(x))
        factors = self.select(x).split(self.widths, dim=-1)
        if self.config.norm_factors:
            factors = tuple(torch.rms_norm(part, part.shape[-1:], eps=self.config.norm_eps) for part in factors)
        steps, b, c = factors
        b, c = self.hook_k(b), self.hook_q(c)
        # as in the published code, 16-bit models compute step sizes and decays in float32
        precise = torch.float64 if u.dtype == torch.float64 else torch.float32
        dt = self.hook_dt(F.softplus(F.linear(steps, self.dt_weight).to(precise) + self.dt_bias.to(precise)))
        a = -self.A_log.to(precise).exp()
        y, state = self.core(x, dt, a, b, c, context, None if carried is None else carried["state"])
        y = self.hook_z(y.unflatten(-1, (self.n_heads, -1))).flatten(-2) + self.hook_skip(self.D * x)
        return self.output(y * self.hook_gate(F.silu(z))), {
            "state": state,
            "conv": window,
        } if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """What is mixed. Queries, keys and step sizes determine the channels' patterns, but not in a form that runs know."""
        return {"value": self.hook_v}

    @property
    def memory_points(self) -> dict[str, HookPoint]:
        """What the state can be asked for: token t writes Δ_t x_t ⊗ B_t, every channel's x under the key B."""
        return {"key": self.hook_k, "value": self.hook_v}

    def recall(self, state: Tensor, keys: Tensor) -> Tensor:
        """What a state answers to keys, h B, by groups of channels.

        Args: state [batch, channel, state_n]. keys [batch, head, n, state_n]. Returns: [batch, head, n, channel of the group].
        """
        return keys @ state.unflatten(1, (self.n_heads, -1)).mT

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: {name: (point, label, unit)}."""
        return {
            "step": (self.hook_dt, "mean step size Δ", None),
            "gate_mean": (self.hook_gate, "mean output gate", None),
        }

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        pattern = self.core.hook_pattern.meta.as_dict()
        width = self.d_inner // self.n_heads
        return {
            "kind": "mamba",
            "form": "dense",
            "n_heads": self.n_heads,
            "n_key_heads": 1,
            "n_value_heads": 1,
            "scale": None,
            "strict": False,
            "alibi_slopes": None,
            "window": None,
            "pattern": {**pattern, "label": f"each head is the mean over {width} of {self.d_inner} channels"},
            "state": {"role": "state", "axes": ["channel", "state_n"], "shape": [self.d_inner, self.config.d_state]},
            "signals": [],
        }


def channel_patterns(
    model: HookedModel,
    tokens: Any,
    layer: int,
    channels: Sequence[int],
    queries: Sequence[int] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The exact patterns of some channels of a Mamba layer, [batch, channel, query, key]: hook_z of channel c is α_c x[c].

    Args:
        tokens: [batch, pos], or text. channels: which, of d_inner. queries: rows wanted, None for all. Further arguments as for
            `run_with_cache` (`hooks`, ...).

    Raises:
        ValueError: the layer is no Mamba layer, or a channel or query does not exist.
    """
    number = range(model.n_layers)[layer]
    mixer = model.mixers[number]
    if not isinstance(mixer, Mamba):
        raise ValueError(f"Layer {layer} is {mixer.describe()['kind']!r}, not 'mamba': it has no pattern per channel.")
    points = (mixer.hook_dt, mixer.hook_k, mixer.hook_q)
    _, cache = model.run_with_cache(tokens, names=[point.name for point in points], **kwargs)
    dt, b, c = (cache[point.name] for point in points)
    a = -mixer.A_log.detach().to(dt.dtype).exp()
    return selective_pattern(dt, a, b, c, channels=channels, queries=queries)
