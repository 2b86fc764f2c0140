"""Delta-rule memories: DeltaNet, Gated DeltaNet and Kimi Delta Attention (Yang et al. 2024; Kimi Linear 2025)."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.delta import DeltaConfig

SWIGLU = MLPConfig(352, "silu", True, False)

language_model(
    name="deltanet",
    title="DeltaNet",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(DeltaConfig(n_heads=3, d_key=6, d_value=5), GLU, norm="rms"),
        "demo": LanguageModelConfig(4, 128, 256, None, DeltaConfig(4, 32, 32), SWIGLU, norm="rms"),
    },
    description="Every write first takes back what its key already recalls; the exact pattern shows the erasure.",
    shows=("pattern", "state", "write"),
)
language_model(
    name="gated-deltanet",
    title="Gated DeltaNet",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(
            DeltaConfig(n_heads=4, d_key=6, d_value=5, n_key_heads=2, decay="scalar", gate="silu"), GLU, norm="rms"
        ),
        "demo": LanguageModelConfig(
            4, 128, 256, None, DeltaConfig(4, 32, 32, decay="scalar", gate="silu"), SWIGLU, norm="rms"
        ),
    },
    description="The delta rule with a decay per head and token, as in Qwen3-Next: it can clear the memory or replace one entry.",
    shows=("pattern", "state", "write", "decay"),
)
language_model(
    name="kda",
    title="Kimi Delta Attention",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(
            DeltaConfig(n_heads=3, d_key=6, d_value=5, decay="vector", gate="sigmoid", low_rank=4), GLU, norm="rms"
        ),
        "demo": LanguageModelConfig(
            4, 128, 256, None, DeltaConfig(4, 32, 32, decay="vector", gate="sigmoid", low_rank=32), SWIGLU, norm="rms"
        ),
    },
    description="The delta rule with a decay for every key channel and token; the recurrent layers of Kimi Linear.",
    shows=("pattern", "state", "write", "decay"),
)
