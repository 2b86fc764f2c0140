"""Transformers: settings of one attention site and one block."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig

language_model(
    name="gpt2",
    title="GPT-2",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4), GELU, unembed_bias=True),
        "small": LanguageModelConfig(12, 768, 50257, 1024, AttentionConfig(12), MLPConfig(3072), tie_embeddings=True),
    },
    description="Pre-norm transformer with learned positions and multi-head softmax attention.",
)
language_model(
    name="gpt",
    title="GPT with rotary positions",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4, position="rope"), GELU),
        "demo": LanguageModelConfig(4, 128, 256, None, AttentionConfig(4, position="rope"), MLPConfig(512)),
    },
    description="Pre-norm transformer with layer norms, GELU MLPs and rotary positions: no limit on the input's length.",
)
language_model(
    name="llama",
    title="Llama",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4, n_key_value_heads=2, position="rope", bias=False), GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4,
            128,
            256,
            None,
            AttentionConfig(4, 2, position="rope", bias=False),
            MLPConfig(352, "silu", True, False),
            norm="rms",
        ),
    },
    description="Pre-norm transformer with RMS norms, rotary positions, grouped-query attention and a gated MLP.",
)
language_model(
    name="alibi",
    title="ALiBi transformer",
    paper="mqa",
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=3, n_key_value_heads=1, position="alibi", bias=False),
            GELU,
            tie_embeddings=True,
        )
    },
    description="Multi-query attention (one key/value head) with linear distance biases instead of position embeddings.",
    shows=("pattern", "position bias"),
)
language_model(
    name="gptj",
    title="GPT-J",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=4, d_head=8, position="rope", rope_interleaved=True, rope_fraction=0.5),
            GELU,
            parallel=True,
        )
    },
    description="Attention and MLP in parallel on the same residual stream, partial interleaved rotary positions.",
)
language_model(
    name="looped",
    title="Looped transformer",
    paper=None,
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4, position="sinusoidal", window=9), GELU, loops=2)},
    description="Blocks applied several times with the same weights (addresses carry a step), sinusoidal positions, sliding window.",
    shows=("pattern", "steps"),
)
language_model(
    name="attention-only",
    title="Attention-only transformer",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4, position="none"), None),
        "circuit": LanguageModelConfig(2, 128, 256, None, AttentionConfig(4, position="rope", bias=False), None),
    },
    description="No MLPs: everything is written to the residual stream by an attention head (tiny: no positions; circuit: rotary).",
)
