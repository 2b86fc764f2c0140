"""What an experiment is: two models, one task, one way to train both, one measured quantity, and a rule that was fixed beforehand.

Both sides are trained by `workbench.lab.training.train` with the same steps, batches, learning rate and seed. The rule turns the two
measured numbers of a seed into a verdict; it can fail, and then the table says so.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.language_model import LanguageModel, LanguageModelConfig
from workbench.discovery import import_all
from workbench.instrument.errors import suggestion
from workbench.lab.tasks import Task

SETTINGS_VERSION = 1  # raised when the way to train or measure changes, so that old results no longer count

SUBJECTS = {
    "scores": "Scores, maps and values",
    "positions": "Positions",
    "masks": "Masks and routing",
    "memory": "Memory",
    "depth": "Depth",
    "knowledge": "Knowledge",
}


class Reader(Protocol):
    """Turns a model into what is trained: a module `tokens [batch, pos] -> logits [batch, pos, vocab]`. A frozen dataclass."""

    def wrap(self, model: LanguageModel, seed: int) -> nn.Module: ...


@dataclass(frozen=True)
class Side:
    """One of the two models. `words` says what it is; `reader` stands between the model and its task, if anything does."""

    words: str
    config: LanguageModelConfig
    reader: Any = None

    def build(self, seed: int) -> nn.Module:
        """The model at the random weights of a seed."""
        model = LanguageModel(replace(self.config, seed=seed))
        return model if self.reader is None else self.reader.wrap(model, seed)

    def describe(self) -> dict[str, Any]:
        """A JSON record that identifies the model."""
        return {"config": described(self.config), "reader": described(self.reader)}


@dataclass(frozen=True)
class Measure:
    """The quantity that is compared. `of(module, experiment, seed)` computes it on held-out rows; more is better unless `less`."""

    name: str
    of: Callable[[nn.Module, "Experiment", int], float]
    less: bool = False


@dataclass(frozen=True)
class Better:
    """The architecture reaches `at_least` and is better than the baseline by `margin`."""

    at_least: float
    margin: float

    def holds(self, ours: float, baseline: float, less: bool = False) -> bool:
        if less:
            return ours <= self.at_least and baseline - ours >= self.margin
        return ours >= self.at_least and ours - baseline >= self.margin

    def in_words(self, less: bool = False) -> str:
        return f"{'≤' if less else '≥'} {self.at_least:g} and {'below' if less else 'above'} the baseline by {self.margin:g}"


@dataclass(frozen=True)
class AsGood:
    """The architecture has less of something (`saves`, which its configuration fixes) and loses at most `within` by it."""

    at_least: float
    within: float
    saves: str

    def holds(self, ours: float, baseline: float, less: bool = False) -> bool:
        if less:
            return ours <= self.at_least and ours - baseline <= self.within
        return ours >= self.at_least and baseline - ours <= self.within

    def in_words(self, less: bool = False) -> str:
        return f"{'≤' if less else '≥'} {self.at_least:g} and at most {self.within:g} worse than the baseline, with {self.saves}"


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    Args:
        name: unique. architecture: what the registry calls it (None: a method that is no architecture). paper: short citation.
        thing: what it should visibly do, one sentence. task: what both are trained on; its seed is replaced by the run's.
        ours, baseline: the two sides. measure, rule: what is compared, and what counts as doing its thing.
        test: the task that is measured on, if it is another one (longer rows, unseen objects).
        tried: what else was tried, where the rule fails.
    """

    name: str
    architecture: str | None
    paper: str
    thing: str
    task: Task
    ours: Side
    baseline: Side
    measure: Measure
    rule: Better | AsGood
    test: Task | None = None
    steps: int = 400
    batch: int = 32
    rate: float = 3e-3
    rows: int = 256  # held-out rows that are measured on
    tried: str = ""
    subject: str = ""  # of SUBJECTS: the part of the page where it stands

    @property
    def sides(self) -> dict[str, Side]:
        return {"ours": self.ours, "baseline": self.baseline}

    def training_task(self, seed: int) -> Task:
        """The training rows of a seed."""
        return replace(self.task, seed=seed)

    def test_batch(self, seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Held-out rows: tokens, loss_mask, targets [batch, pos] and the planted facts."""
        batch = replace(self.test or self.task, seed=seed).batch(self.rows, 0, "validation")
        return batch.tokens, batch.loss_mask, batch.targets, batch.metadata

    def settings(self, side: str) -> dict[str, Any]:
        """What decides a side's trained weights, besides the seed."""
        return {
            "version": SETTINGS_VERSION, "side": self.sides[side].describe(), "task": described(self.task),
            "steps": self.steps, "batch": self.batch, "rate": self.rate,
        }  # fmt: skip

    def training_key(self, side: str) -> str:
        """Short hash of `settings`: experiments that share a baseline share its training."""
        return _hash(self.settings(side))

    def identity(self) -> str:
        """Short hash of everything that decides the stored numbers and verdicts."""
        measured = {
            "measure": self.measure.name, "rule": described(self.rule), "rows": self.rows,
            "test": described(self.test),
        }  # fmt: skip
        return _hash({"sides": [self.settings(side) for side in self.sides], **measured})

    def verdict(self, ours: float, baseline: float) -> bool:
        return self.rule.holds(ours, baseline, self.measure.less)


def described(value: Any) -> Any:
    """A configuration as plain data: the class, and the fields that are not at their default, so that a setting that is added later, with
    the old behaviour as its default, changes nothing."""
    if isinstance(value, tuple):
        return [described(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    kept = {item.name: getattr(value, item.name) for item in fields(value)}
    changed = {item.name: described(kept[item.name]) for item in fields(value) if kept[item.name] != item.default}
    return {"class": type(value).__name__, **changed}


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(subject: str, **fields: Any) -> Experiment:
    """Register an experiment under a subject of the page; takes the fields of `Experiment`. Raises ValueError for a name twice and an
    unknown subject."""
    if subject not in SUBJECTS:
        raise ValueError(
            f"unknown subject {subject!r}: expected one of {', '.join(SUBJECTS)}.{suggestion(subject, SUBJECTS)}"
        )
    made = Experiment(subject=subject, **fields)
    if made.name in EXPERIMENTS:
        raise ValueError(f"an experiment named {made.name!r} is registered already")
    EXPERIMENTS[made.name] = made
    return made


def find(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError with the nearest one."""
    all_experiments()
    if name not in EXPERIMENTS:
        raise ValueError(
            f"unknown experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}.{suggestion(name, EXPERIMENTS)}"
        )
    return EXPERIMENTS[name]


def all_experiments() -> dict[str, Experiment]:
    """Every experiment by name."""
    import_all("models.trainings.experiments")
    return dict(EXPERIMENTS)


def answers(module: nn.Module, tokens: Tensor) -> Tensor:
    """What the module answers at each place, int64 [batch, pos]; place t is answered from the tokens before it, place 0 by −1."""
    module.eval()
    with torch.no_grad():
        said = module(tokens[:, :-1]).argmax(-1)
    return torch.cat([torch.full_like(said[:, :1], -1), said], dim=1)
