"""Synthetic sequence tasks with planted truth: which token must be read to predict which.

A task makes batches `(tokens, loss_mask, metadata)`, all indexed [batch, pos]:

    tokens      int64   ids 0 … vocab_size − 1
    loss_mask   bool    True where the token can be predicted from the tokens before it
    metadata    dict    planted truth; `metadata["source"]` int64 holds, where loss_mask is True, the position of the
                        earlier token that must be found to predict this one, and −1 elsewhere

Token t is predicted at position t − 1, so in an attention map the planted edge runs from query t − 1 to source[t].
A batch is a pure function of (task, batch size, step, split); training and validation draw from different streams.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from workbench.instrument.errors import suggestion

_STREAMS = {"train": 0, "validation": 1}


class TaskBatch(NamedTuple):
    """One batch of a task; see the module's docstring."""

    tokens: Tensor  # int64 [batch, pos]
    loss_mask: Tensor  # bool [batch, pos]
    metadata: dict[str, Tensor]  # int64 [batch, pos] or [batch]


class Row(NamedTuple):
    """One sequence: its tokens, the planted source of each (−1 where there is none), and further planted facts."""

    tokens: NDArray[np.int64]  # [pos]
    source: NDArray[np.int64]  # [pos]
    facts: dict[str, Any]  # int64 [pos] or int


@dataclass(frozen=True)
class Task(ABC):
    """What all tasks share: sizes, the seed, and batches made of rows."""

    vocab_size: int = 64
    length: int = 96  # tokens per sequence
    seed: int = 0

    name: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        self._require(self.vocab_size >= 4, f"vocab_size must be at least 4, got {self.vocab_size}")
        self._require(self.length >= 8, f"length must be at least 8, got {self.length}")
        self._require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        self._settle()

    @abstractmethod
    def _settle(self) -> None:
        """Fill the settings left at None and check them all."""

    @abstractmethod
    def row(self, random: Generator) -> Row:
        """One sequence."""

    @property
    @abstractmethod
    def chance_loss(self) -> float:
        """Loss in nats of guessing uniformly among the tokens that an answer can be."""

    def batch(self, batch_size: int, step: int = 0, split: str = "train") -> TaskBatch:
        """The batch of a step (from 0): the same one whenever it is asked for.

        Raises ValueError for a split other than "train" and "validation", or sizes out of range.
        """
        if split not in _STREAMS:
            raise ValueError(f"unknown split {split!r}: expected 'train' or 'validation'.{suggestion(split, _STREAMS)}")
        if batch_size < 1 or step < 0:
            raise ValueError(f"batch_size must be at least 1 and step at least 0, got {batch_size} and {step}")
        random = np.random.default_rng([self.seed, _STREAMS[split], step])
        rows = [self.row(random) for _ in range(batch_size)]
        tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
        source = torch.from_numpy(np.stack([row.source for row in rows]))
        facts = {name: torch.from_numpy(np.stack([row.facts[name] for row in rows])) for name in rows[0].facts}
        return TaskBatch(tokens, source >= 0, {"source": source, **facts})

    def batches(self, batch_size: int, split: str = "train") -> Iterator[TaskBatch]:
        """The batches of steps 0, 1, 2 …, without end."""
        step = 0
        while True:
            yield self.batch(batch_size, step, split)
            step += 1

    def describe(self) -> dict[str, Any]:
        """Name and settings: `make_task(**task.describe())` makes the same task again."""
        return {"name": self.name, **asdict(self)}

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"task {self.name!r}: {message}")

    def _default(self, setting: str, value: int) -> None:
        if getattr(self, setting) is None:
            object.__setattr__(self, setting, value)  # once, while the frozen object is being made


@dataclass(frozen=True)
class Copy(Task):
    """Repeat a span of random tokens after a marker.

    A row is `filler … START x_1 … x_n COPY x_1 … x_n`, with n uniform in min_span … max_span and as much filler as
    fills the row. START is id vocab_size − 2 and COPY is vocab_size − 1; x and filler are drawn uniformly, with
    repetition, from the other ids. The n tokens after COPY are predictable; the source of token t is t − n − 1.
    Facts: `span` [batch] = n. Since n varies, no fixed distance solves the task.
    """

    min_span: int | None = None  # default: half of max_span
    max_span: int | None = None  # default: as long as fits

    name: ClassVar[str] = "copy"
    paper: ClassVar[str] = "Graves, Wayne & Danihelka 2014, Neural Turing Machines, arXiv:1410.5401"

    def _settle(self) -> None:
        fits = (self.length - 2) // 2
        self._default("max_span", fits)
        self._default("min_span", max(1, (self.max_span or 0) // 2))
        low, high = self._range()
        self._require(1 <= low <= high <= fits, f"needs 1 ≤ min_span ≤ max_span ≤ {fits}, got {low} and {high}")

    def _range(self) -> tuple[int, int]:
        assert self.min_span is not None and self.max_span is not None
        return self.min_span, self.max_span

    def row(self, random: Generator) -> Row:
        low, high = self._range()
        span = int(random.integers(low, high, endpoint=True))
        content = random.integers(self.vocab_size - 2, size=span)
        filler = random.integers(self.vocab_size - 2, size=self.length - 2 - 2 * span)
        tokens = np.concatenate([filler, [self.vocab_size - 2], content, [self.vocab_size - 1], content])
        source = np.full(self.length, -1)
        source[-span:] = np.arange(len(filler) + 1, len(filler) + 1 + span)
        return Row(tokens, source, {"span": span})

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size - 2)


@dataclass(frozen=True)
class Induction(Task):
    """A random segment that repeats: after `A B … A` comes `B`.

    A row is a prefix of random tokens, then a segment of P different tokens repeated to the end of the row (the last
    copy is cut off). P is uniform in min_period … max_period, the prefix length uniform in 0 … max_prefix, both drawn
    anew for every row: at one fixed period a head that looks back a constant distance passes for an induction head.
    No prefix token is in the segment, so the previous occurrence of a token is never ambiguous. Predictable is every
    token t whose predecessor has occurred before, that is from the second token of the second copy; source[t] is the
    position right after the latest earlier occurrence of token t − 1, which is t − P.

    Options: `period` fixes P (and shows the confound). `shuffled=True` is the control: every copy after the first is a
    fresh permutation of the segment, so token counts and repetition stay and induction gives nothing; loss_mask and
    source stay where induction would look, although the token there is no longer the answer.
    Facts: `period` and `prefix` [batch]; `control_source` [batch, pos], a shuffled offset for scoring heads: like
    source, but at a distance drawn from the same range that is no multiple of P (−1 where it would lie before the
    row).
    """

    period: int | None = None
    min_period: int | None = None  # default: length // 12, at least 2
    max_period: int | None = None  # default: length // 3
    max_prefix: int | None = None  # default: length // 6
    shuffled: bool = False

    name: ClassVar[str] = "induction"
    paper: ClassVar[str] = "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv:2209.11895"

    def _settle(self) -> None:
        if self.period is not None:
            given = self.min_period is None and self.max_period is None
            same = self.min_period == self.max_period == self.period
            self._require(given or same, "give either period, or min_period and max_period")
            self._default("min_period", self.period)
            self._default("max_period", self.period)
        self._default("min_period", max(2, self.length // 12))
        self._default("max_period", max(2, min(self.length // 3, self.vocab_size - 1)))
        self._default("max_prefix", self.length // 6)
        low, high, prefix = self._range()
        self._require(2 <= low <= high, f"needs 2 ≤ min_period ≤ max_period, got {low} and {high}")
        self._require(prefix >= 0, f"max_prefix must not be negative, got {prefix}")
        self._require(high < self.vocab_size, f"a period of {high} needs vocab_size > {high}, got {self.vocab_size}")
        needed = prefix + high + 2
        self._require(
            needed <= self.length, f"max_prefix {prefix} and period {high} need length ≥ {needed}, got {self.length}"
        )

    def _range(self) -> tuple[int, int, int]:
        assert self.min_period is not None and self.max_period is not None and self.max_prefix is not None
        return self.min_period, self.max_period, self.max_prefix

    def row(self, random: Generator) -> Row:
        low, high, max_prefix = self._range()
        period = int(random.integers(low, high, endpoint=True))
        prefix = int(random.integers(max_prefix, endpoint=True))
        shuffled_ids = random.permutation(self.vocab_size)
        segment, others = shuffled_ids[:period], shuffled_ids[period:]
        copies = -(-(self.length - prefix) // period)
        later = [random.permutation(segment) if self.shuffled else segment for _ in range(copies - 1)]
        tokens = np.concatenate([random.choice(others, size=prefix), segment, *later])[: self.length]
        source = np.full(self.length, -1)
        for t in range(prefix + period + 1, self.length):
            source[t] = np.flatnonzero(tokens[: t - 1] == tokens[t - 1])[-1] + 1
        wrong = [distance for distance in self._control_distances(low, high) if distance % period]
        control = np.arange(self.length) - (random.choice(wrong) if wrong else self.length)
        control_source = np.where(source >= 0, np.maximum(control, -1), -1)
        return Row(tokens, source, {"period": period, "prefix": prefix, "control_source": control_source})

    def _control_distances(self, low: int, high: int) -> range:
        return range(low, high + 1) if low < high else range(1, 2 * high)

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size)


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall: key–value pairs, then several keys again, each answered by its value.

    Keys are the ids below vocab_size // 2, values the others. A row begins with `pairs` pairs `k v` of different random
    keys and random values. The rest is cut into slots of two tokens; `queries` of the slots, chosen without repetition
    with probability proportional to (slot + 1)^(power − 1), hold a queried key and its value, each key at most once;
    the other slots hold keys that the row does not use. Predictable are the values of the queries; source[t] is the
    position of that value in its pair. Facts: `key_source` [batch, pos], the position of the key in its pair, −1
    elsewhere.

    As in the paper but for two things: the answer stands in the sequence after its query, since all tasks here
    predict the next token, and filler is never a key of the row, so that no query is ambiguous.
    """

    pairs: int | None = None  # default: length // 8
    queries: int | None = None  # default: as many as pairs
    power: float = 0.01

    name: ClassVar[str] = "associative_recall"
    paper: ClassVar[str] = "Arora et al. 2023, Zoology, arXiv:2312.04927 (MQAR)"

    def _settle(self) -> None:
        self._default("pairs", min(max(1, self.length // 8), self.vocab_size // 2 - 1))
        assert self.pairs is not None
        self._default("queries", self.pairs)
        pairs, queries = self._sizes()
        keys = self.vocab_size // 2
        self._require(1 <= queries <= pairs, f"needs 1 ≤ queries ≤ pairs, got {queries} and {pairs}")
        self._require(
            pairs < keys, f"{pairs} pairs need more than {pairs} keys; vocab_size {self.vocab_size} has {keys}"
        )
        needed = 2 * pairs + 2 * queries
        self._require(
            needed <= self.length, f"{pairs} pairs and {queries} queries need length ≥ {needed}, got {self.length}"
        )
        self._require(self.power > 0, f"power must be positive, got {self.power}")

    def _sizes(self) -> tuple[int, int]:
        assert self.pairs is not None and self.queries is not None
        return self.pairs, self.queries

    def row(self, random: Generator) -> Row:
        pairs, queries = self._sizes()
        first_value = self.vocab_size // 2
        ids = random.permutation(first_value)
        keys, unused = ids[:pairs], ids[pairs:]
        values = random.integers(first_value, self.vocab_size, size=pairs)
        tokens = random.choice(unused, size=self.length)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        slots = (self.length - 2 * pairs) // 2
        weights = np.arange(1, slots + 1) ** (self.power - 1)
        chosen = random.choice(slots, size=queries, replace=False, p=weights / weights.sum())
        queried = random.permutation(pairs)[:queries]
        at = 2 * pairs + 2 * chosen
        tokens[at], tokens[at + 1] = keys[queried], values[queried]
        source, key_source = np.full(self.length, -1), np.full(self.length, -1)
        source[at + 1], key_source[at + 1] = 2 * queried + 1, 2 * queried
        return Row(tokens, source, {"key_source": key_source})

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size - self.vocab_size // 2)


_TASKS: dict[str, type[Task]] = {task.name: task for task in (Copy, Induction, AssociativeRecall)}


@dataclass(frozen=True)
class TaskRecord:
    """One line of `list_tasks()`; `options` are the settings with their defaults (None = chosen from the length)."""

    name: str
    description: str
    paper: str
    options: dict[str, Any]


def list_tasks() -> list[TaskRecord]:
    """Every task, what it is, where it comes from, and its settings."""
    return [
        TaskRecord(
            name, (task.__doc__ or "").split("\n")[0], task.paper, {item.name: item.default for item in fields(task)}
        )
        for name, task in _TASKS.items()
    ]


def make_task(name: str, **options: Any) -> Task:
    """The task of that name. Raises ValueError for an unknown name or setting, with the nearest right one."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(_TASKS)}.{suggestion(name, _TASKS)}")
    known = [item.name for item in fields(_TASKS[name])]
    for option in options:
        if option not in known:
            near = suggestion(option, known)
            raise ValueError(f"task {name!r} has no setting {option!r}: it has {', '.join(known)}.{near}")
    return _TASKS[name](**options)
