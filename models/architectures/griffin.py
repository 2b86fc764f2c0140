"""Griffin and Hawk (De et al. 2024), published with weights as RecurrentGemma (Botev et al. 2024, arXiv 2404.07839)."""

from models.architectures.shared import language_model, tiny
from models.attention.rotary import RopeConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.rg_lru import RGLRUConfig


def local(n_heads: int, d_head: int, window: int) -> AttentionConfig:
    """Attention over the last `window` tokens with one head of keys and values, half of every head rotated."""
    return AttentionConfig(n_heads, 1, d_head, position=RopeConfig(fraction=0.5), bias=("output",), window=window)


def gated(d_mlp: int) -> MLPConfig:
    """A gated MLP with biases everywhere."""
    return MLPConfig(d_mlp, "gelu_tanh", gated=True, gate_bias=True)


language_model(
    name="griffin",
    title="Griffin",
    paper=None,
    family="hybrid",
    presets={
        "tiny": tiny(
            (RGLRUConfig(3, 30), RGLRUConfig(3, 30), local(4, 8, 6)),
            gated(40),
            norm="rms",
            embed_scale=24**0.5,
            logit_softcap=30.0,
            tie_embeddings=True,
        ),
        "demo": LanguageModelConfig(
            6, 128, 256, None, (RGLRUConfig(), RGLRUConfig(), local(4, 32, 64)), gated(384), norm="rms"
        ),
        "hawk": LanguageModelConfig(6, 128, 256, None, RGLRUConfig(), gated(384), norm="rms"),
    },
    description="Two layers in which every channel forgets at its own, chosen rate, to one of attention over the last tokens.",
    shows=("pattern", "state", "decay", "write"),
)
