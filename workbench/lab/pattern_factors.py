"""The pattern of one layer, evaluated from the factors that a run stores.

A run stores O(tokens) factors per layer, never a token × token map (docs/architecture.md section 4). From them this
module computes any tile, row, statistic or pooled picture of the pattern of a head, exactly and for any number of
tokens in the memory of a few tiles:

    softmax       α_ij = exp(scale · q_i·k_j − alibi_h · |i−j| − log_normaliser_i)      j ≤ i, within the window
    gated_linear  α_ij = scale · Σ_d q_id k_jd exp(G_id − G_jd) · write_j               j ≤ i, or j < i when strict
    delta         α = M (I + L)⁻¹ diag(write), as in `delta_rule`                       j ≤ i
    dense         α_ij as stored: whole, or some rows of it, or nothing but the overview of the run

A window of w lets token i see j with i − j < w. With `pattern.causal` false (softmax only) every token sees every
token within the window on either side. Cells that a row cannot see are 0. Head h reads key group ⌊h · n_key_heads /
n_heads⌋, and likewise for values. Arithmetic is float64, results are float32. numpy only.

A layer whose record says `n_columns` reads another text: its columns are that many tokens of the source, and every row sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from workbench.lab.delta_rule import DeltaRule
from workbench.lab.linear_state import CumulativeDecay
from workbench.lab.pooling import StreamingPool
from workbench.lab.run_folder import Run
from workbench.lab.run_format import OVERVIEW_SIZE, check_layer
from workbench.lab.vector_decay import ChannelDecay

# A tile of float64 that, with its scores and mask, stays in a processor's second-level cache.
TILE_ROWS, TILE_COLUMNS = 256, 512
LARGEST_TILE = 2**26

FACTORS = (
    "query", "key", "value", "log_normaliser", "log_decay", "write",
    "pattern", "pattern_rows", "row_positions", "states", "state_positions",
)  # fmt: skip
NEEDED = {
    "softmax": ("query", "key", "log_normaliser"),
    "gated_linear": ("query", "key"),
    "delta": ("query", "key", "write"),
    "dense": (),
}

Positions = slice | Sequence[int] | np.ndarray


class FactorError(ValueError):
    """A question that this layer's factors cannot answer; the message says what is missing or what to ask instead."""


class PatternFactors:
    """The factors of one layer.

    `layer` is its record of the run contract, `arrays` holds its factors by their short names: query, key, value
    [head, pos, width]; log_normaliser, log_decay, write [head, pos], log_decay also [head, pos, width]; pattern
    [head, query, key], or pattern_rows [head, stored, key] with row_positions [stored]; states [head, stored,
    state_k, state_v] with state_positions [stored] (absent = every position). `length` is the number of tokens,
    needed where no array tells it.
    """

    def __init__(self, layer: Mapping, arrays: Mapping[str, np.ndarray], length: int | None = None):
        layer = dict(layer)
        self.index = check_layer(layer)
        self.kind: str = layer["kind"]
        form = layer.get("form")
        if form is None:
            raise FactorError(f"layer {self.index} ({self.kind}) has no pattern: its record has no form")
        self.form: str = form
        self.n_heads: int = layer["n_heads"]
        scale = layer.get("scale")
        self.scale = 1.0 if scale is None else float(scale)
        self.strict = bool(layer.get("strict", False))
        self.window: int | None = layer.get("window")
        self.alibi_slopes: list[float] | None = layer.get("alibi_slopes")
        self.pattern_record: dict = layer.get("pattern") or {}
        self.causal = bool(self.pattern_record.get("causal", True))
        self.reads_source = layer.get("n_columns") is not None
        self._arrays = {name: arrays[name] for name in FACTORS if name in arrays}
        self._decays: dict[int, Any] = {}
        self._rules: dict[int, DeltaRule] = {}
        self._band: tuple[int, np.ndarray, np.ndarray] | None = None
        self._check(length)
        self.columns: int = layer["n_columns"] if self.reads_source else self.length

    @classmethod
    def from_run(cls, run: Run, layer: int) -> Self:
        """The factors of layer `layer` of a trace run, mapped from disk."""
        record, prefix = run.layer(layer), f"layer.{layer}."
        slots = [name for slot in record.get("states") or [] if (name := f"states.{slot['name']}") not in FACTORS]
        arrays = {name: run.array(prefix + name) for name in (*FACTORS, *slots) if run.has(prefix + name)}
        return cls(record, arrays, len((run.manifest.get("tokens") or {}).get("ids", ())))

    @property
    def whole(self) -> bool:
        """Whether every cell of the pattern can be told."""
        return self.form != "dense" or "pattern" in self._arrays

    def _check(self, length: int | None) -> None:
        where = f"layer {self.index} ({self.kind}, {self.form})"
        missing = [name for name in NEEDED[self.form] if name not in self._arrays]
        if missing:
            raise FactorError(f"{where} lacks the factor(s) {', '.join(missing)}")
        self.length = length or 0
        told = (("pattern", 1),) if self.reads_source else (("query", 1), ("pattern", 2), ("pattern_rows", 2))
        for name, axis in told:
            if name in self._arrays and self._arrays[name].ndim > axis:
                self.length = self._arrays[name].shape[axis]
        for name, array in self._arrays.items():
            if name in ("states", "state_positions", "pattern_rows", "row_positions"):
                continue
            axes = 2 if name in ("log_normaliser", "log_decay", "write") else 3
            if name == "log_decay" and array.ndim == 3 and array.shape[2] == self._arrays["key"].shape[2]:
                axes = 3  # one for every row of the state
            if array.ndim != axes or array.shape[1] != self.length or self.n_heads % max(array.shape[0], 1):
                raise FactorError(
                    f"{where}: factor {name} has shape {array.shape}, expected {axes} axes: head (a divisor of "
                    f"{self.n_heads}), pos ({self.length}){', width' if axes == 3 else ''}"
                )
        extras = self.window is not None or self.alibi_slopes is not None or not self.causal
        if self.form in ("gated_linear", "delta") and extras:
            raise FactorError(
                f"{where}: a {self.form.replace('_', ' ')} layer has no window, no ALiBi slopes and is causal"
            )
        if self.form == "delta" and self.strict:
            raise FactorError(f"{where}: the delta rule is not strict")
        if self.form == "softmax" and self.strict:
            raise FactorError(f"{where}: a strict softmax layer leaves its first row without a source")

    # ---- pattern ----------------------------------------------------------------------------------------------------

    def pattern(self, head: int, queries: Positions = slice(None), keys: Positions = slice(None)) -> np.ndarray:
        """Exact values of a tile of the pattern: float32 [query, key].

        `queries`, `keys`: slices or lists of positions. FactorError for more than 2**26 cells (use `overview`).
        """
        head, rows, columns = self.places(head, queries, keys)
        if len(rows) * len(columns) > LARGEST_TILE:
            raise FactorError(
                f"a tile of {len(rows)} × {len(columns)} cells is larger than {LARGEST_TILE} cells: "
                "ask for fewer queries or keys, or for the pooled overview"
            )
        tile = np.empty((len(rows), len(columns)), dtype=np.float32)
        for start in range(0, len(rows), TILE_ROWS):
            block = slice(start, start + TILE_ROWS)
            tile[block] = self._tile(head, rows[block], columns)
        return tile

    def score_terms(
        self, head: int, queries: Positions = slice(None), keys: Positions = slice(None)
    ) -> dict[str, np.ndarray]:
        """What the scores before the softmax are the sum of, {`"content"`, `"bias.alibi"` where there are slopes}: float64 [query, key].

        Cells that a row cannot see have values too; see `visible`. FactorError for a layer whose factors do not tell.
        """
        if self.form != "softmax":
            raise FactorError(
                f"layer {self.index} ({self.kind}) is {self.form}: its factors do not tell scores before a softmax"
            )
        head, rows, columns = self.places(head, queries, keys)
        return self._score_terms(head, rows, columns)

    def _score_terms(self, head: int, rows: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
        query, key = float64(take(self._of("query", head), rows)), float64(take(self._of("key", head), columns))
        content = query @ key.T
        content *= self.scale
        terms = {"content": content}
        if self.alibi_slopes is not None:
            terms["bias.alibi"] = -self.alibi_slopes[head] * np.abs(rows[:, None] - columns[None, :])
        return terms

    def value(self, head: int, query: int, key: int) -> float:
        """One cell of the pattern."""
        row, column = self._position(query, "query"), self._position(key, "key")
        return float(self._tile(self._head(head), np.array([row]), np.array([column]))[0, 0])

    def row(self, head: int, query: int) -> np.ndarray:
        """Where token `query` reads from: float32 [key], 0 for tokens that it cannot see."""
        row = np.array([self._position(query, "query")])
        return self._tile(self._head(head), row, np.arange(self.columns))[0].astype(np.float32)

    def visible(self, queries: Positions = slice(None), keys: Positions = slice(None)) -> np.ndarray:
        """Which cells exist, rather than being 0: bool [query, key]."""
        return self._visible(self._positions(queries, "query"), self._positions(keys, "key"))

    def overview(
        self,
        head: int,
        size: int | tuple[int, int] = OVERVIEW_SIZE,
        queries: Positions = slice(None),
        keys: Positions = slice(None),
        kind: str = "max",
    ) -> np.ndarray:
        """The pattern, or the part of it at `queries` × `keys`, pooled to an image of at most `size` (one number,
        or height and width): float32 [height, width]. Streams over tiles, so any number of tokens fits in memory.

        `kind`: `"max"` keeps the value of largest magnitude with its sign; `"sum"`; `"mean"` over all cells of
        a bin, those that a row cannot see counting as 0.
        """
        head, rows, columns = self.places(head, queries, keys)
        height, width = size if isinstance(size, tuple) else (size, size)
        pool = StreamingPool(len(rows), len(columns), height, width, kind)
        for row, column, tile in self._tiles(head, rows, columns):
            pool.add(row, column, tile)
        return pool.result().astype(np.float32)

    def received(self, head: int) -> np.ndarray:
        """Mean absolute weight that each source gets from the rows that can see it: float32 [key].

        nan where no row can see a source (the last token of a strict layer).
        """
        total = np.zeros(self.columns)
        for _, column, tile in self._every_tile(self._head(head)):
            total[column : column + tile.shape[1]] += np.abs(tile).sum(0)
        return self._mean_over_readers(total)

    def entropy(self, head: int) -> np.ndarray:
        """Entropy of each row in nats: float32 [query]. FactorError unless rows are probabilities."""
        self._need_probabilities()
        total = np.zeros(self.length)
        for row, _, tile in self._every_tile(self._head(head)):
            total[row : row + tile.shape[0]] += _entropy_terms(tile)
        return total.astype(np.float32)

    def offset_profile(self, head: int, n: int = 64) -> np.ndarray:
        """Mean weight at each distance query − key = 0 … n−1, over the rows with a visible source there: float32 [n].

        nan where no row has one (distance 0 of a strict layer, distances beyond the window or the text).
        """
        if n < 1:
            raise FactorError(f"an offset profile needs at least one distance, got n = {n}")
        if self.reads_source:
            raise FactorError(
                f"layer {self.index} ({self.kind}) reads another text: there is no distance between its rows and columns"
            )
        head, total = self._head(head), np.zeros(n)
        for start in range(0, self.length, TILE_ROWS):
            rows = np.arange(start, min(start + TILE_ROWS, self.length))
            for first in range(max(0, start - n + 1), rows[-1] + 1, TILE_COLUMNS):
                columns = np.arange(first, min(first + TILE_COLUMNS, int(rows[-1]) + 1))
                offset = rows[:, None] - columns[None, :]
                wanted = (offset >= 0) & (offset < n)
                total += np.bincount(offset[wanted], weights=self._tile(head, rows, columns)[wanted], minlength=n)
        offsets = np.arange(n)
        pairs = np.maximum(self.length - offsets, 0)
        if self.window is not None:
            pairs[offsets >= self.window] = 0
        if self.strict:
            pairs[0] = 0
        return _divide(total, pairs)

    def summaries(self, size: int = OVERVIEW_SIZE) -> dict[str, np.ndarray]:
        """What a trace run stores beside the factors, computed in one pass over the tiles, as float32.

        `overview` [head, P, P] with P = min(T, size), `received` [head, pos], and where rows are probabilities
        `entropy` [head, pos]. Columns of a layer that reads a source are the source's.
        """
        probabilities = not self._why_no_probabilities()
        collected: dict[str, list[np.ndarray]] = {"overview": [], "received": []}
        for head in range(self.n_heads):
            pool = StreamingPool(self.length, self.columns, size, size)
            received, entropy = np.zeros(self.columns), np.zeros(self.length)
            for row, column, tile in self._every_tile(head):
                pool.add(row, column, tile)
                received[column : column + tile.shape[1]] += np.abs(tile).sum(0)
                if probabilities:
                    entropy[row : row + tile.shape[0]] += _entropy_terms(tile)
            collected["overview"].append(pool.result())
            collected["received"].append(self._mean_over_readers(received))
            if probabilities:
                collected.setdefault("entropy", []).append(entropy)
        return {name: np.stack(values).astype(np.float32) for name, values in collected.items()}

    # ---- tiles ------------------------------------------------------------------------------------------------------

    def _every_tile(self, head: int) -> Iterator[tuple[int, int, np.ndarray]]:
        return self._tiles(head, np.arange(self.length), np.arange(self.columns))

    def _tiles(self, head: int, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Tiles that have something to see, with their place in `rows` × `columns`."""
        for row in range(0, len(rows), TILE_ROWS):
            some_rows = rows[row : row + TILE_ROWS]
            for column in range(0, len(columns), TILE_COLUMNS):
                some_columns = columns[column : column + TILE_COLUMNS]
                if self._reachable(some_rows, some_columns):
                    yield row, column, self._tile(head, some_rows, some_columns)

    def _reachable(self, rows: np.ndarray, columns: np.ndarray) -> bool:
        """False when surely no cell of the tile is visible."""
        if self.form == "dense":
            return True
        if self.causal and columns.min() > rows.max():
            return False
        window = self.length if self.window is None else self.window
        too_old = rows.min() - columns.max() >= window
        too_new = columns.min() - rows.max() >= window
        return not (too_old or too_new)

    def _tile(self, head: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """α at `rows` × `columns`: float64."""
        if self.form == "dense":
            stored = self._of("pattern" if self.whole else "pattern_rows", head)
            return float64(take(take(stored, rows if self.whole else self._places(rows)).T, columns).T)
        if self.form == "delta":
            return self._delta_rows(head, rows)[:, columns]
        if self.form == "softmax":
            tile, *biases = self._score_terms(head, rows, columns).values()
            for bias in biases:
                tile += bias
            tile -= float64(take(self._of("log_normaliser", head), rows))[:, None]
            tile[~self._visible(rows, columns)] = -np.inf
            return np.exp(tile, out=tile)
        query, key = float64(take(self._of("query", head), rows)), float64(take(self._of("key", head), columns))
        by_row = "log_decay" in self._arrays and self._arrays["log_decay"].ndim == 3
        tile = self._decay(head).products(query, key, rows, columns) if by_row else query @ key.T
        tile *= self.scale
        if "write" in self._arrays:
            tile *= float64(take(self._of("write", head), columns))[None, :]
        if "log_decay" in self._arrays and not by_row:
            fade = self._decay(head).log_between(rows, columns)
            tile *= np.exp(fade, out=fade)
        tile[~self._visible(rows, columns)] = 0.0
        return tile

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Where the rows at positions `rows` lie among those that are stored. FactorError naming the nearest ones."""
        stored = np.asarray(self._arrays["row_positions"])
        places = np.minimum(np.searchsorted(stored, rows), len(stored) - 1)
        for missing in rows[stored[places] != rows][:1]:
            near = sorted(stored[np.argsort(np.abs(stored - missing), kind="stable")[:3]].tolist())
            raise FactorError(
                f"layer {self.index} ({self.kind}) stores {len(stored)} of the {self.length} rows of its pattern and not row {missing}; "
                f"nearest stored: {', '.join(map(str, near))}. The run's pooled overview is of the whole pattern"
            )
        return places

    def _visible(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        if self.reads_source:
            return np.ones((len(rows), len(columns)), dtype=bool)
        distance = rows[:, None] - columns[None, :]
        window = self.length if self.window is None else self.window
        if self.causal:
            return (distance >= (1 if self.strict else 0)) & (distance < window)
        return np.abs(distance) < window

    def _mean_over_readers(self, total: np.ndarray) -> np.ndarray:
        if self.reads_source:
            return _divide(total, np.full(len(total), self.length))
        position = np.arange(self.length)
        window = self.length if self.window is None else self.window
        last = np.minimum(position + window, self.length)
        first = position + (1 if self.strict else 0) if self.causal else np.maximum(position + 1 - window, 0)
        return _divide(total, np.maximum(last - first, 0))

    def _need_probabilities(self) -> None:
        reason = self._why_no_probabilities()
        if reason:
            raise FactorError(f"layer {self.index} ({self.kind}): entropy is not defined, because {reason}")

    def _why_no_probabilities(self) -> str:
        if self.form == "softmax":
            return ""
        if self.pattern_record.get("signed", True):
            return "its pattern is signed and its rows are not probabilities; use received or the overview instead"
        if self.pattern_record.get("rows_sum_to") != 1:
            return f"its rows sum to {self.pattern_record.get('rows_sum_to')!r}, not to 1"
        return ""

    # ---- factors of one head ----------------------------------------------------------------------------------------

    def _group(self, name: str, head: int) -> int:
        return head * self._arrays[name].shape[0] // self.n_heads

    def _of(self, name: str, head: int) -> np.ndarray:
        if name not in self._arrays:
            raise FactorError(f"layer {self.index} ({self.kind}) stores no {name}")
        return self._arrays[name][self._group(name, head)]

    def _decay(self, head: int) -> Any:
        if head not in self._decays:
            log_decay = self._of("log_decay", head)
            self._decays[head] = CumulativeDecay(log_decay) if log_decay.ndim == 1 else ChannelDecay(log_decay)
        return self._decays[head]

    def _delta(self, head: int) -> DeltaRule:
        if head not in self._rules:
            log_decay = self._of("log_decay", head) if "log_decay" in self._arrays else None
            query, key, write = (self._of(name, head) for name in ("query", "key", "write"))
            self._rules[head] = DeltaRule(query, key, write, log_decay, self.scale)
        return self._rules[head]

    def _delta_rows(self, head: int, rows: np.ndarray) -> np.ndarray:
        """Whole rows at positions `rows`, kept for the next tile of the same rows: float64 [row, key]."""
        band = self._band
        if band is None or band[0] != head or not np.array_equal(band[1], rows):
            band = self._band = (head, rows, self._delta(head).rows(rows))
        return band[2]

    # ---- arguments --------------------------------------------------------------------------------------------------

    def places(self, head: int, queries: Positions, keys: Positions) -> tuple[int, np.ndarray, np.ndarray]:
        """Head, query positions and key positions as numbers. FactorError for one that this layer does not have."""
        return self._head(head), self._positions(queries, "query"), self._positions(keys, "key")

    def _head(self, head: int) -> int:
        if not isinstance(head, (int, np.integer)) or not 0 <= head < self.n_heads:
            raise FactorError(f"layer {self.index} has no head {head!r}: it has {self.n_heads} heads, counted from 0")
        return int(head)

    def _position(self, position: int, what: str) -> int:
        size = self._size(what)
        if not isinstance(position, (int, np.integer)) or not 0 <= position < size:
            whose = "source" if self.reads_source and what == "key" else "run"
            raise FactorError(f"{what} {position!r} is no position: the {whose} has {size} tokens, counted from 0")
        return int(position)

    def _size(self, what: str) -> int:
        return self.columns if what == "key" else self.length

    def _positions(self, positions: Positions, what: str) -> np.ndarray:
        if isinstance(positions, slice):
            chosen = np.arange(self._size(what))[positions]
        else:
            chosen = np.asarray(positions)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
                raise FactorError(f"{what} positions are a slice or a list of whole numbers, got {positions!r}")
            for position in chosen[(chosen < 0) | (chosen >= self._size(what))][:1]:
                self._position(int(position), what)
        if not len(chosen):
            raise FactorError(f"no {what} positions are chosen: {positions!r} of {self._size(what)} tokens is empty")
        return chosen


def float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def take(array: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`array[positions]`, as a view when the positions are consecutive: a mapped array is then read only there."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and (len(positions) < 3 or bool((np.diff(positions) == 1).all())):
        return array[first : last + 1]
    return array[positions]


def _entropy_terms(tile: np.ndarray) -> np.ndarray:
    logs = np.log(tile, out=np.zeros_like(tile), where=tile > 0)
    return -np.einsum("ij,ij->i", tile, logs)


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0).astype(np.float32)
