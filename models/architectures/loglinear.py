"""Log-linear attention (Guo et al. 2025) over Mamba-2 and over Gated DeltaNet."""

from models.architectures.shared import language_model, tiny
from models.language_model import LanguageModelConfig
from models.recurrent.log_linear import LogLinearMamba2Config

language_model(
    name="loglinear-mamba2",
    title="Log-linear Mamba-2",
    paper="log-linear-attention",
    family="state-space",
    presets={
        "tiny": tiny(LogLinearMamba2Config(d_state=6, d_head=8, n_groups=2, n_levels=5), None, norm="rms"),
        "demo": LanguageModelConfig(
            6, 128, 256, None, LogLinearMamba2Config(d_state=32, d_head=32, n_levels=12), None, norm="rms"
        ),
    },
    description="Mamba-2 with one state per level of a Fenwick tree over the past: every token weighs how far back it reads.",
    shows=("pattern", "state", "decay", "write", "level"),
)
