"""Aaren (Feng et al. 2024, "Attention as an RNN", arXiv 2405.13956): softmax attention whose query is learned, not read from the token.

    s_j = q · W_K x_j / √d_head                    hook_score: one number per token and head; it does not depend on who reads
    o_t = Σ_{j ≤ t} softmax_{j ≤ t}(s)_j v_j        hook_pattern: α_tj, every row the same scores, normalised over its own past
    out = W_O o

Because all rows share their scores, the sums over the past are a state of fixed size. With the running maximum m_t = max_{j ≤ t} s_j,

    w_t = e^{m_{t−1} − m_t} w_{t−1} + e^{s_t − m_t} v_t        hook_state[t]
    u_t = e^{m_{t−1} − m_t} u_{t−1} + e^{s_t − m_t}            hook_normaliser[t]
    o_t = w_t / u_t

which is linear attention with keys φ_t = e^{s_t − m_t}, log decays m_{t−1} − m_t and queries 1 / u_t, all of width 1 (section 3.2 of the
paper, in other words). No exponent is ever positive.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.diagonal_scan import diagonal_scan
from models.context import Context
from models.mixers import register_mixer
from models.recurrent.linear_core import LinearCore, linear_record
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class AarenConfig:
    """Args: n_heads: heads, each with its own learned query."""

    n_heads: int
    chunk_size: int | None = None
    kind: str = "aaren"


@register_mixer(AarenConfig)
class Aaren(nn.Module):
    """The Aaren mixer of one layer. [batch, pos, d_model] -> same."""

    slots = ("state", "normaliser", "maximum")  # w, u and m of the last token

    def __init__(self, config: AarenConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of n_heads ({config.n_heads}).")
        self.config, self.n_heads, self.d_head = config, config.n_heads, d_model // config.n_heads
        self.query = nn.Parameter(torch.empty(self.n_heads, self.d_head))
        self.query._own_init = True  # type: ignore[attr-defined]
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.core = LinearCore(chunk_size=config.chunk_size)
        self.core.hook_pattern.meta = PatternMeta(effective=True)
        self.hook_k = HookPoint("key", "batch pos head d_head")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_score = HookPoint("key_score", "batch pos head")
        self.hook_write_feature = HookPoint("write_feature", "batch pos head one")
        self.hook_read_feature = HookPoint("read_feature", "batch pos head one")
        self.hook_log_decay = HookPoint("decay", "batch pos head")
        self.hook_normaliser = HookPoint("state", "batch head", per_position=True)
        self.hook_z = HookPoint("z", "batch pos head d_head")

    def initialise_own(self) -> None:
        """Queries of unit variance, so that scores differ between tokens from the beginning."""
        nn.init.normal_(self.query)

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries `state` [batch, head, 1, d_head], `normaliser` and `maximum` [batch, head]."""
        k = self.hook_k(self.key(x).unflatten(-1, (self.n_heads, self.d_head)))
        v = self.hook_v(self.value(x).unflatten(-1, (self.n_heads, self.d_head)))
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        score = self.hook_score((k * self.query).sum(-1).to(precise) * self.d_head**-0.5)
        feature, decay, maximum = self._relative(score, context, carried)
        feature = self.hook_write_feature(feature.unsqueeze(-1).to(x.dtype))
        decay = self.hook_log_decay(decay)
        normaliser, last = self._sum(feature[..., 0].to(precise), decay, context, carried)
        read = self.hook_read_feature(normaliser.reciprocal().unsqueeze(-1).to(x.dtype))
        o, state = self.core(
            read.transpose(1, 2),
            feature.transpose(1, 2),
            v.transpose(1, 2),
            context,
            None if carried is None else carried["state"],
            log_decay=decay.transpose(1, 2),
        )
        out = self.output(self.hook_z(o.transpose(1, 2)).flatten(-2))
        if not context.keep_state:
            return out, {}
        return out, {"state": state, "normaliser": last, "maximum": maximum}

    def _relative(
        self, score: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """e^{s_t − m_t}, m_{t−1} − m_t [batch, pos, head], and the last m [batch, head]. Padding has no score.

        The output does not depend on m, so no gradient is taken through it.
        """
        real = None if context.mask is None else context.mask[..., None]
        seen = score.detach() if real is None else score.detach().masked_fill(~real, -torch.inf)
        nothing = torch.full_like(seen[:, 0], -torch.inf)
        before = nothing if carried is None else carried["maximum"]
        highest = torch.cat([before[:, None], seen], 1).cummax(1).values
        earlier, now = highest[:, :-1], highest[:, 1:].masked_fill(highest[:, 1:].isinf(), 0.0)
        decay = torch.where(
            earlier.isinf(), torch.zeros_like(now), earlier - now
        )  # before the first token nothing fades
        difference = score - now
        feature = (difference if real is None else difference.masked_fill(~real, -torch.inf)).exp()
        return feature, decay, highest[:, -1]

    def _sum(
        self, feature: Tensor, decay: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """u [batch, pos, head] and its last value. Padding that no token precedes gets 1, so that it can be divided by."""
        real = None if context.mask is None else context.mask[..., None].to(feature.dtype)
        stops = self.hook_normaliser.stops(context.offset, feature.shape[1]) if self.hook_normaliser.active else []
        sums, last = diagonal_scan(
            decay if real is None else decay * real,
            feature if real is None else feature * real,
            None if carried is None else carried["normaliser"],
            decay_is_log=True,
            mode="recurrent" if self.core.mode == "recurrent" else "auto",
            stops=stops or None,
            on_state=(lambda t, u: self.hook_normaliser.at(context.offset + t, u)) if stops else None,
        )
        if real is not None:
            sums = torch.where(real.bool().expand_as(sums), sums, torch.ones_like(sums))
        return sums, last

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {
            "query": self.hook_read_feature,
            "key": self.hook_write_feature,
            "value": self.hook_v,
            "log_decay": self.hook_log_decay,
        }

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals that a run keeps."""
        return {"score": (self.hook_score, "score of the token, the same for every reader", "nats")}

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads = self.n_heads
        return linear_record(
            "aaren", self.core, heads, heads, heads, (heads, 1, self.d_head), of_ones={"normaliser": ("head",)}
        )
