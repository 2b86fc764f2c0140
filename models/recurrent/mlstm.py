"""The mLSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 19-27): a matrix memory with an exponential write gate and a normaliser.

    C_t = f_t C_{t−1} + i_t k_t v_tᵀ,  n_t = f_t n_{t−1} + i_t k_t         i = exp(ĩ), f = σ(f̃); both carried divided by exp(m_t)
    h_t = C_tᵀ q_t / max(|n_t·q_t|, 1)                                      hook_state[t] is C, hook_normaliser[t] is n
    m_t = max(log f_t + m_{t−1}, ĩ_t)                                       hook_stabiliser: keeps the exponentials in range

Divided by exp(m_t), this is gated linear attention with decay f_t exp(m_{t−1} − m_t) and write exp(ĩ_t − m_t), both at most 1, and n is one
more column of values, all ones. The output does not depend on m. Given the realised denominator, the pattern is exact:

    α_ij = (q_i·k_j / √d) exp(Σ_{j<s≤i} log f_s + ĩ_j) / max(|n_i·q_i|, 1)

`MLSTMCore` is this; `MLSTM` is the layer of xLSTM-7B (Beck et al. 2025, arXiv 2503.13427). The first paper's block is in `mlstm_block.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_linear_attention import effective_pattern, gated_linear_attention
from kernels.gated_linear_attention.decay import cumulative
from models.context import Context
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.recurrent.linear_core import linear_record, watched
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

NOTHING_WRITTEN = -1e4  # the stabiliser before the first token: below every gate, and small enough to add to


class MLSTMCore(nn.Module):
    """Parameter-free. `mode` is `"chunked"`, `"parallel"` or `"recurrent"`. Hooks its queries, keys, values and gates.

    Args:
        d_key: width of queries and keys. eps: added to the denominator (1e-6 in the published code, nothing in the paper). chunk_size: None
            for the kernel's choice. start: m before the first token. It changes nothing but what eps weighs: eps exp(m).
    """

    transparent_in_names = True
    slots = ("state", "normaliser", "stabiliser")

    def __init__(
        self, d_key: int, eps: float = 1e-6, chunk_size: int | None = None, start: float = NOTHING_WRITTEN
    ) -> None:
        super().__init__()
        self.scale, self.strict = d_key**-0.5, False
        self.eps, self.chunk_size, self.mode, self.start = eps, chunk_size, "chunked", start
        self.hook_q = HookPoint("query", "batch pos head d_key")
        self.hook_k = HookPoint("key", "batch pos head d_key")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_input_gate = HookPoint("input_gate", "batch pos head")
        self.hook_forget_gate = HookPoint("forget_gate", "batch pos head")
        self.hook_stabiliser = HookPoint("stabiliser", "batch pos head", editable=False, on_demand=True)
        self.hook_log_decay = HookPoint("decay", "batch pos head")
        self.hook_write = HookPoint("write", "batch pos head")
        self.hook_denominator = HookPoint("denominator", "batch pos head")
        self.hook_normalised_q = HookPoint("normalised_query", "batch pos head d_key", editable=False, on_demand=True)
        meta = PatternMeta(
            signed=True, rows_sum_to="free", effective=True, label="exact for the denominator that the run came to"
        )
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_state = HookPoint("state", "batch head state_k state_v", per_position=True)
        self.hook_normaliser = HookPoint("state", "batch head state_k", per_position=True)
        self.hook_z = HookPoint("z", "batch pos head d_head")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix values and update the memory. Padding neither writes nor lets time pass.

        Args:
            q, k: [batch, pos, head, d_key]. v: [batch, pos, head, d_head]. i, f: gates before their exponential and sigmoid,
                [batch, pos, head].

        Returns:
            h [batch, pos, head, d_head], and the slots to carry on.
        """
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        # 16-bit models compute gates and the denominator in float32
        precise = torch.float64 if q.dtype == torch.float64 else torch.float32
        gate_in, log_f = self.hook_input_gate(i.to(precise)), F.logsigmoid(self.hook_forget_gate(f.to(precise)))
        if context.mask is not None:
            gate_in = gate_in.masked_fill(~context.mask[..., None], 2 * NOTHING_WRITTEN)
            log_f = log_f * context.mask[..., None]
        start = q.new_full((q.shape[0], q.shape[2]), self.start, dtype=precise)
        before = start if carried is None else carried["stabiliser"]
        m = stabiliser(gate_in.detach(), log_f.detach(), before)
        self.hook_stabiliser(m)
        earlier = torch.cat([before[:, None], m[:, :-1]], 1)
        write = torch.exp(gate_in - m)
        if context.mask is not None:
            write = write * context.mask[..., None]
        factors = {
            "log_decay": self.hook_log_decay(log_f + (earlier - m)).transpose(1, 2),
            "write": self.hook_write(write).transpose(1, 2),
            "scale": self.scale,
        }
        ones = torch.ones_like(v[..., :1])
        heads = (q.transpose(1, 2), k.transpose(1, 2), torch.cat([v, ones], -1).transpose(1, 2))
        output, final = self._mix(heads, factors, context, carried)
        numerator, normaliser = output[..., :-1], output[..., -1].to(precise)
        least = torch.exp((-m).clamp(max=80.0)).transpose(1, 2)
        denominator = torch.maximum(normaliser.abs(), least) + self.eps
        denominator = self.hook_denominator(denominator.transpose(1, 2)).transpose(1, 2)[..., None]
        h = (numerator.to(precise) / denominator).to(q.dtype)
        normalised = (heads[0].to(precise) / denominator).to(q.dtype)
        self.hook_normalised_q(normalised.transpose(1, 2))
        h = watched(
            self.hook_pattern, context, h, v.transpose(1, 2), lambda: effective_pattern(normalised, heads[1], **factors)
        )
        slots = {"state": final[..., :-1], "normaliser": final[..., -1], "stabiliser": m[:, -1]}
        return self.hook_z(h.transpose(1, 2)), slots if context.keep_state else {}

    def _mix(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        factors: dict[str, Any],
        context: Context,
        carried: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The kernel on values with a column of ones; C and n are handed out one by one."""
        points = (self.hook_state, self.hook_normaliser)
        offset, length = context.offset, heads[0].shape[2]
        stops = sorted({t for point in points if point.active for t in point.stops(offset, length)})

        def on_state(t: int, joined: Tensor) -> Tensor:
            memory = self.hook_state.at(offset + t, joined[..., :-1])
            normaliser = self.hook_normaliser.at(offset + t, joined[..., -1])
            return torch.cat([memory, normaliser[..., None]], -1)

        initial = None if carried is None else torch.cat([carried["state"], carried["normaliser"][..., None]], -1)
        return gated_linear_attention(
            *heads,
            **factors,
            initial_state=initial,
            chunk_size=self.chunk_size,
            mode=self.mode,
            stops=stops or None,
            on_state=on_state if stops else None,
        )

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state; queries are those divided by the denominator."""
        return {
            "query": self.hook_normalised_q,
            "key": self.hook_k,
            "value": self.hook_v,
            "log_decay": self.hook_log_decay,
            "write": self.hook_write,
        }

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: {name: (point, label, unit)}."""
        return {
            "denominator": (self.hook_denominator, "denominator, scaled by exp(−m)", None),
            "stabiliser": (self.hook_stabiliser, "stabiliser m: log of the largest write so far", "nats"),
        }

    def record(self, kind: str, n_heads: int, d_key: int, d_head: int) -> dict[str, Any]:
        """The layer record of a run manifest."""
        of_ones = {"normaliser": ("head", "state_k")}
        return linear_record(kind, self, n_heads, n_heads, n_heads, (n_heads, d_key, d_head), of_ones=of_ones)


def stabiliser(i: Tensor, log_f: Tensor, before: Tensor) -> Tensor:
    """m_t = max(log f_t + m_{t−1}, ĩ_t) for all tokens: the largest log weight of any write so far. [batch, pos, head].

    i, log_f: [batch, pos, head]. before: m before the first token, [batch, head]. With G = cumsum(log f) it is
    G_t + max(m_before, max_{j≤t} (ĩ_j − G_j)).
    """
    g = cumulative(log_f, 1)
    largest = (i.to(g.dtype) - g).cummax(1).values
    return (g + torch.maximum(largest, before[:, None].to(g.dtype))).to(i.dtype)


class HeadNorm(nn.Module):
    """Layer norm of each head by itself, with a weight for every channel. [batch, pos, head, d_head] -> [batch, pos, channel]."""

    transparent_in_names = True

    def __init__(self, n_heads: int, d_head: int, eps: float) -> None:
        super().__init__()
        self.norm = Norm("layer", d_head, eps, affine=False, axes="batch pos head d_head")
        self.norm_weight = nn.Parameter(torch.ones(n_heads * d_head))

    def forward(self, h: Tensor) -> Tensor:
        """Normalise, join the heads, scale."""
        return self.norm(h).flatten(-2) * self.norm_weight


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap): keeps x within ± cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


@dataclass(frozen=True)
class MLSTMConfig:
    """The layer of xLSTM-7B.

    Args: n_heads. qk_factor, v_factor: widths of q and k, and of v, over d_model. gate_cap: soft cap of both gates, None for none.
    input_bias: where the input gates' biases begin (−10 as published: writes are so small that the denominator stays 1).
    start: see `MLSTMCore`; 0 in the published code.
    """

    n_heads: int = 4
    qk_factor: float = 0.5
    v_factor: float = 1.0
    gate_cap: float | None = 15.0
    input_bias: float = -10.0
    norm_eps: float = 1e-6
    eps: float = 1e-6
    chunk_size: int | None = None
    start: float = NOTHING_WRITTEN
    kind: str = "mlstm"


@register_mixer(MLSTMConfig)
class MLSTM(nn.Module):
    """out = W_O( σ(W_o x) ⊙ LayerNorm_head(h) ). [batch, pos, d_model] -> same."""

    slots = MLSTMCore.slots

    def __init__(self, config: MLSTMConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        self.config, self.n_heads = config, config.n_heads
        widths = {"q and k": int(d_model * config.qk_factor), "v": int(d_model * config.v_factor)}
        for name, width in widths.items():
            if width % config.n_heads:
                raise ValueError(f"The width of {name} ({width}) must be a multiple of n_heads ({config.n_heads}).")
        d_qk, d_v = widths.values()
        self.d_key, self.d_head = d_qk // config.n_heads, d_v // config.n_heads
        self.query = nn.Linear(d_model, d_qk, bias=False)
        self.key = nn.Linear(d_model, d_qk, bias=False)
        self.value = nn.Linear(d_model, d_v, bias=False)
        self.gate = nn.Linear(d_model, d_v, bias=False)
        self.input_gate = nn.Linear(d_model, config.n_heads)
        self.forget_gate = nn.Linear(d_model, config.n_heads)
        self.output = nn.Linear(d_v, d_model, bias=False)
        self.core = MLSTMCore(self.d_key, config.eps, config.chunk_size, config.start)
        self.norm = HeadNorm(config.n_heads, self.d_head, config.norm_eps)
        self.hook_gate = HookPoint("gate", "batch pos head d_head")

    def initialise_own(self) -> None:
        """Published initial values: gates that do not look at the input yet, input gates almost shut, forget gates open from 3 to 6."""
        with torch.no_grad():
            self.input_gate.weight.zero_()
            self.input_gate.bias.fill_(self.config.input_bias)
            self.forget_gate.weight.zero_()
            self.forget_gate.bias.copy_(torch.linspace(3.0, 6.0, self.n_heads))

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries C [batch, head, d_key, d_head], n [batch, head, d_key] and m [batch, head]."""
        q, k, v, gate = (
            layer(x).unflatten(-1, (self.n_heads, -1)) for layer in (self.query, self.key, self.value, self.gate)
        )
        i, f = (soft_cap(layer(x), self.config.gate_cap) for layer in (self.input_gate, self.forget_gate))
        h, slots = self.core(q, k, v, i, f, context, carried)
        return self.output(self.norm(h) * self.hook_gate(torch.sigmoid(gate)).flatten(-2)), slots

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return self.core.factor_points

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals of the memory; the output gate, having heads, is one anyway."""
        return self.core.signal_points

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return self.core.record("mlstm", self.n_heads, self.d_key, self.d_head)
