"""Qwen3-Next (Qwen team 2025): three layers of Gated DeltaNet to one of gated attention, each with a mixture of experts behind."""

from models.architectures.shared import GLU, language_model, tiny
from models.attention.gates import OutputGateConfig
from models.attention.rotary import QKNormConfig, RopeConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.experts import SparseMLPConfig
from models.recurrent.delta import DeltaConfig


def gated_attention(n_heads: int, n_key_value_heads: int, d_head: int) -> AttentionConfig:
    """Softmax attention with normalised queries and keys, a quarter of each head rotated, and a gate on its output."""
    return AttentionConfig(
        n_heads,
        n_key_value_heads,
        d_head,
        position=RopeConfig(1e7, 0.25),
        bias=False,
        qk_norm=QKNormConfig(),
        post=OutputGateConfig(),
    )


def gated_delta(n_heads: int, n_key_heads: int, width: int) -> DeltaConfig:
    """The delta rule with a decay and a gate; groups of value heads share queries and keys."""
    return DeltaConfig(n_heads, width, width, n_key_heads, "scalar", "silu", norm_eps=1e-6)


language_model(
    name="qwen3-next",
    title="Qwen3-Next",
    paper=None,
    family="hybrid",
    presets={
        "tiny": tiny(
            (DeltaConfig(4, 6, 5, 2, "scalar", "silu"), gated_attention(4, 2, 8)),
            (SparseMLPConfig(10, 5, 2, d_shared=14), GLU),
            norm="rms",
        ),
        "demo": LanguageModelConfig(
            4,
            128,
            256,
            None,
            (*(gated_delta(4, 2, 32),) * 3, gated_attention(4, 2, 32)),
            SparseMLPConfig(64, 16, 4, d_shared=64),
            norm="rms",
            norm_eps=1e-6,
        ),
    },
    description="Delta-rule memories for the whole past, gated attention in every fourth layer, and a few of many MLPs per token.",
    shows=("pattern", "state", "write", "decay"),
    notes="The published model's heads for predicting several tokens at once are left out.",
)
