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


@register_task
@dataclass(frozen=True)
class ForAndAgainst(Task):
    """Which symbol leads when one group's tokens count for theirs and another group's against.

    A row holds `each` tokens of every group at random places among noise, every one with a symbol drawn uniformly, and at the end
    `queries` questions (a, b), two different groups: which symbol has most tokens in group a, less those in group b? Questions without
    a single leader are not asked. Ids: token (group, symbol) is group · `symbols` + symbol, question (a, b) is
    `groups` · `symbols` + a · `groups` + b, everything above is noise; answers are 0 … `symbols` − 1. The row's last token is noise that
    is never read. What a token counts for depends on the question, so a map of weights that are never negative needs two heads for it.
    """

    vocab_size: int = 40
    length: int = 33
    groups: int = 4
    symbols: int = 4
    each: int = 6
    queries: int = 8

    name: ClassVar[str] = "for_and_against"
    paper: ClassVar[str] = (
        "Ye et al. 2024, Differential Transformer, arXiv:2410.05258 (attention by a difference of two maps)"
    )
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(self.groups >= 2, f"groups must be at least 2, got {self.groups}")
        self._require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")
        self._require(self.each >= 1, f"each must be at least 1, got {self.each}")
        self._require(self.queries >= 1, f"queries must be at least 1, got {self.queries}")
        needed = self.groups * (self.symbols + self.groups) + 1
        self._require(self.vocab_size >= needed, f"needs vocab_size ≥ {needed}, got {self.vocab_size}")
        fits = self.groups * self.each + self.queries + 1
        self._require(
            self.length >= fits,
            f"{self.groups} · {self.each} tokens and {self.queries} queries need length ≥ {fits}, got {self.length}",
        )

    def row(self, random: Generator) -> Row:
        counted, first_query = self.groups * self.each, self.length - 1 - self.queries
        first_question = self.groups * self.symbols
        places = random.permutation(first_query)[:counted]
        group = np.repeat(np.arange(self.groups), self.each)
        questions = np.empty((0, 2), dtype=np.int64)
        while len(questions) == 0:
            symbol = random.integers(self.symbols, size=counted)
            votes = np.zeros((self.groups, self.symbols), dtype=np.int64)
            np.add.at(votes, (group, symbol), 1)
            balance = votes[:, None] - votes[None]  # [for, against, symbol]
            leads = (balance == balance.max(-1, keepdims=True)).sum(
                -1
            ) == 1  # never of a group against itself: all are 0
            questions = np.argwhere(leads)
        asked = questions[random.integers(len(questions), size=self.queries)]
        tokens = random.integers(first_question + self.groups**2, self.vocab_size, size=self.length)
        tokens[places] = group * self.symbols + symbol
        tokens[first_query:-1] = first_question + asked @ [self.groups, 1]
        answers = np.full(self.length, -1)
        answers[first_query + 1 :] = balance[asked[:, 0], asked[:, 1]].argmax(-1)
        return Row(tokens, np.full(self.length, -1), {}, answers)

    @property
    def chance_loss(self) -> float:
        return math.log(self.symbols)


implements("dat-relational", "task", "same_different")
implements("generalized-cross-attn", "task", "facts")
