"""Log-linear attention (Guo et al. 2025, arXiv 2506.04761): one state per level of a Fenwick tree over the past, each read with a weight.

    level(i, j) = 0 for j = i, else the number of binary digits of (i xor j)     token, the one before, the 2, 4, 8, … before that
    λ_t = softplus(L ⊙ W_λ x_t)                        hook_level: one weight per token, head and level
    S^m <- A_t S^m for every level;  S^0 = what token t writes;  buckets merge with t            hook_state[t]
    o_t = Σ_m λ_t^m q_tᵀ S_t^m,   α = α of the mixer ⊙ λ_i^{level(i, j)}                          hook_pattern: o = α v exactly

`FenwickCore` takes the place of `LinearCore`; the mixers are the ordinary ones around it. Positions are those of a sequence's own
tokens: padding lets no time pass. Tokens beyond the last level count as the last, so texts of any length can be read.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fenwick import effective_pattern, log_linear_attention
from models.context import Context
from models.mixers import register_mixer
from models.recurrent.delta import Delta, DeltaConfig
from models.recurrent.linear_core import watched
from models.recurrent.mamba2 import Mamba2, Mamba2Config
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


class FenwickCore(nn.Module):
    """Parameter-free. Tensors are [batch, head, pos, width]; `mode` is `"chunked"`, `"parallel"` or `"recurrent"`.

    Args:
        delta: the delta rule under the levels, with `write` as its β; else linear attention. Others as for `LinearCore`.
    """

    transparent_in_names = True

    def __init__(self, scale: float = 1.0, chunk_size: int | None = None, delta: bool = False) -> None:
        super().__init__()
        self.delta = delta
        self.scale, self.strict, self.chunk_size = scale, False, chunk_size
        self.mode = "chunked"
        meta = PatternMeta(signed=True, rows_sum_to="free", effective=True)
        self.hook_level = HookPoint("level", "batch pos head level")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_state = HookPoint("state", "batch head level state_k state_v", per_position=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        state: Tensor | None,
        levels: Tensor,
        log_decay: Tensor | None = None,
        write: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values and update the level states.

        Args:
            levels: the weight of each level, [batch, pos, head, level], before its hook. Others as for `LinearCore`.

        Returns:
            output [batch, head, pos, state_v], and the states after the last token if the caller keeps them.
        """
        weights = self.hook_level(levels).transpose(1, 2)
        strength = {"beta": write} if self.delta else {"write": write}
        rule: dict[str, Any] = {"log_decay": log_decay, "scale": self.scale, **strength}
        stops: list[int] = []
        if self.hook_state.active:
            stops = self.hook_state.stops(context.offset, q.shape[2])
        output, final = log_linear_attention(
            q,
            k,
            v,
            weights,
            **rule,
            start=context.read_before,
            real=context.mask,
            initial_state=state,
            chunk_size=self.chunk_size,
            mode=self.mode,
            stops=stops or None,
            on_state=(lambda t, s: self.hook_state.at(context.offset + t, s)) if stops else None,
            need_state=context.keep_state,
        )
        return watched(
            self.hook_pattern, context, output, v, lambda: effective_pattern(q, k, weights, **rule, real=context.mask)
        ), final


class LevelWeights(nn.Module):
    """λ = softplus(L ⊙ W_λ x) [batch, pos, head, level], L = 1 at first (per head and level)."""

    def __init__(self, d_model: int, n_heads: int, n_levels: int) -> None:
        super().__init__()
        if n_levels < 2:
            raise ValueError(f"n_levels is {n_levels}; expected at least 2 (the token itself, and the past).")
        self.shape = (n_heads, n_levels)
        self.level = nn.Linear(d_model, n_heads * n_levels, bias=False)
        self.steepness = nn.Parameter(torch.ones(n_heads, n_levels))
        self.steepness._own_init = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, pos, d_model]."""
        return F.softplus(self.steepness * self.level(x).unflatten(-1, self.shape))


def log_linear_record(record: dict[str, Any], kind: str, n_levels: int) -> dict[str, Any]:
    """The layer record of a log-linear mixer, from that of the ordinary one: no short factors determine its pattern."""
    head, state_k, state_v = record["state"]["shape"]
    state = {
        "role": "state",
        "axes": ["head", "level", "state_k", "state_v"],
        "shape": [head, n_levels, state_k, state_v],
    }
    return {**record, "kind": kind, "form": "dense", "state": state}


@dataclass(frozen=True)
class LogLinearMamba2Config(Mamba2Config):
    """Args: those of `Mamba2Config`. n_levels: level states; 2^(n_levels − 1) tokens are told apart by level."""

    n_levels: int = 12
    kind: str = "log_linear_mamba2"


@register_mixer(LogLinearMamba2Config)
class LogLinearMamba2(Mamba2):
    """Mamba-2 with level states. [batch, pos, d_model] -> same."""

    def __init__(self, config: LogLinearMamba2Config, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(config, d_model, switches)
        self.n_levels = config.n_levels
        self.levels = LevelWeights(d_model, self.n_heads, config.n_levels)
        self.core = FenwickCore(chunk_size=config.chunk_size)  # type: ignore[assignment]

    def core_arguments(self, u: Tensor) -> dict[str, Tensor]:
        """The level weights."""
        return {"levels": self.levels(u)}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return log_linear_record(super().describe(), "log_linear_mamba2", self.n_levels)


@dataclass(frozen=True)
class LogLinearDeltaConfig(DeltaConfig):
    """Args: those of `DeltaConfig`. n_levels: level states; 2^(n_levels − 1) tokens are told apart by level."""

    n_levels: int = 12
    kind: str = "log_linear_delta"


@register_mixer(LogLinearDeltaConfig)
class LogLinearDelta(Delta):
    """The (gated) delta rule with level states. [batch, pos, d_model] -> same."""

    def __init__(self, config: LogLinearDeltaConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(config, d_model, switches)
        self.n_levels = config.n_levels
        self.levels = LevelWeights(d_model, self.n_heads, config.n_levels)
        self.core = FenwickCore(self.core.scale, config.chunk_size, delta=True)  # type: ignore[assignment]

    def core_arguments(self, x: Tensor) -> dict[str, Tensor]:
        """The level weights."""
        return {"levels": self.levels(x)}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """None besides the factors: the levels share one write, whose size no level alone tells."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return log_linear_record(super().describe(), "log_linear_delta", self.n_levels)
