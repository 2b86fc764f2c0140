"""Aaren (Feng et al. 2024)."""

from models.architectures.shared import GELU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.aaren import AarenConfig

language_model(
    name="aaren",
    title="Aaren",
    paper="aaren",
    family="linear-attention",
    presets={
        "tiny": tiny(AarenConfig(n_heads=3), GELU),
        "demo": LanguageModelConfig(4, 128, 256, None, AarenConfig(4), MLPConfig(512)),
    },
    description="Attention whose query is learned: one score per token explains the whole pattern, and the past is a state of fixed size.",
    shows=("pattern", "state", "decay"),
)
