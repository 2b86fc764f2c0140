"""Neural attention (2025): a small network scores each pair of query and key instead of their scalar product.

    s_ij = w₃ · ReLU(W₂ ReLU(W₁ [q̃_i; k̃_j] + b₁) + b₂) + b₃,   q̃ = P_q q, k̃ = P_k k

with heads sharing the network, and no 1/√d. W₁[q̃; k̃] is a sum, so the first layer costs one broadcast addition. The released language
model uses it in its first layer only.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.attention.stages import Call, Score, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class PairScoreConfig:
    """Args: d_pair: width d′ of the projected queries and keys and of the first layer; the second has half of it."""

    d_pair: int = 8
    kind: str = "pair_score"


@register_part(PairScoreConfig)
class PairScore(Score):
    """`hook_hidden1`, `hook_hidden2` [batch, head, query, key, unit] are what the network's units say to each pair (on demand: large)."""

    def __init__(self, config: PairScoreConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        wide, half = config.d_pair, max(1, config.d_pair // 2)
        self.from_query, self.from_key = (nn.Linear(sizes.d_head, wide) for _ in range(2))
        self.first_query = nn.Linear(wide, wide)  # holds b₁
        self.first_key = nn.Linear(wide, wide, bias=False)
        self.second, self.last = nn.Linear(wide, half), nn.Linear(half, 1)
        axes = f"batch {sizes.map_axis} query key unit"
        self.hook_hidden1 = HookPoint("score_hidden", axes, on_demand=True)
        self.hook_hidden2 = HookPoint("score_hidden", axes, on_demand=True)

    def forward(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        q, k = self.first_query(self.from_query(call.q)), self.first_key(self.from_key(call.k))
        first = self.hook_hidden1((q[:, :, :, None] + k[:, :, None]).relu())
        second = self.hook_hidden2(self.second(first).relu())
        return self.last(second)[..., 0]
