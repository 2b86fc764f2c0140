"""Titans (Behrouz, Zhong & Mirrokni 2024, arXiv 2501.00663): a memory that learns at test time, alone or beside short-range attention.

    m = M(x)           the neural memory (neural_memory.py): surprise-driven writes with momentum and forgetting
    y = SWA([P ‖ x])    attention over the last `window` tokens and `n_persistent` learned ones (variants "gate" and "layer")

    variant "memory"   out = W_O( norm(m) ⊙ SiLU(W_G x) )                                   the memory alone (LMM)
    variant "gate"     out = W_O( norm(y) ⊙ σ(norm(m)) ⊙ SiLU(W_G x) )                      memory as a gate (MAG)
    variant "layer"    out = W_O( norm(SWA([P ‖ norm(m)])) ⊙ SiLU(W_G x) )                  memory as a layer before attention (MAL)

The paper says that both branches are normalised with learned weights and meet in "a non-linearity σ"; which branch is inside is not said:
here the memory gates attention. Its persistent tokens also pass through the memory first; here that is part of the memory's learned first
weights. Pattern and state are the memory's; attention has its own under `attn`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context, allowed, to_add
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.recurrent.neural_memory import MemoryConfig, NeuralMemory, ShowsItsMemory
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

VARIANTS = ("memory", "gate", "layer")


@dataclass(frozen=True)
class TitansConfig(MemoryConfig):
    """Args: those of `MemoryConfig`. variant: one of VARIANTS. window: tokens that attention reads back. n_persistent: learned tokens that
    every token can read."""

    variant: str = "memory"
    window: int = 32
    n_persistent: int = 4
    norm_eps: float = 1e-6
    kind: str = "titans"


@register_mixer(TitansConfig)
class Titans(ShowsItsMemory, nn.Module):
    """The Titans mixer of one layer. [batch, pos, d_model] -> same."""

    def __init__(self, config: TitansConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.variant not in VARIANTS:
            raise ValueError(
                f"Unknown variant {config.variant!r}.{suggestion(config.variant, VARIANTS)} Expected one of {VARIANTS}."
            )
        self.config = config
        self.memory = NeuralMemory(config, d_model)
        self.memory_norm = Norm("rms", d_model, config.norm_eps)
        self.slots = self.memory.slots
        self.attn: PersistentAttention | None = None
        if config.variant != "memory":
            self.attn = PersistentAttention(config.n_heads, d_model, config.window, config.n_persistent)
            self.attention_norm = Norm("rms", d_model, config.norm_eps)
            self.slots = (*self.slots, "key", "value")
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.hook_gate = HookPoint("gate", "batch pos channel")

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries the memory's slots and, with attention, `key` and `value`."""
        z, slots = self.memory(x, context, carried)
        mixed = self.memory_norm(z.flatten(-2))
        if self.attn is not None:
            y, seen = self.attn(mixed if self.config.variant == "layer" else x, context, carried)
            y = self.attention_norm(y)
            mixed = y if self.config.variant == "layer" else y * torch.sigmoid(mixed)
            slots.update(seen)
        return self.output(mixed * self.hook_gate(F.silu(self.gate(x)))), slots


class PersistentAttention(nn.Module):
    """Softmax attention over the last `window` tokens and learned ones that every token reads. [batch, pos, d_model] -> same.

    There is no output projection. `hook_attention` [batch, head, query, source]: the learned tokens are the first columns.
    """

    def __init__(self, n_heads: int, d_model: int, window: int, n_persistent: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1 (the token itself).")
        self.n_heads, self.d_head, self.window = n_heads, d_model // n_heads, window
        self.query, self.key, self.value = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.persistent_key = nn.Parameter(torch.empty(n_persistent, n_heads, self.d_head))
        self.persistent_value = nn.Parameter(torch.empty(n_persistent, n_heads, self.d_head))
        axes = "batch pos head d_head"
        self.hook_q, self.hook_k, self.hook_v = (HookPoint(f"attention_{r}", axes) for r in ("query", "key", "value"))
        meta = PatternMeta(columns="persistent or earlier token")
        self.hook_attention = HookPoint("attention", "batch head query source", meta=meta)
        self.hook_attention_z = HookPoint("attention_z", axes)

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Carries `key` and `value` [batch, pos, head, d_head]."""
        shape = (self.n_heads, self.d_head)
        q = self.hook_q(self.query(x).unflatten(-1, shape))
        k, v = self.hook_k(self.key(x).unflatten(-1, shape)), self.hook_v(self.value(x).unflatten(-1, shape))
        if carried is not None:
            k, v = torch.cat([carried["key"], k], 1), torch.cat([carried["value"], v], 1)
        batch, length = x.shape[:2]
        keys, values = (
            torch.cat([own.expand(batch, -1, -1, -1), seen], 1)
            for own, seen in ((self.persistent_key, k), (self.persistent_value, v))
        )
        visible = F.pad(allowed(context, length, x.device, self.window), (len(self.persistent_key), 0), value=True)
        scores = torch.einsum("bqhd,bshd->bhqs", q, keys) * self.d_head**-0.5 + to_add(visible, x.dtype)[:, None]
        pattern = self.hook_attention(scores.softmax(-1))
        z = self.hook_attention_z(torch.einsum("bhqs,bshd->bqhd", pattern, values))
        return z.flatten(-2), {"key": k, "value": v} if context.keep_state else {}
