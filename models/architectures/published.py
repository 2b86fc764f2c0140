"""Blocks of published transformers that differ in where they normalise: GPT, BLOOM, Gemma 2."""

from models.architectures.shared import GELU, language_model, tiny
from models.attention.site import AttentionConfig
from models.parts.channel_mixers import MLPConfig

language_model(
    name="gpt1",
    title="GPT (2018)",
    paper=None,
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4), GELU, norm_placement="after", tie_embeddings=True)},
    description="Norms after each sum, as in the original transformer; learned positions, no last norm.",
)
language_model(
    name="bloom",
    title="BLOOM",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=3, position="alibi"), GELU, embed_norm=True, tie_embeddings=True),
    },
    description="A norm behind the embedding, linear distance biases instead of positions.",
    shows=("pattern", "position bias"),
)
language_model(
    name="gemma2",
    title="Gemma 2",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(4, 2, 8, position="rope", bias=False, window=7, softcap=50.0),
                AttentionConfig(4, 2, 8, position="rope", bias=False, softcap=50.0),
            ),
            MLPConfig(40, "gelu_tanh", gated=True, bias=False),
            norm="rms",
            norm_placement="both",
            embed_scale=24**0.5,
            logit_softcap=30.0,
            tie_embeddings=True,
        )
    },
    description="Norms before and after mixer and MLP, caps on scores and logits, windowed and full attention in turns.",
)
