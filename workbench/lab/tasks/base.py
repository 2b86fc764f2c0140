"""What a synthetic task is: batches with planted truth.

A task makes batches `(tokens, loss_mask, metadata)`, all indexed [batch, pos]:

    tokens      int64   ids 0 … vocab_size − 1
    loss_mask   bool    True where an answer is asked for that follows from the tokens before
    metadata    dict    planted truth; `metadata["source"]` int64 holds, where one earlier token decides the answer, its
                        position, and −1 elsewhere

`batch.targets` are the answers. In most tasks they are the tokens; in a tracking task (`answers = "beside"`) they are
`metadata["answer"]` and not in the sequence, so that nothing but the model's own state can hold them.

Answer t is predicted at position t − 1, so in an attention map the planted edge runs from query t − 1 to source[t].
A batch is a pure function of (task, batch size, step, split); training and validation draw from different streams.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

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

    @property
    def targets(self) -> Tensor:
        """What is to be predicted where loss_mask is True: int64 [batch, pos]."""
        return self.metadata.get("answer", self.tokens)


class Row(NamedTuple):
    """One sequence: its tokens, the planted source of each (−1 where there is none), and further planted facts."""

    tokens: NDArray[np.int64]  # [pos]
    source: NDArray[np.int64]  # [pos]
    facts: dict[str, Any]  # int64 [pos] or int
    answers: NDArray[np.int64] | None = None  # [pos], −1 where none is asked for; None: the tokens that have a source


@dataclass(frozen=True)
class Task(ABC):
    """What all tasks share: sizes, the seed, and batches made of rows."""

    vocab_size: int = 64
    length: int = 96  # tokens per sequence
    seed: int = 0

    name: ClassVar[str]
    paper: ClassVar[str]
    answers: ClassVar[str] = "tokens"  # or "beside": answers are no tokens of the sequence

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
        if rows[0].answers is None:
            return TaskBatch(tokens, source >= 0, {"source": source, **facts})
        answers = torch.from_numpy(np.stack([row.answers for row in rows if row.answers is not None]))
        answer = torch.where(answers >= 0, answers, tokens)
        return TaskBatch(tokens, answers >= 0, {"source": source, "answer": answer, **facts})

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


TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=Task)


def register_task(task: type[T]) -> type[T]:
    """Class decorator: list the task under its name. Raises ValueError for a name twice."""
    if task.name in TASKS:
        raise ValueError(f"a task named {task.name!r} is registered already: {TASKS[task.name].__qualname__}")
    TASKS[task.name] = task
    return task
