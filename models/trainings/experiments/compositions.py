"""Further compositions of the attention site: other maps, values, places and memories."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.comparison import AsScoredConfig, ComparisonConfig
from models.attention.compressive import compressive_mixer
from models.attention.digit_positions import DigitPositionConfig
from models.attention.layout import LayoutScoreConfig
from models.attention.ngram import ValuesOnlyConfig
from models.attention.slices import SliceConfig
from models.attention.slot_memory import SlotMemoryConfig
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.time_rotary import TimeRopeConfig
from models.attention.transformer_xl import RecentSegmentsConfig
from models.attention.value_alignment import ValueAlignmentConfig
from models.language_model import LanguageModel
from models.trainings.experiments.memory import SEGMENT, TASK
from models.trainings.experiments.positions import DELAY
from models.trainings.experiments.scores import plain
from models.trainings.measures import ACCURACY
from models.trainings.record import AsGood, Better, Side, experiment
from models.trainings.shared import HEADS, NOISY, WIDTH, attention, lookup, small
from workbench.lab.tasks import Counting

COUNTING = Counting(vocab_size=12, length=25, limit=3, density=0.1)
EFFICIENT: dict[str, Any] = {"project": SliceConfig(("key", "value")), "bias": ("query", "output")}


@dataclass(frozen=True)
class ByTheClock:
    """Says when every token was, steadily, and of no token where: all places are 0."""

    def wrap(self, model: LanguageModel, seed: int) -> nn.Module:
        return Clocked(model)


class Clocked(nn.Module):
    """The times are a fact of the call where the model asks for them."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.timed = any(type(part.config) is TimeRopeConfig for mixer in model.mixers for part in mixer.parts)  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, vocab]."""
        steps = torch.arange(tokens.shape[1])[None]
        facts = {"positions": torch.zeros_like(steps)} | ({"times": 2.5 * steps} if self.timed else {})
        logits: Tensor = self.model(tokens, facts=facts)
        return logits


experiment(
    "scores", name="comateformer", architecture="comateformer", paper="Comateformer 2024", task=COUNTING,
    thing="counts: weights that do not compete add up",
    ours=plain("likeness times closeness, no softmax", 12, score=ComparisonConfig(), normalise=AsScoredConfig()),
    baseline=plain("softmax attention", 12), measure=ACCURACY, rule=Better(0.85, 0.1),
)  # fmt: skip
experiment(
    "scores", name="talking-heads", architecture="talking-heads", paper="Shazeer et al. 2020", task=NOISY, steps=300,
    thing="matches 24 heads of two numbers each with what other heads say",
    ours=plain(
        "24 heads of width 2 that mix their scores and maps", 64,
        n_heads=24, d_head=2, position=TalkingScoresConfig(), reweight=TalkingWeightsConfig(),
    ),
    baseline=plain("24 heads of width 2", 64, n_heads=24, d_head=2), measure=ACCURACY, rule=Better(0.9, 0.1),
    tried="Heads as narrow as this find the pairs by themselves too, so there is nothing left to gain from talking.",
)  # fmt: skip
experiment(
    "scores", name="efficient-attention", architecture="efficient-attention", paper="Hosseini & Hosseini 2024", task=NOISY, steps=300,
    thing="answers as well with no maps of keys and values", ours=plain("keys and values are slices of the stream", 64, **EFFICIENT),
    baseline=plain("four heads with keys and values of their own", 64), measure=ACCURACY,
    rule=AsGood(0.95, 0.02, "no maps of keys and values"),
)  # fmt: skip
experiment(
    "scores", name="super-attention", architecture="super-attention", paper="Hosseini & Hosseini 2024", task=DELAY, steps=300,
    thing="says what it read three tokens ago, by values that move over places",
    ours=plain("values mixed over places, no positions else", 8, **EFFICIENT, reweight=ValueAlignmentConfig(DELAY.length)),
    baseline=plain("efficient attention, no positions", 8, **EFFICIENT), measure=ACCURACY, rule=Better(0.9, 0.3),
)  # fmt: skip
experiment(
    "positions", name="skim-attention", architecture="skim-attention", paper="Nguyen et al. 2021", task=DELAY, steps=300,
    thing="says what it read three tokens ago, by a map that words do not change",
    ours=plain("one map from the layout", 8, project=ValuesOnlyConfig(), score=LayoutScoreConfig(1, grid=32, width=WIDTH)),
    baseline=plain("learned positions, a map per text", 8, position="learned"), measure=ACCURACY,
    rule=AsGood(0.95, 0.02, "a map that words do not change"),
)  # fmt: skip
experiment(
    "positions", name="time-rope", architecture="time-rope", paper="TO-RoPE 2025, SynerGen 2025", task=DELAY, steps=300,
    thing="says what it read three tokens ago where the clock alone tells when that was",
    ours=Side("half of the pairs turned by time", small(attention(position=TimeRopeConfig("pairs", unit=2.5)), 8), ByTheClock()),
    baseline=Side("rotary positions", small(attention(position="rope"), 8), ByTheClock()), measure=ACCURACY, rule=Better(0.9, 0.3),
    tried="With time turning the slow half of all pairs, not pairs of its own from fast to slow, 0.49 (seed 0).",
)  # fmt: skip
experiment(
    "positions", name="seqpe", architecture="seqpe", paper="Li et al. 2025", task=DELAY, steps=300,
    thing="says what it read three tokens ago, by the digits of places",
    ours=plain("places read digit by digit, base 4", 8, position=DigitPositionConfig(3, 4, width=24, heads=2, layers=1)),
    baseline=plain("no positions", 8), measure=ACCURACY, rule=Better(0.9, 0.3),
)  # fmt: skip
experiment(
    "memory", name="compressive-transformer", architecture="compressive-transformer", paper="Rae et al. 2019", task=TASK,
    thing="answers from what was read three segments ago, through slots of two tokens",
    ours=Side(
        "segments of 8, 8 tokens before them, 8 slots of 2 tokens before these",
        small(compressive_mixer(HEADS, SEGMENT, memory=SEGMENT, slots=8, rate=2, learned=True), TASK.vocab_size, 2),
    ),
    baseline=Side(
        "the same without slots", small(compressive_mixer(HEADS, SEGMENT, memory=SEGMENT, slots=0, rate=2), TASK.vocab_size, 2)
    ),
    measure=ACCURACY, rule=Better(0.9, 0.3),
)  # fmt: skip
_ALONE: dict[str, Any] = {"position": "rope", "mask": RecentSegmentsConfig(SEGMENT, 0)}
experiment(
    "memory", name="memformer", architecture="memformer", paper="Wu et al. 2020",
    task=lookup(length=2 * SEGMENT + 1, queries=SEGMENT, items=3),
    thing="answers from what the segment before wrote into slots",
    ours=Side(
        "segments of 8 that read nothing else but 8 slots",
        small(attention(**_ALONE, mix=SlotMemoryConfig(8, SEGMENT)), TASK.vocab_size, 2),
    ),
    baseline=Side("the same segments without slots", small(attention(**_ALONE), TASK.vocab_size, 2)),
    measure=ACCURACY, rule=Better(0.9, 0.5),
    tried="Over more segments, each of which writes all slots anew, it has not learned this in 400 steps: six pairs from three segments "
    "ago 0.17 (seed 0), three pairs from two segments ago 0.54, after 800 steps 0.69 (seed 100, temperature 1).",
)  # fmt: skip
