"""RetNet (Sun et al. 2023)."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.retention import RetentionConfig

language_model(
    name="retnet",
    title="RetNet",
    paper="retnet",
    family="linear-attention",
    presets={
        "tiny": tiny(RetentionConfig(n_heads=3), GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4, 128, 256, None, RetentionConfig(4), MLPConfig(256, "gelu", True, False), norm="rms"
        ),
    },
    description="Retention: linear attention whose memory fades at a fixed rate per head; exact effective pattern and editable state.",
    shows=("pattern", "state"),
)
