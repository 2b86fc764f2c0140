"""Look something up in the row: a function given as pairs, followed once or several times; the latest tokens of a kind; a delay.

Every part of these tasks is one token: a pair is one token, not a key and then its value. So nothing has to be bound together first,
one layer of attention can do what one step asks for, and a tiny model learns it in seconds. The answers stand beside the row.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from workbench.lab.catalogue import implements
from workbench.lab.tasks.base import Row, Task, register_task


@register_task
@dataclass(frozen=True)
class Lookup(Task):
    """Follow a function that the row defines, one step or several.

    A row is n = `items` pairs k → f(k) of a random permutation f, in random order and among noise, and at the end `queries`
    questions (s, h): what is f applied h times to s, with h uniform in 1 … `hops`? Ids: pair (k, v) is k·n + v, question (s, h) is
    n² + (h − 1)·n + s, everything above is noise; answers are 0 … n − 1. The pairs come first and the noise after them, or with
    `scattered` at random places among it. The row's last token is noise that is never read. The source of an answer is the pair
    that holds it. Facts: `hops` [batch, pos] is h where an answer is asked for, else 0.
    """

    length: int = 32
    items: int = 6
    queries: int = 8
    hops: int = 1
    scattered: bool = False

    name: ClassVar[str] = "lookup"
    paper: ClassVar[str] = (
        "Olsson et al. 2022, arXiv:2209.11895 (recall); Dehghani et al. 2018, arXiv:1807.03819 (steps)"
    )
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(self.items >= 2, f"items must be at least 2, got {self.items}")
        self._require(self.hops >= 1, f"hops must be at least 1, got {self.hops}")
        self._require(self.queries >= 1, f"queries must be at least 1, got {self.queries}")
        needed = self.items**2 + self.items * self.hops + 1
        self._require(self.vocab_size >= needed, f"needs vocab_size ≥ {needed}, got {self.vocab_size}")
        fits = self.items + self.queries + 1
        self._require(
            self.length >= fits,
            f"{self.items} pairs and {self.queries} queries need length ≥ {fits}, got {self.length}",
        )

    def row(self, random: Generator) -> Row:
        n, first_query = self.items, self.length - 1 - self.queries
        function = random.permutation(n)
        order = random.permutation(n)
        places = random.permutation(first_query)[:n] if self.scattered else np.arange(n)
        place_of = np.empty(n, dtype=np.int64)  # of the pair of each key
        place_of[order] = places
        tokens = random.integers(n * n + n * self.hops, self.vocab_size, size=self.length)
        tokens[places] = order * n + function[order]
        starts, hops = random.integers(n, size=self.queries), random.integers(1, self.hops + 1, size=self.queries)
        tokens[first_query:-1] = n * n + (hops - 1) * n + starts
        last_key = starts.copy()
        for hop in range(1, self.hops):
            last_key = np.where(hop < hops, function[last_key], last_key)
        answers, source, asked_hops = (np.full(self.length, -1), np.full(self.length, -1), np.zeros(self.length, int))
        answers[first_query + 1 :], source[first_query + 1 :] = function[last_key], place_of[last_key]
        asked_hops[first_query + 1 :] = hops
        return Row(tokens, source, {"hops": asked_hops}, answers)

    @property
    def chance_loss(self) -> float:
        return math.log(self.items)


@register_task
@dataclass(frozen=True)
class NthLatest(Task):
    """The n-th latest token of a kind, noise not counted.

    Ids below `kinds` are values, the others noise; a token is a value with probability `density`, and row and place decide nothing
    else. After every token the answer is the `rank`-th latest value, the current token included; nothing is asked for before so many
    have come. The source of an answer is its place. With rank 1 only recency counts; from rank 2 on values must be counted,
    however much noise lies between them.
    """

    vocab_size: int = 12
    length: int = 33
    kinds: int = 4
    rank: int = 1
    density: float = 0.25

    name: ClassVar[str] = "nth_latest"
    paper: ClassVar[str] = (
        "Golovneva et al. 2024, Contextual Position Encoding, arXiv:2405.18719 (selective copy and flip-flop)"
    )
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(2 <= self.kinds < self.vocab_size, f"needs 2 ≤ kinds < vocab_size, got {self.kinds}")
        self._require(0 < self.density < 1, f"density must be between 0 and 1, got {self.density}")
        self._require(1 <= self.rank < self.length, f"needs 1 ≤ rank < length, got {self.rank}")

    def row(self, random: Generator) -> Row:
        is_value = random.random(self.length) < self.density
        is_value[: self.rank] = True  # so that every row asks for something
        values = random.integers(self.kinds, size=self.length)
        noise = random.integers(self.kinds, self.vocab_size, size=self.length)
        tokens = np.where(is_value, values, noise)
        places = np.flatnonzero(is_value)
        seen = np.cumsum(is_value)[:-1]  # values up to and with the token before each answer
        source = np.full(self.length, -1)
        source[1:] = np.where(seen >= self.rank, places[np.maximum(seen - self.rank, 0)], -1)
        return Row(tokens, source, {}, np.where(source >= 0, tokens[source], -1))

    @property
    def chance_loss(self) -> float:
        return math.log(self.kinds)


@register_task
@dataclass(frozen=True)
class Delay(Task):
    """Say again what was said `delay` tokens ago.

    Tokens are drawn uniformly. After token t the answer is token t − delay, which is also its source; nothing is asked for before.
    Only the distance counts, so the task is the same at every place and at every length.
    """

    vocab_size: int = 8
    length: int = 25
    delay: int = 3

    name: ClassVar[str] = "delay"
    paper: ClassVar[str] = (
        "Graves, Wayne & Danihelka 2014, Neural Turing Machines, arXiv:1410.5401 (copying at a fixed delay)"
    )
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(1 <= self.delay <= self.length - 2, f"needs 1 ≤ delay ≤ length − 2, got {self.delay}")

    def row(self, random: Generator) -> Row:
        tokens = random.integers(self.vocab_size, size=self.length)
        source = np.arange(self.length) - 1 - self.delay
        source = np.where(source >= 0, source, -1)
        return Row(tokens, source, {}, np.where(source >= 0, tokens[source], -1))

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size)


implements("cope", "task", "nth_latest")
