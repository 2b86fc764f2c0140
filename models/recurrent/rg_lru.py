"""The RG-LRU of Griffin and Hawk (De et al. 2024, arXiv 2402.19427, section 2.4): every channel forgets at a rate that the token chooses.

    x = conv(W_x u + b_x)                                                                              hook_v
    r_t, i_t = σ(W_r x_t + b_r), σ(W_i x_t + b_i)      both in blocks, one per head                    hook_recurrence_gate, hook_input_gate
    log a_t = −8 r_t softplus(Λ)                                                                       hook_log_decay
    w_t = i_t √(1 − a_t²)                              i_t at the first token of a text (position 0)   hook_write
    h_t = a_t ⊙ h_{t−1} + w_t ⊙ x_t                                                                    hook_state[t], hook_z
    out = W_o( h ⊙ gelu(W_y u + b_y) ) + b_o                                                           hook_gate

Every channel has a pattern of its own, h[c] = α_c x[c] with α_c,ij = exp(Σ_{j<s≤i} log a_s[c]) w_j[c]. `hook_pattern` is their mean over
the channels of each head, which reproduces no channel and only reports; `hook_channel_pattern` is exact, can be edited, and exists when
asked for. Columns are positions after the convolution, which smears tokens. Editing `hook_log_decay` leaves the writes alone; editing
`hook_recurrence_gate` changes both. Λ has the sign, and the first token the weight, of the published code; texts packed one behind the
other into one row, which it keeps apart, are not kept apart here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal_scan import diagonal_scan
from kernels.gated_linear_attention import effective_pattern
from models.context import Context
from models.mixers import register_mixer
from models.parts.channel_mixers import activation_function
from models.parts.short_convolution import causal_convolution
from models.recurrent.cells import block_diagonal, cell_record
from models.recurrent.linear_core import refuse_continued, watched
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

SCANS = {"chunked": "auto", "parallel": "blocked", "recurrent": "recurrent"}
SHARPNESS = 8.0  # the paper's c: a token with r = 1 forgets 8 times what softplus(Λ) says
STEEPEST = 1000.0  # bound on the derivative of the square root, as in the published code


@dataclass(frozen=True)
class RGLRUConfig:
    """Args:
    n_heads: blocks of the gates' matrices. width: channels (None: d_model). d_conv: taps of the causal convolution.
    activation: of the output gate. a_min, a_max: exp(−softplus(Λ)) begins uniform, by its square, in this range.
    """

    n_heads: int = 4
    width: int | None = None
    d_conv: int = 4
    activation: str = "gelu_tanh"
    a_min: float = 0.9
    a_max: float = 0.999
    kind: str = "rg_lru"


class DiagonalCore(nn.Module):
    """The hooked diagonal recurrence. Parameter-free; tensors are [batch, pos, head, d_head]; `mode` is one of SCANS."""

    transparent_in_names = True

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.mode = "chunked"
        label = f"each head is the mean over its {d_head} channels"
        mean = PatternMeta(rows_sum_to="free", exact=False, effective=True, kind="mean", label=label)
        whole = PatternMeta(rows_sum_to="free", effective=True)
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=mean, editable=False, on_demand=True)
        self.hook_channel_pattern = HookPoint("channel_pattern", "batch channel query key", meta=whole, on_demand=True)
        self.hook_state = HookPoint("state", "batch head unit", per_position=True)

    def forward(
        self, x: Tensor, log_decay: Tensor, write: Tensor, context: Context, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan. Padding neither writes nor lets time pass.

        Args:
            x, log_decay, write: [batch, pos, head, d_head]. state: from an earlier call, [batch, head, d_head].

        Returns:
            h [batch, pos, head, d_head] and the state after the last token.
        """
        if context.mask is not None:
            real = context.mask[..., None, None].to(write.dtype)
            log_decay, write = log_decay * real, write * real
        stops = self.hook_state.stops(context.offset, x.shape[1]) if self.hook_state.active else []
        h, final = diagonal_scan(
            log_decay,
            write * x,
            state,
            decay_is_log=True,
            mode=SCANS[self.mode],
            stops=stops or None,
            on_state=(lambda t, s: self.hook_state.at(context.offset + t, s)) if stops else None,
        )
        h = h.to(x.dtype)
        if self.hook_channel_pattern.active:
            h = self._through_channels(h, x, log_decay, write, context)
        if self.hook_pattern.active:
            refuse_continued(self.hook_pattern, context)
            keys, decays = write.transpose(1, 2), log_decay.transpose(1, 2)
            self.hook_pattern(
                effective_pattern(torch.ones_like(keys), keys, log_decay=decays, scale=1 / keys.shape[-1])
            )
        return h, final

    def _through_channels(self, h: Tensor, x: Tensor, log_decay: Tensor, write: Tensor, context: Context) -> Tensor:
        """h once the exact patterns were read or edited; a channel is a head of width 1."""
        outputs, values = (part.flatten(2).transpose(1, 2)[..., None] for part in (h, x))
        decays, writes = (part.flatten(2).transpose(1, 2) for part in (log_decay, write))
        ones = torch.ones_like(writes)[..., None]
        outputs = watched(
            self.hook_channel_pattern,
            context,
            outputs,
            values,
            lambda: effective_pattern(ones, ones, log_decay=decays, write=writes),
        )
        return outputs[..., 0].transpose(1, 2).unflatten(2, h.shape[2:])


@register_mixer(RGLRUConfig)
class RGLRU(nn.Module):
    """The recurrent block of Griffin. [batch, pos, d_model] -> same."""

    slots = ("state", "conv")

    def __init__(self, config: RGLRUConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        width = config.width or d_model
        if width % config.n_heads:
            raise ValueError(
                f"The channels ({width}) must be a multiple of n_heads ({config.n_heads}), the blocks of the gates."
            )
        self.config, self.n_heads, self.d_head = config, config.n_heads, width // config.n_heads
        self.activation = activation_function(config.activation)
        self.input = nn.Linear(d_model, width)
        self.gate = nn.Linear(d_model, width)
        self.output = nn.Linear(width, d_model)
        self.conv = nn.Parameter(torch.empty(width, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        shape = (config.n_heads, self.d_head, self.d_head)  # head, in, out
        self.recurrence_gate, self.input_gate = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.recurrence_bias, self.input_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.decay = nn.Parameter(torch.empty(width))
        self.decay._no_weight_decay = True  # type: ignore[attr-defined]
        for parameter in (self.conv, self.recurrence_gate, self.input_gate):
            parameter._own_init = True  # type: ignore[attr-defined]
        self.core = DiagonalCore(self.d_head)
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_recurrence_gate = HookPoint("recurrence_gate", "batch pos head d_head")
        self.hook_input_gate = HookPoint("input_gate", "batch pos head d_head")
        self.hook_log_decay = HookPoint("decay", "batch pos head d_head")
        self.hook_write = HookPoint("write", "batch pos head d_head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_gate = HookPoint("gate", "batch pos head d_head")

    def initialise_own(self) -> None:
        """Published initial values: decays of 0.9 to 0.999, small convolution and gates."""
        config = self.config
        with torch.no_grad():
            for parameter, fan in (
                (self.conv, config.d_conv),
                (self.recurrence_gate, self.d_head),
                (self.input_gate, self.d_head),
            ):
                parameter.normal_(std=(0.01 / fan) ** 0.5)
            squares = torch.empty_like(self.decay).uniform_(config.a_min**2, config.a_max**2)
            self.decay.copy_(torch.log(torch.expm1(-0.5 * torch.log(squares))))

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries `state` [batch, head, d_head] and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        before = None if carried is None else carried["conv"]
        x, window = causal_convolution(self.input(u), self.conv, self.conv_bias, context, before)
        x = self.hook_v(self._heads(x))
        r = self.hook_recurrence_gate(self._gate(x, self.recurrence_gate, self.recurrence_bias))
        i = self.hook_input_gate(self._gate(x, self.input_gate, self.input_bias))
        # as in the published code, 16-bit models compute decays in float32
        precise = torch.float64 if u.dtype == torch.float64 else torch.float32
        log_decay = -SHARPNESS * r.to(precise) * self._heads(F.softplus(self.decay.to(precise)))
        kept = bounded_sqrt(-torch.expm1(2 * log_decay))
        kept = torch.where((context.positions == 0)[..., None, None], 1.0, kept)
        write = self.hook_write(kept * i.to(precise))
        state = None if carried is None else carried["state"]
        h, state = self.core(x, self.hook_log_decay(log_decay), write, context, state)
        gate = self.hook_gate(self._heads(self.activation(self.gate(u))))
        out = self.output((self.hook_z(h) * gate).flatten(-2))
        return out, {"state": state, "conv": window} if context.keep_state else {}

    def _heads(self, x: Tensor) -> Tensor:
        """[..., channel] -> [..., head, d_head]."""
        return x.unflatten(-1, (self.n_heads, self.d_head))

    def _gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[batch, pos, head, d_head] -> same."""
        return torch.sigmoid(self._heads(block_diagonal(x.flatten(-2), weight) + bias))

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """What is mixed. Decays and writes determine the channels' patterns, but not in a form that runs know."""
        return {"value": self.hook_v}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: {name: (point, label, unit)}; the output gate, having heads, is one anyway."""
        return {
            "recurrence_gate": (self.hook_recurrence_gate, "recurrence gate, mean over channels", None),
            "input_gate": (self.hook_input_gate, "input gate, mean over channels", None),
        }

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return cell_record("rg_lru", self.core, self.n_heads, self.d_head)


def bounded_sqrt(x: Tensor) -> Tensor:
    """√x with a derivative of at most STEEPEST: decays near 1 would send gradients without bound into the gates. x ≥ 0."""
    root, slope = x.detach().sqrt(), 0.5 * x.detach().clamp(min=0.25 / STEEPEST**2).rsqrt()
    return root + slope * (x - x.detach())
