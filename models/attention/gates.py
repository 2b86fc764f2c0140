"""Gates of an attention site: on its output (a `post` part) and on its sources (a `reweight` part)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.attention.stages import Call, Post, Reweight, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class OutputGateConfig:
    """z ⊙ σ(W_g x) before the output projection (Qiu et al. 2025, "Gated attention"; HRM-Text)."""

    kind: str = "output_gate"


@register_part(OutputGateConfig)
class OutputGate(Post):
    """`hook_gate` [batch, pos, head, d_value]."""

    def __init__(self, config: OutputGateConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.gate = nn.Linear(sizes.d_model, sizes.n_heads * sizes.d_value, bias=False)
        self.hook_gate = HookPoint("gate", "batch pos head d_value")

    def forward(self, z: Tensor, stream: Tensor) -> Tensor:
        return z * self.hook_gate(self.gate(stream).unflatten(-1, (self.sizes.n_heads, -1)).sigmoid())


@dataclass(frozen=True)
class ImportanceConfig:
    """p′_ij ∝ p_ij · g_j, g_j = σ(w_h · x_j): tokens that matter get more from everybody.

    After the Bird-Eye Transformer (2022), whose equations could not be had; the form of g is a guess.
    """

    kind: str = "importance"


@register_part(ImportanceConfig)
class Importance(Reweight):
    """`hook_importance` [batch, pos, head, 1] of the tokens of this call."""

    slots = ("importance",)

    def __init__(self, config: ImportanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.weigh = nn.Linear(sizes.d_model, sizes.n_heads)
        self.hook_importance = HookPoint("importance", "batch pos head one")

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        return {"importance": (self.hook_importance, "importance of the token", None)}

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        new = self.hook_importance(self.weigh(call.stream).sigmoid()[..., None])
        weighed = pattern * call.carry("importance", new).permute(0, 2, 3, 1)
        return weighed / weighed.sum(-1, keepdim=True)
