"""Transformers that differ in how they know positions."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.bam import BAMConfig
from models.attention.cope import CoPEConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import QKNormConfig, SSMaxConfig
from models.attention.site import AttentionConfig
from models.attention.t5 import T5BiasConfig


def _transformer(
    name: str, title: str, paper: str | None, description: str, site: AttentionConfig, **more: object
) -> None:
    fields = {"shows": ("pattern", "position bias"), "presets": {"tiny": tiny(site, GELU)}, **more}
    language_model(name=name, title=title, paper=paper, family="attention", description=description, **fields)


_transformer(
    "t5-bias",
    "T5's relative biases",
    None,
    "One learned number per head and bucket of distances, shared by all layers; scores are not scaled.",
    AttentionConfig(n_heads=4, d_head=8, position=T5BiasConfig(buckets=8, max_distance=16), bias=False, scale=1.0),
)
_transformer(
    "transformer-xl-attention",
    "Transformer-XL's attention",
    None,
    "Relative positions that depend on the query, and a preference for keys: content and position scores are terms of their own.",
    AttentionConfig(n_heads=4, position=(KeyPreferenceConfig(), RelativeConfig()), bias=False),
    notes="Post-norm blocks and a limit to the memory are not part of it; carried keys and values are the paper's memory.",
)
_transformer(
    "music-transformer",
    "Music Transformer",
    "music-transformer",
    "A learned vector per head and distance, matched with the query.",
    AttentionConfig(n_heads=4, position=RelativeEmbeddingConfig(longest=12)),
)
_transformer(
    "cope",
    "CoPE (contextual position encoding)",
    "cope",
    "Heads count tokens of their own choice, and positions are these counts: gates, fractional positions and their bias are hook points.",
    AttentionConfig(n_heads=4, position=CoPEConfig(positions=16)),
    shows=("pattern", "position bias", "context positions"),
)
_transformer(
    "bam",
    "BAM (Bayesian attention mechanism)",
    "bam",
    "A generalised Gaussian prior over distances per head, added to the content's logarithm; scores grow with the length (SSMax).",
    AttentionConfig(n_heads=4, position=(SSMaxConfig(), BAMConfig()), bias=False),
)
language_model(
    name="qk-norm",
    title="Transformer with normalised queries and keys",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(6, 2, 6, position="rope", bias=("query", "key"), qk_norm=QKNormConfig(), softcap=5.0),
            GLU,
            norm="rms",
        )
    },
    description="Queries and keys are normalised per head before rotation (as in Qwen 3), and scores are capped softly (as in Gemma 2).",
    shows=("pattern",),
)
