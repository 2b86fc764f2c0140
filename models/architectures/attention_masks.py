"""Transformers that differ in what a token may read."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.combiner import CombinerConfig
from models.attention.masks import FixedConfig, StridedConfig
from models.attention.nats import NatsConfig
from models.attention.normalisers import TopKConfig
from models.attention.routing import RoutingConfig
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
language_model(
    name="nats",
    title="Neural Attention Search",
    paper="nats",
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=4, n_key_value_heads=2, position="rope", normalise=NatsConfig(window=4)),
            GLU,
            norm="rms",
        )
    },
    description="Every token is global, local or sliding per key/value head, which says how long it can be read; a hook forces its type.",
    shows=("pattern", "token type"),
    notes="Masks and types as in the released code; types are deterministic, gradients straight-through instead of the kernel's.",
)
language_model(
    name="combiner",
    title="Combiner (fixed)",
    paper="combiner",
    family="attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, normalise=CombinerConfig(segment=5)),
                AttentionConfig(n_heads=4, normalise=CombinerConfig(segment=4, pool="max")),
            ),
            GELU,
        )
    },
    description="Full attention by parts: the own segment directly, earlier segments through one weight each; rows sum to 1.",
    shows=("pattern", "region pattern"),
)
language_model(
    name="routing-transformer",
    title="Routing Transformer (clusters)",
    paper="routing-transformer",
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, position="rope", window=6),
                AttentionConfig(n_heads=4, position="rope", mask=RoutingConfig(clusters=3)),
            ),
            GELU,
        )
    },
    description="Local layers, and layers in which a token reads the earlier tokens of its cluster; centroids follow tokens in training.",
    notes="Clusters by the nearest centroid, as the paper defines them, not the balanced selection, which looks ahead.",
)
