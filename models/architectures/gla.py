"""Gated linear attention (Yang et al. 2023), with a decay per key channel or per head."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.gla import GLAConfig

SWIGLU = MLPConfig(352, "silu", True, False)

language_model(
    name="gla",
    title="Gated linear attention",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(GLAConfig(n_heads=3, key_factor=0.75, decay_rank=5), GLU, norm="rms"),
        "demo": LanguageModelConfig(4, 128, 256, None, GLAConfig(4), SWIGLU, norm="rms"),
    },
    description="Linear attention in which every token chooses how fast each row of the memory fades; exact pattern and state.",
    shows=("pattern", "state", "decay"),
)
language_model(
    name="simple-gla",
    title="Gated linear attention with scalar gates",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(GLAConfig(n_heads=3, key_factor=0.75, decay="scalar"), GLU, norm="rms"),
        "demo": LanguageModelConfig(4, 128, 256, None, GLAConfig(4, decay="scalar"), SWIGLU, norm="rms"),
    },
    description="Gated linear attention with one decay per head and token: RetNet's memory, fading as the data say.",
    shows=("pattern", "state", "decay"),
)
