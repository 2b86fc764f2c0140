"""Transformers that differ in the way through their layers."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.site import AttentionConfig
from models.depth.dense import DenseFormerConfig
from models.depth.halting import ACTConfig, PonderConfig
from models.depth.hierarchical import HierarchicalConfig
from models.depth.looped import LoopedConfig
from models.language_model import LanguageModelConfig

ROPE = AttentionConfig(n_heads=4, position="rope")

language_model(
    name="denseformer",
    title="DenseFormer",
    paper="denseformer",
    family="depth",
    presets={"tiny": tiny(AttentionConfig(n_heads=4), GELU, wiring=DenseFormerConfig())},
    description="Every block reads a learned average of all earlier outputs; each edge between layers is a hook point.",
    shows=("pattern", "depth weights"),
)
language_model(
    name="universal-transformer",
    title="Universal Transformer with adaptive computation time",
    paper="universal-transformer",
    family="depth",
    presets={
        "tiny": LanguageModelConfig(
            2,
            24,
            mixer=AttentionConfig(n_heads=4, position="none"),
            mlp=GELU,
            norm_placement="after",
            wiring=ACTConfig(steps=3),
        )
    },
    description="Shared blocks repeat until a token has seen enough: halting probabilities and step weights per token and step.",
    shows=("pattern", "halting"),
    notes="Weights of states as in Graves 2016; the released code averages otherwise. Two blocks repeat here, in the paper one.",
)
language_model(
    name="palbert",
    title="PALBERT-like exits (PonderNet)",
    paper="palbert",
    family="depth",
    fidelity="reconstructed",
    presets={"tiny": LanguageModelConfig(2, 24, mixer=ROPE, mlp=GELU, wiring=PonderConfig(steps=3, width=12))},
    description="Shared blocks with an exit behind every pass: the distribution over exits of every token is a hook point.",
    shows=("pattern", "halting"),
    notes="A left-to-right model in which every token exits by itself; the paper classifies texts with ALBERT.",
)
language_model(
    name="algoformer",
    title="AlgoFormer (pre-loop-post)",
    paper="algoformer",
    family="depth",
    fidelity="reconstructed",
    presets={"tiny": tiny(ROPE, GELU, wiring=LoopedConfig(times=3, before=1, after=1))},
    description="Blocks that run once, a block that repeats, blocks that run once; every pass has an address.",
    notes="Whether the input is added again in every loop could not be read of the paper; as in the looped transformer it is.",
)
language_model(
    name="hrm",
    title="Hierarchical Reasoning Model",
    paper="hrm-perspectives",
    family="depth",
    fidelity="reconstructed",
    presets={
        "tiny": tiny(
            AttentionConfig(n_heads=4, position="rope", bias=False),
            GLU,
            norm="rms",
            norm_placement="after",
            embed_scale=24**0.5,
            wiring=HierarchicalConfig(low=1),
        )
    },
    description="A fast and a slow stack read each other's state in turns; both trajectories are hook points with steps.",
    shows=("pattern", "low state", "high state"),
    notes="Left to right, as HRM-Text; without the halting head and the carry over several passes.",
)
language_model(
    name="wide-attention",
    title="One wide layer",
    paper="wide-attention",
    family="depth",
    presets={"tiny": LanguageModelConfig(1, 24, n_ctx=64, mixer=AttentionConfig(n_heads=12, d_head=6), mlp=GELU)},
    description="One layer with as many heads of the same width as three layers of four.",
)
