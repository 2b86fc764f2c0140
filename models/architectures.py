"""The architectures: each a name, a paper and a configuration of shared parts."""

from typing import Any

from models.architecture_record import Architecture, register_architecture
from models.attention.site import AttentionConfig
from models.bdh.model import BDH, BDHConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.mamba2 import Mamba2Config
from models.recurrent.retention import RetentionConfig


def _tiny(mixer: object, mlp: MLPConfig | None, **changes: object) -> LanguageModelConfig:
    """Small enough for exhaustive tests, large enough that no axis is 1 or equal to another."""
    return LanguageModelConfig(n_layers=3, d_model=24, vocab_size=256, n_ctx=64, mixer=mixer, mlp=mlp, **changes)  # type: ignore[arg-type]


def _language_model(**record: Any) -> None:
    register_architecture(Architecture(config=LanguageModelConfig, module=LanguageModel, **record))


_GELU = MLPConfig(d_mlp=40)
_GLU = MLPConfig(d_mlp=40, activation="silu", gated=True, bias=False)

_language_model(
    name="gpt2",
    title="GPT-2",
    paper=None,
    family="attention",
    presets={
        "tiny": _tiny(AttentionConfig(n_heads=4), _GELU, unembed_bias=True),
        "small": LanguageModelConfig(12, 768, 50257, 1024, AttentionConfig(12), MLPConfig(3072), tie_embeddings=True),
    },
    description="Pre-norm transformer with learned positions and multi-head softmax attention.",
)
_language_model(
    name="gpt",
    title="GPT with rotary positions",
    paper=None,
    family="attention",
    presets={
        "tiny": _tiny(AttentionConfig(n_heads=4, position="rope"), _GELU),
        "demo": LanguageModelConfig(4, 128, 256, None, AttentionConfig(4, position="rope"), MLPConfig(512)),
    },
    description="Pre-norm transformer with layer norms, GELU MLPs and rotary positions: no limit on the input's length.",
)
_language_model(
    name="llama",
    title="Llama",
    paper=None,
    family="attention",
    presets={
        "tiny": _tiny(AttentionConfig(n_heads=4, n_key_value_heads=2, position="rope", bias=False), _GLU, norm="rms"),
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
_language_model(
    name="alibi",
    title="ALiBi transformer",
    paper="mqa",
    family="attention",
    presets={
        "tiny": _tiny(
            AttentionConfig(n_heads=3, n_key_value_heads=1, position="alibi", bias=False),
            _GELU,
            tie_embeddings=True,
        )
    },
    description="Multi-query attention (one key/value head) with linear distance biases instead of position embeddings.",
    shows=("pattern", "position bias"),
)
_language_model(
    name="gptj",
    title="GPT-J",
    paper=None,
    family="attention",
    presets={
        "tiny": _tiny(
            AttentionConfig(n_heads=4, d_head=8, position="rope", rope_interleaved=True, rope_fraction=0.5),
            _GELU,
            parallel=True,
        )
    },
    description="Attention and MLP in parallel on the same residual stream, partial interleaved rotary positions.",
)
_language_model(
    name="looped",
    title="Looped transformer",
    paper=None,
    family="attention",
    presets={"tiny": _tiny(AttentionConfig(n_heads=4, position="sinusoidal", window=9), _GELU, loops=2)},
    description="Blocks applied several times with the same weights (addresses carry a step), sinusoidal positions, sliding window.",
    shows=("pattern", "steps"),
)
_language_model(
    name="attention-only",
    title="Attention-only transformer",
    paper=None,
    family="attention",
    presets={
        "tiny": _tiny(AttentionConfig(n_heads=4, position="none"), None),
        "circuit": LanguageModelConfig(2, 128, 256, None, AttentionConfig(4, position="rope", bias=False), None),
    },
    description="No MLPs: everything is written to the residual stream by an attention head (tiny: no positions; circuit: rotary).",
)
_language_model(
    name="retnet",
    title="RetNet",
    paper="retnet",
    family="linear-attention",
    presets={
        "tiny": _tiny(RetentionConfig(n_heads=3), _GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4, 128, 256, None, RetentionConfig(4), MLPConfig(256, "gelu", True, False), norm="rms"
        ),
    },
    description="Retention: linear attention whose memory fades at a fixed rate per head; exact effective pattern and editable state.",
    shows=("pattern", "state"),
)
_language_model(
    name="mamba2",
    title="Mamba-2",
    paper=None,
    family="state-space",
    presets={
        "tiny": _tiny(Mamba2Config(d_state=6, d_head=8, n_groups=2), None, norm="rms"),
        "demo": LanguageModelConfig(6, 128, 256, None, Mamba2Config(d_state=32, d_head=32), None, norm="rms"),
    },
    description="State-space duality: every token chooses how much to forget and how much to write; exact pattern and editable state.",
    shows=("pattern", "state", "decay", "write"),
)
register_architecture(
    Architecture(
        name="bdh",
        title="BDH (Dragon Hatchling)",
        paper="bdh",
        family="bdh",
        config=BDHConfig,
        module=BDH,
        presets={
            "tiny": BDHConfig(n_layers=3, d_model=12, n_heads=2, n_neurons=32, dropout=0.0, init_std=0.2),
            "demo": BDHConfig(n_layers=4, d_model=64, n_heads=4, n_neurons=2048, dropout=0.05),
            "published": BDHConfig(),
        },
        description="One set of weights for all layers, sparse positive neurons, strictly past linear attention: synapses as state.",
        shows=("pattern", "state", "neurons"),
    )
)
