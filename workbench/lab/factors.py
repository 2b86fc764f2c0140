"""Patterns and states of one layer, evaluated from the factors that a run stores.

    factors = LayerFactors.from_run(store.open(run_id), layer=1)
    factors.pattern(head=0, queries=slice(0, 64))          # exact tile
    factors.overview(head=0, size=512)                     # pooled picture of any length
    factors.state(head=0, position=40)                     # [state_k, state_v]
    factors.slot("normaliser").state(head=0, position=40)  # of a layer that carries more than one thing
    factors.retention(head=0)                              # what the state still answers: [after, of]

The pattern side is `PatternFactors`; this module adds what the layer carries from token to token: a matrix state, the
stored states of a dense layer, or the key-value cache of a softmax layer. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from workbench.lab.linear_state import LinearState
from workbench.lab.pattern_factors import FactorError, PatternFactors, Positions, float64, take
from workbench.lab.run_format import OVERVIEW_SIZE, did_you_mean

__all__ = ["FactorError", "LayerFactors", "StateEntry"]


class StateEntry(NamedTuple):
    """One entry of a matrix state."""

    state_k: int
    state_v: int
    value: float


def state_slots(layer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a layer carries from token to token, from its record: `{name, axes, shape, ...}` each, the main state first."""
    state = layer.get("state") or {}
    if state.get("role") != "state":
        return []
    return list(layer.get("states") or [{"name": "state", **state}])


class LayerFactors(PatternFactors):
    """Everything about one layer that its factors tell. Made like `PatternFactors`, usually by `from_run`."""

    def __init__(self, layer: Mapping, arrays: Mapping[str, np.ndarray], length: int | None = None):
        super().__init__(layer, arrays, length)
        self._record, self._given = dict(layer), arrays
        self._delta_states: dict[int, LinearState] = {}

    @property
    def slots(self) -> list[dict[str, Any]]:
        """What the layer carries from token to token, `{name, axes, shape, ...}` each; the first is what `state` is about."""
        return state_slots(self._record)

    def slot(self, name: str) -> LayerFactors:
        """The same layer with another of the things that it carries as its state. FactorError names those that there are."""
        known = {slot["name"]: slot for slot in self.slots}
        if name not in known:
            raise FactorError(f"layer {self.index} ({self.kind}) carries no {name!r}.{did_you_mean(name, known)}")
        chosen, arrays = known[name], dict(self._given)
        if name == self.slots[0]["name"]:
            return self
        if chosen.get("array") is not None:
            arrays["states"] = arrays[f"states.{name}"]
        else:  # the same sums, of values that are all 1
            arrays["value"] = np.ones((1, self.length, 1), dtype=np.float32)
        return LayerFactors({**self._record, "state": {"role": "state", **chosen}, "states": None}, arrays, self.length)

    def summaries(self, size: int = OVERVIEW_SIZE) -> dict[str, np.ndarray]:
        """What a trace run stores beside the factors, as float32.

        `PatternFactors.summaries` where the whole pattern is there and, for layers with a state, `state_norm` [head,
        pos].
        """
        collected = super().summaries(size) if self.whole else {}
        if (self.form in ("gated_linear", "delta") and "value" in self._arrays) or (
            self.form == "dense" and "states" in self._arrays
        ):
            collected["state_norm"] = np.stack([self.state_norms(head) for head in range(self.n_heads)])
        return collected

    def state(self, head: int, position: int) -> np.ndarray:
        """The state that the layer hands on once token `position` is read and written: float32 [state_k, state_v].

        Softmax layers carry a cache instead (`cache_keys`, `cache_values`). Dense layers have the states that were
        stored; a vector state is one column.
        """
        return self._state(self._head(head), self._position(position, "position")).astype(np.float32)

    def state_positions(self) -> np.ndarray:
        """Positions after which the state can be told: all, or those at which a dense layer stores it."""
        self._need_state()
        return self._stored_positions() if self.form == "dense" else np.arange(self.length)

    def state_entry(self, head: int, i: int, j: int) -> np.ndarray:
        """Entry [i, j] of the state after every token: float32 [pos].

        O(pos). For dense layers nan where no state is stored.
        """
        head = self._head(head)
        self._need_state()
        if self.form == "dense":
            states = self._stored_states(head)
            self._check_entry(i, j, states.shape[1:])
            trace = np.full(self.length, np.nan)
            trace[self._stored_positions()] = states[:, i, j]
            return trace.astype(np.float32)
        state = self._linear_state(head)
        self._check_entry(i, j, (state.key.shape[1], state.value.shape[1]))
        return state.entry(i, j).astype(np.float32)

    def state_norms(self, head: int) -> np.ndarray:
        """Frobenius norm of the state after every token: float32 [pos].

        For dense layers nan where no state is stored.
        """
        head = self._head(head)
        self._need_state()
        if self.form == "dense":
            norms = np.full(self.length, np.nan)
            norms[self._stored_positions()] = np.sqrt((self._stored_states(head).astype(np.float64) ** 2).sum((1, 2)))
            return norms.astype(np.float32)
        return self._linear_state(head).norms().astype(np.float32)

    def state_difference(self, head: int, t0: int, t1: int) -> np.ndarray:
        """State after `t1` minus state after `t0`: float32 [state_k, state_v]."""
        head, start, end = self._head(head), self._position(t0, "t0"), self._position(t1, "t1")
        return (self._state(head, end) - self._state(head, start)).astype(np.float32)

    def top_entries(self, head: int, position: int, n: int = 10) -> list[StateEntry]:
        """The n entries of the state of largest magnitude, largest first; ties in index order."""
        if n < 1:
            raise FactorError(f"top_entries needs at least one entry, got n = {n}")
        state = self._state(self._head(head), self._position(position, "position"))
        size = np.abs(state).ravel()
        n = min(n, size.size)
        threshold = np.partition(size, size.size - n)[size.size - n]
        candidates = np.flatnonzero(size >= threshold)
        chosen = candidates[np.argsort(-size[candidates], kind="stable")[:n]]
        columns = state.shape[1]
        return [StateEntry(int(c) // columns, int(c) % columns, float(state.flat[c])) for c in chosen]

    def state_spectrum(self, head: int, position: int) -> np.ndarray:
        """Singular values of the state, largest first: float32 [min(state_k, state_v)]."""
        state = self._state(self._head(head), self._position(position, "position"))
        return np.linalg.svd(state, compute_uv=False).astype(np.float32)

    def retention(self, head: int, positions: Positions = slice(None), keys: Positions = slice(None)) -> np.ndarray:
        """How well the state after each of the ascending `positions` answers the keys of tokens `keys` with their values.

        The cosine of Sᵀk and v, float32 [position, key]: 1 is remembered, 0 forgotten; nan for tokens not written yet. The
        levels of a log-linear state answer together; rows after which a dense layer stores no state are nan. FactorError
        where a state does not answer keys by a product.
        """
        head = self._head(head)
        self._need_state()
        after, chosen = self._positions(positions, "state"), self._positions(keys, "key")
        for name in ("key", "value"):
            if name not in self._arrays:
                raise FactorError(
                    f"layer {self.index} ({self.kind}) stores no {name}s that its state could be asked for"
                )
        asked, truth = (float64(take(self._of(name, head), chosen)) for name in ("key", "value"))
        cosines = np.full((len(after), len(chosen)), np.nan, dtype=np.float32)
        sizes = np.linalg.norm(truth, axis=1)
        for row, (position, answers) in enumerate(zip(after, self._recalled(head, asked, after), strict=True)):
            scale = np.linalg.norm(answers, axis=1) * sizes
            cosine = np.divide((answers * truth).sum(1), scale, out=np.zeros(len(scale)), where=scale != 0)
            cosines[row] = np.where(chosen <= position, cosine, np.nan)
        return cosines

    def _recalled(self, head: int, keys: np.ndarray, positions: Iterable[int]) -> Iterator[np.ndarray]:
        """What the states after `positions` answer to `keys` [key, state_k]: [key, state_v] each."""
        if self.form != "dense":
            yield from self._linear_state(head).recalled(keys, positions)
            return
        axes = self.slots[0]["axes"]
        if axes[-2:] != ["state_k", "state_v"]:
            raise FactorError(
                f"the state of layer {self.index} ({self.kind}) is {' × '.join(axes[1:]).replace('_', ' ') or 'a number'}: "
                "it answers no key by a product. Where its model can be asked what it remembers, probes.state_tools.retention_matrix does"
            )
        nothing, stored = np.full((len(keys), self.slots[0]["shape"][-1]), np.nan), set(self.state_positions().tolist())
        for position in positions:
            if position not in stored:
                yield nothing
                continue
            state = self._state(head, position)
            yield keys @ state.reshape(-1, keys.shape[1], state.shape[1]).sum(0)

    def cache_positions(self, position: int) -> np.ndarray:
        """Positions in the cache of a softmax layer after token `position`: all so far, or the last `window`."""
        if self.form != "softmax":
            raise FactorError(f"layer {self.index} is {self.form}: it has no key-value cache; ask for its state")
        position = self._position(position, "position")
        return np.arange(0 if self.window is None else max(0, position + 1 - self.window), position + 1)

    def cache_keys(self, head: int, position: int) -> np.ndarray:
        """Keys that head `head` has in the cache after token `position`: float32 [pos, d_head]."""
        return self._cached("key", head, position)

    def cache_values(self, head: int, position: int) -> np.ndarray:
        """Values that head `head` has in the cache after token `position`: float32 [pos, d_head]."""
        return self._cached("value", head, position)

    def _linear_state(self, head: int) -> LinearState:
        """The state of a gated linear head; or of a delta-rule head, which is one that writes its pseudo-values."""
        if self.form == "delta":
            if head not in self._delta_states:
                written = self._delta(head).pseudo_values(self._of("value", head))
                log_decay = self._of("log_decay", head) if "log_decay" in self._arrays else None
                self._delta_states[head] = LinearState(self._of("key", head), written, None, log_decay)
            return self._delta_states[head]
        write, log_decay = (self._of(name, head) if name in self._arrays else None for name in ("write", "log_decay"))
        return LinearState(self._of("key", head), self._of("value", head), write, log_decay)

    def _need_state(self) -> None:
        if self.form == "softmax":
            raise FactorError(
                f"layer {self.index} ({self.kind}) carries a key-value cache, not a matrix state: "
                "use cache_keys, cache_values and cache_positions"
            )
        if self.form == "dense" and not self._arrays.get("states", np.empty(0)).size:
            raise FactorError(f"layer {self.index} ({self.kind}) stores no states")

    def _state(self, head: int, position: int) -> np.ndarray:
        self._need_state()
        if self.form != "dense":
            return self._linear_state(head).at(position)
        stored = self._stored_positions()
        place = np.flatnonzero(stored == position)
        if not len(place):
            near = stored[np.argsort(np.abs(stored - position), kind="stable")[:3]]
            raise FactorError(
                f"layer {self.index} ({self.kind}) stores no state after token {position}; "
                f"nearest stored: {', '.join(map(str, sorted(near.tolist())))}"
            )
        return float64(self._stored_states(head)[place[0]])

    def _stored_states(self, head: int) -> np.ndarray:
        states = self._of("states", head)
        return states[..., None] if states.ndim == 2 else states

    def _stored_positions(self) -> np.ndarray:
        count = self._arrays["states"].shape[1]
        positions = np.asarray(self._arrays.get("state_positions", np.arange(count)))
        if positions.shape != (count,) or ("state_positions" not in self._arrays and count != self.length):
            raise FactorError(
                f"layer {self.index} ({self.kind}) stores {count} states but not at which positions: "
                f"expected the array layer.{self.index}.state_positions of that length"
            )
        return positions

    def _cached(self, name: str, head: int, position: int) -> np.ndarray:
        positions = self.cache_positions(position)
        return take(self._of(name, self._head(head)), positions).astype(np.float32)

    def _check_entry(self, i: int, j: int, shape: tuple[int, ...]) -> None:
        for name, entry, size in (("state_k", i, shape[0]), ("state_v", j, shape[1])):
            if not isinstance(entry, (int, np.integer)) or not 0 <= entry < size:
                raise FactorError(f"the state of layer {self.index} has no {name} {entry!r}: it has {size}, from 0")
