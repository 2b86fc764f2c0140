"""Memory: what was said segments ago. The pairs fill the first segment, noise the second and third, questions the last.

The baseline reads with a window of one segment; with two layers it reaches two segments back, not three.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from models.attention.infini import InfiniConfig
from models.attention.landmark import LandmarkConfig
from models.attention.memory_slots import MemorySlotsConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.language_model import LanguageModel
from models.memory_tokens import RecurrentMemory
from models.trainings.measures import ACCURACY
from models.trainings.record import Better, Side, experiment
from models.trainings.shared import HEADS, attention, lookup, small

SEGMENT = 8
TASK = lookup(length=4 * SEGMENT + 1, queries=SEGMENT)
WINDOW = Side(f"sliding window of {SEGMENT}", small(attention(position="rope", window=SEGMENT), TASK.vocab_size, 2))
REMEMBERS = Better(0.9, 0.5)


@dataclass(frozen=True)
class WithMemory:
    """The same configuration as a model that keeps a memory. It is trained through all segments of a row."""

    def wrap(self, model: LanguageModel, seed: int) -> nn.Module:
        return RecurrentMemory(model.config)


def _remembering(name: str, paper: str, words: str, mixer: Any, reader: Any = None, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "name": name, "architecture": name, "paper": paper, "task": TASK, "baseline": WINDOW, "measure": ACCURACY, "rule": REMEMBERS,
        "thing": "answers from what was read three segments ago", "ours": Side(words, small(mixer, TASK.vocab_size, 2), reader),
    }  # fmt: skip
    experiment("memory", **{**fields, **changes})


_remembering(
    "transformer-xl", "Dai et al. 2019", "segments of 8, hidden states of 24 tokens before",
    TransformerXLConfig(n_heads=HEADS, mask=RecentSegmentsConfig(SEGMENT, 3 * SEGMENT)),
)  # fmt: skip
for _update in ("linear", "delta"):
    _remembering(
        "infini" if _update == "linear" else "infini-delta", "Munkhdalai et al. 2024", f"segments of 8, a matrix, {_update} update",
        InfiniConfig(n_heads=HEADS, segment=SEGMENT, update=_update),
    )  # fmt: skip
_remembering(
    "landmark", "Mohtashami & Jaggi 2023", "blocks of 8 with a landmark each, all blocks in the first layer, the best one in the second",
    tuple(attention(position="rope", normalise=LandmarkConfig(SEGMENT - 1, retrieve)) for retrieve in (None, 1)),
)  # fmt: skip
_remembering(
    "recurrent-memory", "Bulatov et al. 2022", "segments of 8 with 4 memory tokens",
    MemorySlotsConfig(n_heads=HEADS, slots=4, segment=SEGMENT), WithMemory(),
    task=lookup(length=4 * SEGMENT + 1, queries=SEGMENT, items=3),
    steps=500,
    tried="With six pairs, written into four memory tokens and handed on three times before any answer is right: 0.43 after 400 "
    "steps (seed 100), 0.38 after 1000 (seed 0).",
)  # fmt: skip
