"""State tracking: answers that no single earlier token holds, only a state that every token updates.

The answers stand beside the sequence (`targets`), not in it. If they stood in it, each would follow from the one before
and one more token, and nothing would have to be remembered.
"""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from workbench.lab.catalogue import implements
from workbench.lab.tasks.base import Row, Task, register_task


def _tracked(tokens: NDArray[np.int64], state: NDArray[np.int64]) -> Row:
    """A row whose answer at t is the state after token t − 1; the first token is only read."""
    answers = np.concatenate([[-1], state[:-1]])
    return Row(tokens, np.full(len(tokens), -1), {}, answers)


@register_task
@dataclass(frozen=True)
class Parity(Task):
    """Whether an odd number of ones has been read.

    Tokens are bits, ids 0 and 1, each 1 with probability `density`. After every token the answer is the parity of all
    ones so far, 0 or 1. Two states, but no attention pattern that works at one length works at twice that length, and no
    linear recurrence with positive decays holds it.
    """

    vocab_size: int = 4
    length: int = 41
    density: float = 0.5

    name: ClassVar[str] = "parity"
    paper: ClassVar[str] = "Hahn 2020, Theoretical Limitations of Self-Attention, arXiv:1906.06755"
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(0 < self.density < 1, f"density must be between 0 and 1, got {self.density}")

    def row(self, random: Generator) -> Row:
        bits = (random.random(self.length) < self.density).astype(np.int64)
        return _tracked(bits, np.cumsum(bits) % 2)

    @property
    def chance_loss(self) -> float:
        return math.log(2)


@register_task
@dataclass(frozen=True)
class Permutations(Task):
    """The product of all permutations read so far.

    Token i stands for the i-th permutation of `items` things in lexicographic order (0 is the identity); after every token
    the answer is the number of the product σ_t ∘ … ∘ σ_1. Three items can be tracked by solvable means, five cannot:
    the word problem of S₅ is complete for NC¹, beyond any fixed-depth transformer or diagonal linear recurrence.
    """

    vocab_size: int = 6
    length: int = 33
    items: int = 3

    name: ClassVar[str] = "permutations"
    paper: ClassVar[str] = (
        "Merrill, Petty & Sabharwal 2024, The Illusion of State in State-Space Models, arXiv:2404.08819"
    )
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(2 <= self.items <= 5, f"items must be between 2 and 5, got {self.items}")
        count = math.factorial(self.items)
        self._require(
            self.vocab_size >= count,
            f"{self.items} items have {count} permutations and need vocab_size ≥ {count}, got {self.vocab_size}",
        )

    def row(self, random: Generator) -> Row:
        table = np.array(list(permutations(range(self.items))))
        number = {tuple(row): i for i, row in enumerate(table.tolist())}
        tokens = random.integers(len(table), size=self.length)
        state, product = np.empty(self.length, dtype=np.int64), np.arange(self.items)
        for t, token in enumerate(tokens):
            product = table[token][product]
            state[t] = number[tuple(product.tolist())]
        return _tracked(tokens, state)

    @property
    def chance_loss(self) -> float:
        return math.log(math.factorial(self.items))


@register_task
@dataclass(frozen=True)
class FlipFlop(Task):
    """One bit of memory: write, ignore, read.

    A row is pairs of an instruction and a bit: `write b` stores b, `ignore b` is noise, `read b` must give the bit that
    the last `write` stored. Ids: bits 0 and 1, then write 2, ignore 3, read 4. The first instruction is a write, the
    others are ignored with probability `ignore` and else write or read alike. Asked for is the bit of every read; its source
    is the bit of the last write.
    """

    ignore: float = 0.8

    name: ClassVar[str] = "flip_flop"
    paper: ClassVar[str] = (
        "Liu et al. 2023, Exposing Attention Glitches with Flip-Flop Language Modeling, arXiv:2306.00946"
    )

    def _settle(self) -> None:
        self._require(self.vocab_size >= 5, f"vocab_size must be at least 5, got {self.vocab_size}")
        self._require(0 <= self.ignore < 1, f"ignore must be at least 0 and below 1, got {self.ignore}")

    def row(self, random: Generator) -> Row:
        pairs = self.length // 2
        chances = [(1 - self.ignore) / 2, self.ignore, (1 - self.ignore) / 2]
        instructions = random.choice([2, 3, 4], size=pairs, p=chances)
        instructions[0], instructions[-1] = 2, 4  # something is stored, and every row asks at least once
        tokens, source = random.integers(2, size=self.length), np.full(self.length, -1)
        tokens[0 : 2 * pairs : 2] = instructions
        written = 1
        for pair, instruction in enumerate(instructions.tolist()):
            at = 2 * pair + 1
            if instruction == 2:
                written = at
            elif instruction == 4:
                tokens[at], source[at] = tokens[written], written
        return Row(tokens, source, {})

    @property
    def chance_loss(self) -> float:
        return math.log(2)


@register_task
@dataclass(frozen=True)
class Counting(Task):
    """How often an event has happened since the last reset.

    Ids: event 0, reset 1, and everything above is noise. After every token the answer is the number of events since the
    last reset (or the start), at most `limit` (then it stays there); answers are the ids 0 … limit. An event comes with
    probability `density`, a reset with probability `density` / 8.
    """

    vocab_size: int = 12
    limit: int = 9
    density: float = 0.25

    name: ClassVar[str] = "counting"
    paper: ClassVar[str] = "Golovneva et al. 2024, Contextual Position Encoding, arXiv:2405.18719 (counting)"
    answers: ClassVar[str] = "beside"

    def _settle(self) -> None:
        self._require(1 <= self.limit < self.vocab_size, f"needs 1 ≤ limit < vocab_size, got {self.limit}")
        self._require(0 < self.density <= 0.8, f"density must be above 0 and at most 0.8, got {self.density}")

    def row(self, random: Generator) -> Row:
        draw = random.random(self.length)
        tokens = random.integers(2, self.vocab_size, size=self.length)
        tokens[draw < self.density] = 0
        tokens[draw > 1 - self.density / 8] = 1
        state, count = np.empty(self.length, dtype=np.int64), 0
        for t, token in enumerate(tokens.tolist()):
            count = 0 if token == 1 else min(count + (token == 0), self.limit)
            state[t] = count
        return _tracked(tokens, state)

    @property
    def chance_loss(self) -> float:
        return math.log(self.limit + 1)


implements("cope", "task", "counting", note="single variable")
implements("cope", "task", "flip_flop")
