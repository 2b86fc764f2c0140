"""ParaGRU and ParaLSTM (ParaRNN, Danieli et al. 2025)."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.para import ParaRNNConfig

for cell in ("gru", "lstm"):
    language_model(
        name=f"para{cell}",
        title=f"Para{cell.upper()}",
        paper="pararnn",
        family="recurrent",
        presets={
            "tiny": tiny(ParaRNNConfig(cell, n_heads=3, slowness=(-1.0, 1.0)), GLU, norm="rms"),
            "demo": LanguageModelConfig(
                4, 128, 256, None, ParaRNNConfig(cell, n_heads=4), MLPConfig(352, "silu", True, False), norm="rms"
            ),
        },
        description="Nonlinear cells with one recurrent weight per unit, solved for all tokens at once by Newton's method.",
        shows=("pattern", "state", "gate", "residual"),
        notes="The published block also scales each residual stream by a learned number; here it is 1.",
    )
