"""Transformers that differ in what their attention maps are made of: pairs of maps, relations, n-grams, networks, importance."""

from typing import Any

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.differential import DifferentialConfig, DifferentialNormConfig
from models.attention.gates import ImportanceConfig, OutputGateConfig
from models.attention.low_rank import SharedBaseConfig
from models.attention.ngram import NGramConfig, ValuesOnlyConfig
from models.attention.normalisers import EmptyRowsConfig, SinkConfig
from models.attention.pair_scores import PairScoreConfig
from models.attention.relations import RelationsConfig, SymbolValuesConfig
from models.attention.site import AttentionConfig
from models.attention.slices import SliceConfig


def _differential(**changes: Any) -> AttentionConfig:
    parts: dict[str, Any] = {"reweight": DifferentialConfig(), "post": DifferentialNormConfig()}
    return AttentionConfig(n_heads=3, d_head=4, position="rope", bias=False, **parts, **changes)


language_model(
    name="diff-transformer",
    title="Differential transformer",
    paper=None,
    family="attention",
    presets={"tiny": tiny(_differential(), GLU, norm="rms")},
    description="Two softmax maps per head, one subtracted from the other: both maps, λ and the signed difference are hook points.",
    shows=("pattern", "lambda"),
)
language_model(
    name="shared-diff",
    title="Shared DIFF transformer",
    paper="shared-diff",
    family="attention",
    presets={"tiny": tiny(_differential(project=SharedBaseConfig(rank=3)), GLU, norm="rms")},
    description="Differential attention whose queries and keys share a base, with a low-rank update per map: scores split into four parts.",
    shows=("pattern", "lambda"),
    fidelity="reconstructed",
)
language_model(
    name="dual-attention",
    title="Dual attention transformer",
    paper="dat-relational",
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(
                n_heads=4,
                position="rope",
                project=SymbolValuesConfig(heads=2, symbols=7),
                mix=RelationsConfig(heads=2, relations=3, d_relation=5),
            ),
            GELU,
        )
    },
    description="Half of the heads carry what tokens are, half how they relate: relations, symbols and both shares of z are hook points.",
    shows=("pattern", "relations"),
)
language_model(
    name="ngram-heads",
    title="Transformer with n-gram heads",
    paper="icll-ngram-heads",
    family="attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=3, position="rope"),
                AttentionConfig(
                    n_heads=3,
                    position="none",
                    project=ValuesOnlyConfig(),
                    score=NGramConfig(orders=(0, 1, 2)),
                    normalise=EmptyRowsConfig(),
                ),
            ),
            GELU,
        )
    },
    description="Layers of heads that read what followed earlier occurrences of the last n tokens, between ordinary layers.",
)
language_model(
    name="neural-attention",
    title="Neural attention",
    paper="neural-attention",
    family="attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, score=PairScoreConfig(d_pair=6)),
                AttentionConfig(n_heads=4),
                AttentionConfig(n_heads=4),
            ),
            GELU,
        )
    },
    description="In the first layer a small network scores every pair of query and key; its units are hook points.",
)
language_model(
    name="optimised-attention",
    title="Optimised attention",
    paper="pay-better-attention",
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4, bias=("query", "key", "output"), project=SliceConfig()), GELU)},
    description="No value projection: every head reads its slice of the stream.",
)
language_model(
    name="bird-eye",
    title="Bird-Eye transformer",
    paper="bird-eye-transformer",
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4, position="rope", reweight=ImportanceConfig()), GELU)},
    description="Tokens have an importance of their own, by which every row is weighed again.",
    shows=("pattern", "importance"),
    fidelity="reconstructed",
)
language_model(
    name="gated-sinks",
    title="Transformer with sinks and output gates",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=4, position="rope", bias=False, normalise=SinkConfig(), post=OutputGateConfig()),
            GLU,
            norm="rms",
        )
    },
    description="A learned logit per head lets rows read nothing (as in gpt-oss), and a gate scales what heads write.",
)
