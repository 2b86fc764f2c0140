"""Mamba-2 (Dao & Gu 2024)."""

from models.architectures.shared import language_model, tiny
from models.language_model import LanguageModelConfig
from models.recurrent.mamba2 import Mamba2Config

language_model(
    name="mamba2",
    title="Mamba-2",
    paper=None,
    family="state-space",
    presets={
        "tiny": tiny(Mamba2Config(d_state=6, d_head=8, n_groups=2), None, norm="rms"),
        "demo": LanguageModelConfig(6, 128, 256, None, Mamba2Config(d_state=32, d_head=32), None, norm="rms"),
    },
    description="State-space duality: every token chooses how much to forget and how much to write; exact pattern and editable state.",
    shows=("pattern", "state", "decay", "write"),
)
