"""Mamba (Gu & Dao 2023), Falcon Mamba's variant, and Samba (Ren et al. 2024), Mamba alternating with sliding-window attention."""

from models.architectures.shared import GLU, language_model, tiny
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.mamba import MambaConfig

language_model(
    name="mamba",
    title="Mamba",
    paper="mamba",
    family="state-space",
    presets={
        "tiny": tiny(MambaConfig(d_state=5, dt_rank=7, n_heads=3), None, norm="rms"),
        "demo": LanguageModelConfig(6, 128, 256, None, MambaConfig(), None, norm="rms"),
    },
    description="Every channel keeps a small memory with its own clock; exact patterns per channel, their mean per group, editable state.",
    shows=("pattern", "state", "step"),
)
language_model(
    name="falcon-mamba",
    title="Falcon Mamba",
    paper=None,
    family="state-space",
    presets={"tiny": tiny(MambaConfig(d_state=5, dt_rank=7, n_heads=3, norm_factors=True), None, norm="rms")},
    description="Mamba with step sizes, B and C divided by their root mean square, which keeps training stable.",
    shows=("pattern", "state", "step"),
)
language_model(
    name="samba",
    title="Samba",
    paper="samba",
    family="hybrid",
    presets={
        "tiny": tiny(
            (
                MambaConfig(d_state=5, dt_rank=7, n_heads=4),
                AttentionConfig(n_heads=4, position="rope", bias=False, window=6),
            ),
            GLU,
            norm="rms",
        ),
        "demo": LanguageModelConfig(
            4,
            128,
            256,
            None,
            (MambaConfig(), AttentionConfig(4, position="rope", bias=False, window=64)),
            MLPConfig(352, "silu", True, False),
            norm="rms",
        ),
    },
    description="Mamba for the whole past and sliding-window attention for the last tokens, layer by layer, each followed by an MLP.",
    shows=("pattern", "state", "step"),
)
