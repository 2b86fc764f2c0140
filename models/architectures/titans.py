"""Titans (Behrouz, Zhong & Mirrokni 2024)."""

from typing import Any

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.titans import TitansConfig

SHOWS = ("pattern", "state", "decay", "write", "surprise")
NOTES = (
    "From the paper's equations; no official code. Gates are one number per token and head; how memory and attention are combined, and the "
    "norm and residual inside the memory, are not determined by the text. The paper's variant with memory as context (MAC) is not here."
)


def _register(name: str, title: str, description: str, **settings: Any) -> None:
    language_model(
        name=name,
        title=title,
        paper="titans",
        family="test-time-memory",
        fidelity="reconstructed",
        notes=NOTES,
        presets={
            "tiny": tiny(TitansConfig(n_heads=3, every=4, window=6, n_persistent=2, **settings), GLU, norm="rms"),
            "demo": LanguageModelConfig(
                4,
                128,
                256,
                None,
                TitansConfig(n_heads=4, **settings),
                MLPConfig(256, "silu", True, False),
                norm="rms",
            ),
        },
        description=description,
        shows=SHOWS,
    )


_register(
    "titans",
    "Titans, memory alone (LMM)",
    "A small network per head whose weights are the state: it learns each token by gradient descent, most where it is surprised.",
)
_register(
    "titans-linear",
    "Titans with a linear memory",
    "The memory is one matrix: exact pattern; without momentum and blocks it would be the gated delta rule with other names.",
    depth=1,
)
_register(
    "titans-mag",
    "Titans, memory as a gate (MAG)",
    "Sliding-window attention with persistent tokens, gated by what the memory recalls.",
    variant="gate",
)
_register(
    "titans-mal",
    "Titans, memory as a layer (MAL)",
    "Sliding-window attention with persistent tokens reads what the memory recalls.",
    variant="layer",
)
