"""Recall: which earlier token must be found to predict which."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from workbench.lab.catalogue import implements
from workbench.lab.tasks.base import Row, Task, register_task


@register_task
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


@register_task
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


@register_task
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


@register_task
@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Repeat, in order, the content tokens that are scattered among noise.

    A row is `span + gaps` tokens in which `content` tokens stand at random places among the id NOISE = vocab_size − 2,
    then COPY = vocab_size − 1, then the content tokens in their order. Content is drawn uniformly, with repetition, from
    the other ids. The source of an answer is the content token's place. Distances vary from token to token, so neither a
    fixed offset nor a fixed convolution solves it: what is written must depend on what it is.
    """

    content: int | None = None  # content tokens per row; default: an eighth of the length, at least 2

    name: ClassVar[str] = "selective_copy"
    paper: ClassVar[str] = "Gu & Dao 2023, Mamba, arXiv:2312.00752 (selective copying)"

    def _settle(self) -> None:
        self._default("content", max(2, self.length // 8))
        assert self.content is not None
        fits = (self.length - 2) // 2
        self._require(1 <= self.content <= fits, f"needs 1 ≤ content ≤ {fits}, got {self.content}")

    def row(self, random: Generator) -> Row:
        assert self.content is not None
        read = self.length - 1 - self.content
        places = np.sort(random.choice(read, size=self.content, replace=False))
        content = random.integers(self.vocab_size - 2, size=self.content)
        tokens = np.full(self.length, self.vocab_size - 2)
        tokens[places], tokens[read], tokens[read + 1 :] = content, self.vocab_size - 1, content
        source = np.full(self.length, -1)
        source[read + 1 :] = places
        return Row(tokens, source, {})

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size - 2)


@register_task
@dataclass(frozen=True)
class Passkey(Task):
    """Find a key sentence in filler and say it at the end.

    A row is filler, `KEY x_1 … x_n`, filler, and at the end `KEY x_1 … x_n` again, with KEY = vocab_size − 1. The key's
    tokens come from the upper half of the other ids, filler from the lower half, which it walks through in one direction
    (each filler token is its predecessor plus one), so that filler is predictable and the key is what stands out.
    `depth` fixes where the key stands: 0 at the start, 1 right before the question; None draws it anew for each row.
    Answers are the n tokens at the end; the source of each is its first occurrence. Facts: `place` [batch], where the
    first KEY stands.
    """

    key_length: int = 4
    depth: float | None = None

    name: ClassVar[str] = "passkey"
    paper: ClassVar[str] = "Mohtashami & Jaggi 2023, Landmark Attention, arXiv:2305.16300 (passkey retrieval)"

    def _settle(self) -> None:
        self._require(self.vocab_size >= 6, f"vocab_size must be at least 6, got {self.vocab_size}")
        fits = (self.length - 2) // 2
        self._require(1 <= self.key_length <= fits, f"needs 1 ≤ key_length ≤ {fits}, got {self.key_length}")
        self._require(
            self.depth is None or 0 <= self.depth <= 1, f"depth must be between 0 and 1, or None, got {self.depth}"
        )

    def row(self, random: Generator) -> Row:
        n, half = self.key_length, (self.vocab_size - 1) // 2
        latest = self.length - 2 * (n + 1)
        place = int(random.integers(latest, endpoint=True)) if self.depth is None else round(self.depth * latest)
        key = np.concatenate([[self.vocab_size - 1], random.integers(half, self.vocab_size - 1, size=n)])
        filler = (random.integers(half) + np.arange(latest)) % half
        tokens = np.concatenate([filler[:place], key, filler[place:], key])
        source = np.full(self.length, -1)
        source[-n:] = np.arange(place + 1, place + 1 + n)
        return Row(tokens, source, {"place": place})

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size - 1 - (self.vocab_size - 1) // 2)


implements("mamba", "task", "selective_copy")
implements("landmark-attention", "task", "passkey")
