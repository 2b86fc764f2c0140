"""Positions: trained on short rows, asked at places that they did not have.

The baseline learns one vector per place; those beyond the trained length stay what they were at the beginning.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.bam import BAMConfig
from models.attention.cope import CoPEConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import SSMaxConfig
from models.attention.t5 import T5BiasConfig
from models.language_model import LanguageModel
from models.parts.positions import randomised_positions
from models.trainings.measures import ACCURACY, BEYOND
from models.trainings.record import Better, Side, experiment
from models.trainings.shared import NOISY, attention, small
from workbench.lab.tasks import Delay, NthLatest, Task

SHORT = 25
DELAY = Delay(length=SHORT, delay=3)
BUCKETS = T5BiasConfig(buckets=16, max_distance=16)
LATEST = NthLatest(length=SHORT)
EXTRAPOLATES = Better(0.9, 0.3)


@dataclass(frozen=True)
class RandomisedPositions:
    """Hands the model ascending positions drawn from 0 … longest − 1, new ones in every call."""

    longest: int

    def wrap(self, model: LanguageModel, seed: int) -> nn.Module:
        return Randomised(model, self.longest)


class Randomised(nn.Module):
    """Draws from torch's generator in training, and always the same positions in evaluation."""

    def __init__(self, model: LanguageModel, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, vocab]."""
        generator = None if self.training else torch.Generator().manual_seed(0)
        positions = randomised_positions(tokens.shape[1], self.longest, generator, batch=tokens.shape[0])
        logits: Tensor = self.model(tokens, facts={"positions": positions})
        return logits


@dataclass(frozen=True)
class PlacedLater:
    """Trains at the beginning of a text and evaluates the same rows `by` tokens later."""

    by: int

    def wrap(self, model: LanguageModel, seed: int) -> nn.Module:
        return Later(model, self.by)


class Later(nn.Module):
    """Hands the model positions from 0 in training, from `by` in evaluation."""

    def __init__(self, model: LanguageModel, by: int) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, vocab]."""
        first = 0 if self.training else self.by
        positions = torch.arange(first, first + tokens.shape[1])[None]
        logits: Tensor = self.model(tokens, facts={"positions": positions})
        return logits


def _longer(task: Task, times: int = 4, **changes: Any) -> Task:
    return replace(task, length=times * (task.length - 1) + 1, **changes)


def _placed(name: str, paper: str, words: str, position: Any, task: Task = DELAY, **changes: Any) -> None:
    learned = Side("learned positions", small(attention(position="learned"), task.vocab_size))
    fields: dict[str, Any] = {
        "name": name, "architecture": name, "paper": paper, "task": task, "test": _longer(task), "measure": BEYOND, "rule": EXTRAPOLATES,
        "thing": "says what it read three tokens ago" if task is DELAY else "finds the latest value among noise",
        "ours": Side(words, small(attention(position=position), task.vocab_size)), "baseline": learned, "steps": 300,
    }  # fmt: skip
    experiment("positions", **{**fields, **changes})


LATER = PlacedLater(by=100)
experiment(
    "positions", name="gpt", architecture="gpt", paper="Su et al. 2021",
    thing="says what it read three tokens ago, in the same row 100 tokens later", task=DELAY,
    ours=Side("rotary positions", small(attention(position="rope"), DELAY.vocab_size), LATER),
    baseline=Side("learned positions", small(attention(position="learned"), DELAY.vocab_size), LATER),
    measure=ACCURACY, rule=Better(0.95, 0.5), steps=300,
    tried="The same row 100 tokens later is the same to rotary positions but for rounding; learned positions of places that no row "
    "had are still what they were at the beginning. That is not to answer in longer rows: in rows four times as long as the "
    "trained ones, the former task, 0.56, 0.81 and 0.69 of the answers beyond the trained length were right (learned positions "
    "0.15), which the papers on ALiBi and on T5's biases report too.",
)  # fmt: skip
_placed(
    "t5-bias", "Raffel et al. 2020", "a learned number per bucket of distances", BUCKETS,
    rate=3e-2,
    tried="With the rate of the others, 0.003, biases had not grown enough after 300 steps (0.33). With buckets up to distance 128, "
    "which short rows never use, 0.67.",
    ours=Side("a learned number per bucket of distances", small(attention(position=BUCKETS, scale=1.0), DELAY.vocab_size)),
)  # fmt: skip
_placed(
    "transformer-xl-attention",
    "Dai et al. 2019",
    "relative positions that the query reads",
    (KeyPreferenceConfig(), RelativeConfig()),
)
_placed(
    "music-transformer",
    "Huang et al. 2018",
    "a learned vector per distance up to 8",
    RelativeEmbeddingConfig(longest=8),
)
_placed("alibi", "Press et al. 2021", "linear distance biases", "alibi", LATEST)
_placed(
    "randomised-positions", "Ruoss et al. 2023", "learned positions, drawn anew from 128 in every call", "learned", LATEST,
    architecture=None, steps=600, tried="After 300 steps 0.89.",
    ours=Side(
        "learned positions, drawn anew from 128 in every call",
        small(attention(position="learned"), LATEST.vocab_size), RandomisedPositions(128),
    ),
)  # fmt: skip

THIRD = NthLatest(length=33, rank=3, density=0.4)
ROPE = Side("rotary positions", small(attention(position="rope"), THIRD.vocab_size))
_placed(
    "cope", "Golovneva et al. 2024", "positions are counts of what a head chooses", CoPEConfig(positions=8), THIRD, baseline=ROPE,
    test=_longer(THIRD, 2, density=0.1), measure=ACCURACY, rule=Better(0.8, 0.2),
    thing="finds the third latest value, however much noise lies between", steps=500,
)  # fmt: skip

_placed(
    "bam", "Bianchessi et al. 2025", "a learned prior over distances, scores that grow with the length", (SSMaxConfig(), BAMConfig()),
    NOISY, test=_longer(NOISY, 8), measure=ACCURACY, rule=Better(0.9, 0.1), 
    thing="finds six pairs in a row eight times as long, the rest noise",
    tried="The rotary baseline fails by its positions: attention without any finds the pairs too (the baseline of diff-transformer).",
    baseline=Side("rotary positions", small(attention(position="rope"), NOISY.vocab_size)),
)  # fmt: skip
