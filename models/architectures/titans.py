"""Titans (Behrouz, Zhong & Mirrokni 2024)."""

from typing import Any

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.neural_memory import MemoryConfig
from models.recurrent.titans import TitansConfig
from models.recurrent.titans_context import TitansContextConfig

SHOWS = ("pattern", "state", "decay", "write", "surprise")
NOTES = (
    "From the paper's equations; no official code. Gates are one number per token and head; how memory and attention are combined, and the "
    "norm and residual inside the memory, are not determined by the text."
)


CAUSAL = " As printed, a token of MAC sees what later tokens of its segment retrieve; here it sees what it and earlier ones retrieve."


def _register(
    name: str, title: str, description: str, tiny_mixer: MemoryConfig, mixer: MemoryConfig, notes: str = ""
) -> None:
    language_model(
        name=name,
        title=title,
        paper="titans",
        family="test-time-memory",
        fidelity="reconstructed",
        notes=NOTES + notes,
        presets={
            "tiny": tiny(tiny_mixer, GLU, norm="rms"),
            "demo": LanguageModelConfig(4, 128, 256, None, mixer, MLPConfig(256, "silu", True, False), norm="rms"),
        },
        description=description,
        shows=SHOWS,
    )


def _register_variant(name: str, title: str, description: str, **settings: Any) -> None:
    small = TitansConfig(n_heads=3, every=4, window=6, n_persistent=2, **settings)
    _register(name, title, description, small, TitansConfig(n_heads=4, **settings))


_register_variant(
    "titans",
    "Titans, memory alone (LMM)",
    "A small network per head whose weights are the state: it learns each token by gradient descent, most where it is surprised.",
)
_register_variant(
    "titans-linear",
    "Titans with a linear memory",
    "The memory is one matrix: exact pattern; without momentum and blocks it would be the gated delta rule with other names.",
    depth=1,
)
_register_variant(
    "titans-mag",
    "Titans, memory as a gate (MAG)",
    "Sliding-window attention with persistent tokens, gated by what the memory recalls.",
    variant="gate",
)
_register_variant(
    "titans-mal",
    "Titans, memory as a layer (MAL)",
    "Sliding-window attention with persistent tokens reads what the memory recalls.",
    variant="layer",
)
_register(
    "titans-mac",
    "Titans, memory as context (MAC)",
    "Attention within segments reads what the memory recalls at their start; the memory learns from what attention read, and gates it.",
    TitansContextConfig(n_heads=3, every=4, segment=6, n_persistent=2),
    TitansContextConfig(n_heads=4),
    CAUSAL,
)
