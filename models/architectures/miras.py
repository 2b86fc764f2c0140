"""Moneta, Yaad and Memora (Behrouz et al. 2025)."""

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.miras import MirasConfig

MAKERS = {
    "moneta": (
        MirasConfig.moneta,
        "Moneta",
        "A test-time memory with a cubic loss, whose weights are normalised by their own 4-norm.",
    ),
    "yaad": (
        MirasConfig.yaad,
        "Yaad",
        "A test-time memory with a Huber loss: tokens that surprise too much write no more than their share.",
    ),
    "memora": (
        MirasConfig.memora,
        "Memora",
        "A test-time memory whose weights are distributions: it forgets by relative entropy.",
    ),
}
for name, (make, title, description) in MAKERS.items():
    language_model(
        name=name,
        title=f"{title} (Miras)",
        paper="miras",
        family="test-time-memory",
        fidelity="reconstructed",
        notes="From the paper's equations, which leave choices open; they are listed in models/recurrent/miras.py.",
        presets={
            "tiny": tiny(make(3, expansion=2, every=4), GLU, norm="rms"),
            "demo": LanguageModelConfig(4, 128, 256, None, make(4), MLPConfig(256, "silu", True, False), norm="rms"),
        },
        description=description,
        shows=("pattern", "state", "decay", "write", "surprise"),
    )
