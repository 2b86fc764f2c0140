"""GateLoop (Katsch 2023)."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.gateloop import GateLoopConfig

language_model(
    name="gateloop",
    title="GateLoop",
    paper="gateloop",
    family="linear-attention",
    presets={
        "tiny": tiny(GateLoopConfig(n_heads=3, d_head=5), GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4, 128, 256, None, GateLoopConfig(128), MLPConfig(352, "silu", True, False), norm="rms"
        ),
    },
    description="Linear recurrence with a complex decay: every token chooses how much of the memory stays and how far it turns.",
    shows=("pattern", "state", "decay", "phase"),
    fidelity="reconstructed",
)
