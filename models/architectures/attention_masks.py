"""Transformers that differ in what a token may read."""

from models.architectures.shared import GELU, language_model, tiny
from models.attention.masks import FixedConfig, StridedConfig
from models.attention.normalisers import TopKConfig
from models.attention.site import AttentionConfig

language_model(
    name="sparse-transformer",
    title="Sparse Transformer",
    paper="sparse-transformer",
    family="attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, mask=StridedConfig(stride=4)),
                AttentionConfig(n_heads=4, mask=FixedConfig(block=5, summary=2)),
            ),
            GELU,
        )
    },
    description="Strided and fixed sparse masks: half of the heads read nearby, half read every few tokens or the ends of blocks.",
    notes="The masks, not the two-dimensional position embedding nor the block-sparse kernels; half of the heads per pattern.",
)
language_model(
    name="top-k-attention",
    title="Transformer with top-k attention",
    paper=None,
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4, position="rope", normalise=TopKConfig(k=5)), GELU)},
    description="Every token reads at most five others.",
)
