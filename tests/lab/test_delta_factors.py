"""Delta-rule layers and decays per row of the state, evaluated from factors: against the recurrence written out token by token."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from workbench.lab.delta_rule import CHUNK, DeltaRule
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.vector_decay import ChannelDecay

HEADS, LENGTH, KEY, VALUE = 2, 2 * CHUNK + 21, 7, 5
RECORD: dict[str, Any] = {"layer": 0, "kind": "test", "n_heads": HEADS, "n_key_heads": 1, "scale": 0.4}


def factors(form: str, decay: str, seed: int = 0, speed: float = 0.3) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    key = g.standard_normal((1, LENGTH, KEY))
    arrays = {
        "query": g.standard_normal((HEADS, LENGTH, KEY)),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": g.standard_normal((HEADS, LENGTH, VALUE)),
        "write": g.uniform(0, 1.9, (HEADS, LENGTH)),
    }
    if decay != "none":
        shape = (HEADS, LENGTH, KEY) if decay == "vector" else (HEADS, LENGTH)
        arrays["log_decay"] = -speed * g.exponential(size=shape)
    return arrays


def slow(form: str, arrays: dict[str, np.ndarray], head: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [pos, width] and states [pos, state_k, width] by the definition, for any values [pos, width]."""
    state = np.zeros((KEY, values.shape[1]))
    outputs, states = [], []
    for t in range(LENGTH):
        key, query = arrays["key"][0, t], arrays["query"][head, t]
        if "log_decay" in arrays:
            state = np.exp(arrays["log_decay"][head, t]).reshape(-1, 1) * state
        recalled = key @ state if form == "delta" else 0.0
        state = state + np.outer(key, arrays["write"][head, t] * (values[t] - recalled))
        outputs.append(RECORD["scale"] * query @ state)
        states.append(state)
    return np.array(outputs), np.array(states)


CASES = [("delta", "none"), ("delta", "scalar"), ("delta", "vector"), ("gated_linear", "vector")]


@pytest.mark.parametrize(("form", "decay"), CASES)
def test_patterns_are_those_of_the_recurrence(form: str, decay: str) -> None:
    """One-hot values through the recurrence give the pattern: rows, tiles, single cells and what is computed from them."""
    arrays = factors(form, decay)
    layer = LayerFactors({**RECORD, "form": form}, arrays)
    for head in range(HEADS):
        expected, _ = slow(form, arrays, head, np.eye(LENGTH))
        assert np.abs(layer.pattern(head) - expected).max() < 1e-6 * np.abs(expected).max()
        rows, columns = [LENGTH - 1, 3, CHUNK, CHUNK - 1], [0, LENGTH - 1, 5, CHUNK]
        assert np.allclose(layer.pattern(head, rows, columns), expected[np.ix_(rows, columns)], atol=1e-6)
        assert np.allclose(layer.row(head, CHUNK + 3), expected[CHUNK + 3], atol=1e-6)
        assert layer.value(head, CHUNK + 3, 2) == pytest.approx(expected[CHUNK + 3, 2], rel=1e-9, abs=1e-12)
        seen = LENGTH - np.arange(LENGTH)
        assert np.allclose(layer.received(head), np.abs(expected).sum(0) / seen, atol=1e-6)
        profile = [np.diagonal(expected, -n).mean() for n in range(5)]
        assert np.allclose(layer.offset_profile(head, 5), profile, atol=1e-6)


@pytest.mark.parametrize(("form", "decay"), CASES)
def test_states_are_those_of_the_recurrence(form: str, decay: str) -> None:
    arrays = factors(form, decay, seed=1)
    layer = LayerFactors({**RECORD, "form": form}, arrays)
    for head in range(HEADS):
        _, states = slow(form, arrays, head, arrays["value"][head])
        for position in (0, CHUNK - 1, CHUNK, LENGTH - 1):
            assert np.allclose(layer.state(head, position), states[position], atol=1e-6)
        assert np.allclose(layer.state_entry(head, 3, 2), states[:, 3, 2], atol=1e-6)
        assert np.allclose(layer.state_norms(head), np.linalg.norm(states, axis=(1, 2)), rtol=1e-6)
        assert np.allclose(layer.state_difference(head, 4, 70), states[70] - states[4], atol=1e-6)


@pytest.mark.parametrize("form", ["delta", "gated_linear"])
def test_fast_decays_neither_overflow_nor_leak(form: str) -> None:
    """Sums of decays far beyond what a float64 exponential can hold, and resets to nothing, give what the recurrence gives."""
    arrays = factors(form, "vector", seed=2, speed=60.0)
    arrays["log_decay"][:, 40] = -np.inf
    arrays["log_decay"][:, :, 0] *= 1e-3  # one row remembers
    arrays["log_decay"][:, 40, 0] = -1e-3
    layer = LayerFactors({**RECORD, "form": form}, arrays)
    with np.errstate(over="raise", invalid="raise"):
        for head in range(HEADS):
            expected, _ = slow(form, arrays, head, np.eye(LENGTH))
            _, states = slow(form, arrays, head, arrays["value"][head])
            assert np.abs(layer.pattern(head) - expected).max() < 1e-6 * np.abs(expected).max()
            assert np.allclose(layer.state(head, 41), states[41], atol=1e-6)


def test_products_in_blocks_are_the_direct_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The splitting that long texts need, against every difference formed; rows and columns in any order."""
    g = np.random.default_rng(3)
    decay = ChannelDecay(-g.exponential(size=(300, KEY)))
    query, key = g.standard_normal((2, 300, KEY))
    rows, columns = g.permutation(300)[:200], g.permutation(300)[:170]
    direct = decay.products(query[rows], key[columns], rows, columns)
    monkeypatch.setattr("workbench.lab.vector_decay.DIRECT", 0)
    assert np.abs(decay.products(query[rows], key[columns], rows, columns) - direct).max() < 1e-12
    everything = np.arange(300)
    ordered = decay.products(query, key, everything, everything)
    assert np.allclose(ordered[np.ix_(rows, columns)], direct, atol=1e-12)


def test_mistakes_are_named() -> None:
    arrays = factors("delta", "vector")
    with pytest.raises(FactorError, match=r"lacks the factor\(s\) write"):
        LayerFactors({**RECORD, "form": "delta"}, {name: arrays[name] for name in ("query", "key")})
    with pytest.raises(FactorError, match="the delta rule is not strict"):
        LayerFactors({**RECORD, "form": "delta", "strict": True}, arrays)
    with pytest.raises(FactorError, match="entropy is not defined"):
        LayerFactors({**RECORD, "form": "delta"}, arrays).entropy(0)
    wrong = {**arrays, "log_decay": arrays["log_decay"][..., :3]}
    with pytest.raises(FactorError, match="factor log_decay has shape"):
        LayerFactors({**RECORD, "form": "delta"}, wrong)
    arrays["log_decay"][0, 4, 2] = 0.1
    with pytest.raises(ValueError, match=r"log decay at position 4, channel 2 is 0\.1, expected at most 0"):
        LayerFactors({**RECORD, "form": "delta"}, arrays).pattern(0)


def test_memory_of_long_texts_is_a_few_rows() -> None:
    """Rows of a long text need no pos × pos system, which alone would be 134 MB."""
    g = np.random.default_rng(4)
    key = g.standard_normal((4096, 16))
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    query, write, log_decay = g.standard_normal((4096, 16)), g.uniform(0, 1, 4096), -0.1 * g.exponential(size=4096)
    tracemalloc.start()
    rows = DeltaRule(query, key, write, log_decay).rows(np.arange(4000, 4096))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.shape == (96, 4096) and np.isfinite(rows).all() and peak < 40e6
