"""HRM-Text (Sapient 2026): the Hierarchical Reasoning Model as a language model."""

from models.architectures.shared import GLU, language_model
from models.attention.gates import OutputGateConfig
from models.attention.site import AttentionConfig
from models.depth.hierarchical_text import HierarchicalTextConfig
from models.language_model import LanguageModelConfig

language_model(
    name="hrm-text",
    title="HRM-Text",
    paper=None,
    family="depth",
    presets={
        "tiny": LanguageModelConfig(
            3,
            24,
            mixer=AttentionConfig(4, position="rope", bias=False, post=OutputGateConfig()),
            mlp=GLU,
            norm="rms",
            embed_scale=50.0,
            wiring=HierarchicalTextConfig(low=1, cycles=2, steps=2),
        )
    },
    description="A fast and a slow stack of gated attention in turns, the slow one beginning with the embedding; norms before blocks.",
    shows=("pattern", "low state", "high state"),
    notes="The published norms have no weights, those of the blocks and of the end here are 1 in converted checkpoints.",
)
