"""A mixer that is not linear in its values, for tests: what a trace must be able to store of a layer without factors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class TanhConfig:
    """Args: n_heads: independent cells. d_head: width of each."""

    n_heads: int = 2
    d_head: int = 3
    kind: str = "tanh-test"


@register_mixer(TanhConfig)
class Tanh(nn.Module):
    """h_t = tanh(u_t + R h_{t−1}) per head, m_t = m_{t−1} + h_t hᵀ_t; its pattern is |∂h_i/∂u_j| (Frobenius), by definition."""

    slots = ("state", "moment")

    def __init__(self, config: TanhConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        heads, width = config.n_heads, config.d_head
        self.config = config
        self.input = nn.Linear(d_model, heads * width, bias=False)
        self.recurrent = nn.Parameter(torch.empty(heads, width, width))
        self.output = nn.Linear(heads * width, d_model, bias=False)
        meta = PatternMeta(rows_sum_to="free", exact=False, effective=True, kind="jacobian")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta, editable=False)
        self.hook_moment = HookPoint("state", "batch head row column", per_position=True, editable=False)
        self.hook_state = HookPoint("state", "batch head d_head", per_position=True)

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]."""
        heads, width = self.config.n_heads, self.config.d_head
        u = self.hook_v(self.input(x).unflatten(-1, (heads, width)))
        batch, length = u.shape[:2]
        h = u.new_zeros(batch, heads, width) if carried is None else carried["state"]
        m = u.new_zeros(batch, heads, width, width) if carried is None else carried["moment"]
        stops = set(self.hook_state.stops(context.offset, length)) if self.hook_state.active else set()
        moments = set(self.hook_moment.stops(context.offset, length)) if self.hook_moment.active else set()
        out, reach, rows = [], u.new_zeros(batch, heads, 0, width, width), []
        for t in range(length):
            h = torch.tanh(u[:, t] + torch.einsum("hij,bhj->bhi", self.recurrent, h))
            m = m + h[..., :, None] * h[..., None, :]
            out.append(h)
            if self.hook_pattern.active:
                slope = 1 - h.square()
                reach = torch.einsum("bhi,hij,bhtjk->bhtik", slope, self.recurrent, reach)
                reach = torch.cat([reach, torch.diag_embed(slope)[:, :, None]], dim=2)
                norms = reach.flatten(-2).norm(dim=-1)
                rows.append(torch.nn.functional.pad(norms, (0, length - t - 1)))
            h = self.hook_state.at(context.offset + t, h) if t in stops else h
            m = self.hook_moment.at(context.offset + t, m) if t in moments else m
        if self.hook_pattern.active:
            self.hook_pattern(torch.stack(rows, dim=2))
        z = self.hook_z(torch.stack(out, dim=1))
        return self.output(z.flatten(-2)), {"state": h, "moment": m} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """No factors determine the pattern."""
        return {}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """One signal with heads."""
        return {"drive": (self.hook_v, "mean drive", None)}

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads = self.config.n_heads
        return {
            "kind": "tanh",
            "form": "dense",
            "n_heads": heads,
            "n_key_heads": heads,
            "n_value_heads": heads,
            "scale": None,
            "strict": False,
            "alibi_slopes": None,
            "window": None,
            "pattern": self.hook_pattern.meta.as_dict(),
            "state": {"role": "state", "axes": ["head", "d_head"], "shape": [heads, self.config.d_head]},
            "signals": [],
        }
