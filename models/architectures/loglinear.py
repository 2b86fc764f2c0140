"""Log-linear attention (Guo et al. 2025) over Mamba-2 and over Gated DeltaNet."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.log_linear import LogLinearDeltaConfig, LogLinearMamba2Config

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
language_model(
    name="loglinear-gdn",
    title="Log-linear Gated DeltaNet",
    paper="log-linear-attention",
    family="linear-attention",
    presets={
        "tiny": tiny(LogLinearDeltaConfig(3, 5, 8, decay="scalar", gate="silu", n_levels=5), GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4,
            128,
            256,
            None,
            LogLinearDeltaConfig(4, 32, 32, decay="scalar", gate="silu", n_levels=12),
            MLPConfig(256, "silu", True, False),
            norm="rms",
        ),
    },
    description="Gated DeltaNet with one state per level of a Fenwick tree over the past: the delta rule at every distance at once.",
    shows=("pattern", "state", "decay", "write", "level"),
)
