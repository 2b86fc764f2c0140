"""Relations between tokens, and relations learned by heart."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from workbench.lab.catalogue import implements
from workbench.lab.tasks.base import Row, Task, register_task


@register_task
@dataclass(frozen=True)
class SameDifferent(Task):
    """Whether a token is the same as the one before it.

    Tokens are objects, ids `first` … `first` + `objects` − 1; each repeats the one before it with probability 1/2 and otherwise is
    another one. After every token from the second on the answer is 1 for the same and 0 for a different one. Training on some
    objects and testing on others asks for the relation itself, not for a table of the pairs seen.
    """

    vocab_size: int = 64
    length: int = 25
    first: int = 0
    objects: int | None = None  # default: all ids from `first` on

    name: ClassVar[str] = "same_different"
    paper: ClassVar[str] = "Altabaa & Lafferty 2024, Dual Attention Transformer, arXiv:2405.16727 (relational games)"
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._default("objects", self.vocab_size - self.first)
        assert self.objects is not None
        inside = self.first >= 0 and self.objects >= 2 and self.first + self.objects <= self.vocab_size
        self._require(
            inside,
            f"objects {self.first} … {self.first + self.objects - 1} must be two or more ids below {self.vocab_size}",
        )

    def row(self, random: Generator) -> Row:
        assert self.objects is not None
        steps = np.where(random.random(self.length) < 0.5, 0, random.integers(1, self.objects, size=self.length))
        steps[0] = random.integers(self.objects)
        tokens = self.first + np.cumsum(steps) % self.objects
        answers = np.full(self.length, -1)
        answers[2:] = steps[1:-1] == 0
        return Row(tokens, np.full(self.length, -1), {}, answers)

    @property
    def chance_loss(self) -> float:
        return math.log(2)


@register_task
@dataclass(frozen=True)
class Facts(Task):
    """Know a table by heart: what goes with two tokens in a row.

    Tokens are drawn uniformly from all ids. A table of random answers, one for every pair of ids, is drawn once from `table_seed`
    and is the same in every row, so it must be in the weights. After every token from the second on the answer is the table's entry
    for the token before and the token itself, 0 … `answers_count` − 1.
    """

    vocab_size: int = 16
    length: int = 17
    answers_count: int = 8
    table_seed: int = 0

    name: ClassVar[str] = "facts"
    paper: ClassVar[str] = "Geva et al. 2021, Feed-Forward Layers Are Key-Value Memories, arXiv:2012.14913"
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(
            2 <= self.answers_count <= self.vocab_size,
            f"needs 2 ≤ answers_count ≤ vocab_size, got {self.answers_count}",
        )
        self._require(self.table_seed >= 0, f"table_seed must not be negative, got {self.table_seed}")

    @property
    def table(self) -> np.ndarray:
        """The answers, int64 [token before, token]."""
        shape = (self.vocab_size, self.vocab_size)
        return np.random.default_rng([self.table_seed, 2]).integers(self.answers_count, size=shape)

    def row(self, random: Generator) -> Row:
        tokens = random.integers(self.vocab_size, size=self.length)
        answers = np.full(self.length, -1)
        answers[2:] = self.table[tokens[:-2], tokens[1:-1]]
        return Row(tokens, np.full(self.length, -1), {}, answers)

    @property
    def chance_loss(self) -> float:
        return math.log(self.answers_count)


implements("dat-relational", "task", "same_different")
implements("generalized-cross-attn", "task", "facts")
