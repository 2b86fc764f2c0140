"""Transformers whose maps come about in other ways: kernels, comparisons, talking heads, aligned values, layouts, times."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.comparison import AsScoredConfig, ComparisonConfig
from models.attention.digit_positions import DigitPositionConfig
from models.attention.kernel_scores import KernelScoreConfig
from models.attention.layout import LayoutScoreConfig
from models.attention.ngram import ValuesOnlyConfig
from models.attention.site import AttentionConfig
from models.attention.slices import SliceConfig
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.time_rotary import TimeRopeConfig
from models.attention.value_alignment import ValueAlignmentConfig

EFFICIENT = SliceConfig(("key", "value"))

language_model(
    name="kernelized",
    title="Kernelized Transformer",
    paper="kernelized-transformer",
    family="linear-attention",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, score=KernelScoreConfig(frequencies=9)),
                AttentionConfig(n_heads=4, score=KernelScoreConfig(spectrum="generated", frequencies=9)),
                AttentionConfig(n_heads=4, score=KernelScoreConfig("fourier", frequencies=9)),
            ),
            GELU,
        )
    },
    description="Linear attention whose kernel is learned by its frequencies; the map over tokens is formed, so that it can be read.",
    shows=("pattern", "frequencies"),
    notes="Noise is drawn once; FastFood, full covariances and the batch norm of the released generator are left out.",
)
language_model(
    name="comateformer",
    title="Comateformer (combined attention)",
    paper="comateformer",
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4, score=ComparisonConfig(), normalise=AsScoredConfig()), GELU),
    },
    description="A map of likeness between −1 and 1 times a map of closeness, without softmax; both maps are hook points.",
    shows=("pattern", "match", "closeness"),
    notes="From a description in words; whole layers instead of a share of heads.",
)
language_model(
    name="talking-heads",
    title="Talking-heads attention",
    paper=None,
    family="attention",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=4, position=("rope", TalkingScoresConfig()), reweight=TalkingWeightsConfig()),
            GELU,
            init_std=0.05,
        )
    },
    description="Heads mix their scores before the softmax and their maps behind it.",
)
language_model(
    name="efficient-attention",
    title="Efficient attention (Hosseini & Hosseini)",
    paper="pay-better-attention",
    family="attention",
    presets={"tiny": tiny(AttentionConfig(n_heads=4, bias=("query", "output"), project=EFFICIENT), GELU)},
    description="No projections of keys and values: every head reads its slice of the stream.",
)
language_model(
    name="super-attention",
    title="Super attention",
    paper="pay-better-attention",
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            AttentionConfig(
                n_heads=4, bias=("query", "output"), project=EFFICIENT, reweight=ValueAlignmentConfig(length=64)
            ),
            GELU,
        )
    },
    description="Efficient attention whose values are mixed over places first: softmax map, alignment and their product are hook points.",
    shows=("pattern", "alignment"),
    notes="Lower triangular, so that it can be a language model; one alignment per layer.",
)
language_model(
    name="skim-attention",
    title="Skim-Attention (one map from the layout)",
    paper="skim-attention",
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            AttentionConfig(
                n_heads=4, position="none", project=ValuesOnlyConfig(), score=LayoutScoreConfig(grid=64, width=10)
            ),
            GELU,
        )
    },
    description="Who reads whom follows from where tokens stand on a page, one map for all layers; a text without layout is one line.",
    shows=("pattern", "layout scores"),
    notes="Left to right; the paper's model is an encoder that also predicts masked tokens.",
)
language_model(
    name="time-rope",
    title="Transformer with rotations by place and time",
    paper=None,
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, position=TimeRopeConfig("pairs", base=100.0)),
                AttentionConfig(n_heads=4, n_key_value_heads=2, position=TimeRopeConfig("heads", base=100.0)),
                AttentionConfig(n_heads=4, position=TimeRopeConfig("sum", time_base=100.0)),
            ),
            GLU,
            norm="rms",
        )
    },
    description="Rotary positions of which a part turns with the time of a token (a fact of the call), as recommenders use them.",
)
language_model(
    name="seqpe",
    title="SeqPE (positions read digit by digit)",
    paper="seqpe",
    family="attention",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            AttentionConfig(
                n_heads=4, position=DigitPositionConfig(digits=3, base=5, width=10, heads=2, layers=2), bias=False
            ),
            GELU,
        )
    },
    description="A small transformer reads the digits of a position; codes of two positions are matched, a term of every score.",
    shows=("pattern", "position bias", "position code"),
    notes="Architecture and use of the codes as in the released code; the losses that shape them in training are not here.",
)
