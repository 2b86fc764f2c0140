"""CoPE, contextual position encoding (Golovneva et al. 2024): positions that count what a head chooses to count.

    g_ij = σ(c_ij)                       whether query i counts token j (c: the scaled content score; 0 where i cannot see j)
    p_ij = min(Σ_{t=j..i} g_it, P − 1)   how many counted tokens lie between, itself included: a fraction
    bias = q_i · e[p_ij]                 interpolated between the vectors of the whole positions below and above

One table e [position, d_head] serves all heads, and q is not scaled in the bias, as in the released code. Whether the paper's gates see
scaled or unscaled scores is not said; scaled ones are used here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, ScoreTerm, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class CoPEConfig:
    """Args: positions: how many positions have a vector, P; counts beyond share the last one."""

    positions: int = 64
    kind: str = "cope"


@register_part(CoPEConfig)
class CoPE(ScoreTerm):
    """`hook_gates`, `hook_positions` [batch, head, query, key] can be edited; `hook_count` reports p_i0, the count over the whole past."""

    needs_content = True

    def __init__(self, config: CoPEConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.table = nn.Parameter(torch.empty(config.positions, sizes.d_head))
        self.hook_gates = HookPoint("context_gate", f"batch {sizes.map_axis} query key")
        self.hook_positions = HookPoint("context_position", f"batch {sizes.map_axis} query key")
        self.hook_count = HookPoint("context_count", f"batch pos {sizes.map_axis} one", editable=False, on_demand=True)

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        return {"context_count": (self.hook_count, "tokens counted so far", None)}

    def term(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        gates = self.hook_gates((call.content + call.mask).sigmoid())
        positions = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.config.positions - 1)
        positions = self.hook_positions(positions)
        if self.hook_count.active:
            self.hook_count(positions[..., 0].transpose(1, 2)[..., None])
        below = positions.detach().floor().clamp(0, self.config.positions - 1)
        above = positions.detach().ceil().clamp(0, self.config.positions - 1)
        whole = call.q @ self.table.T  # what every whole position would add, [batch, head, query, position]
        share = positions - below
        return whole.gather(-1, above.long()) * share + whole.gather(-1, below.long()) * (1 - share)
