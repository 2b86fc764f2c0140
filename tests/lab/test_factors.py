"""Patterns and states from factors against the equations of the run contract, cell by cell and token by token in float64."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.linear_state import CumulativeDecay, LinearState
from workbench.lab.pooling import pool
from workbench.lab.runs import RunStore
from workbench.lab.synthetic_runs import write_synthetic_runs

LENGTH = 37


def record(form: str, heads: int = 4, key_heads: int = 2, value_heads: int = 1, **fields: Any) -> dict[str, Any]:
    pattern = {"signed": form != "softmax", "rows_sum_to": 1 if form == "softmax" else None, "causal": True}
    return {"layer": 0, "kind": "test", "form": form, "n_heads": heads, "n_key_heads": key_heads, "scale": 0.3,
            "n_value_heads": value_heads, "strict": False, "pattern": pattern, **fields}  # fmt: skip


def factors(layer: dict[str, Any], *extra: str, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    heads = layer["n_heads"]
    made = {
        "query": generator.standard_normal((heads, length, 6)),
        "key": generator.standard_normal((layer["n_key_heads"], length, 6)),
        "value": generator.standard_normal((layer["n_value_heads"], length, 5)),
        "log_normaliser": generator.standard_normal((heads, length)) + 2,
        "log_decay": -generator.exponential(0.2, (heads, length)),
        "write": generator.standard_normal((heads, length)),
    }
    return {name: made[name].astype(np.float32) for name in ("query", "key", "value", *extra)}


def naive_pattern(layer: dict[str, Any], arrays: dict[str, np.ndarray], head: int) -> np.ndarray:
    """Two loops over the equations of the run contract."""
    length, heads = arrays["query"].shape[1], layer["n_heads"]
    group = head * arrays["key"].shape[0] // heads
    result = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            if layer["pattern"]["causal"] and (j > i or (layer["strict"] and j == i)):
                continue
            if layer.get("window") and abs(i - j) >= layer["window"]:
                continue
            dot = sum(
                float(a) * float(b) for a, b in zip(arrays["query"][head, i], arrays["key"][group, j], strict=True)
            )
            score = layer["scale"] * dot
            if layer["form"] == "softmax":
                slope = layer["alibi_slopes"][head] if layer.get("alibi_slopes") else 0.0
                result[i, j] = math.exp(score - slope * abs(i - j) - float(arrays["log_normaliser"][head, i]))
            else:
                weight = float(arrays["write"][head, j]) if "write" in arrays else 1.0
                decay = (
                    sum(float(g) for g in arrays["log_decay"][head, j + 1 : i + 1]) if "log_decay" in arrays else 0.0
                )
                result[i, j] = score * weight * math.exp(decay)
    return result


def naive_states(arrays: dict[str, np.ndarray], heads: int, head: int) -> np.ndarray:
    """[pos, state_k, state_v] by the recurrence, token by token."""
    key = arrays["key"][head * arrays["key"].shape[0] // heads].astype(np.float64)
    value = arrays["value"][head * arrays["value"].shape[0] // heads].astype(np.float64)
    state, states = np.zeros((key.shape[1], value.shape[1])), []
    for t in range(len(key)):
        decay = math.exp(arrays["log_decay"][head, t]) if "log_decay" in arrays else 1.0
        weight = float(arrays["write"][head, t]) if "write" in arrays else 1.0
        state = decay * state + weight * np.outer(key[t], value[t])
        states.append(state)
    return np.array(states)


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "softmax": (record("softmax"), ("log_normaliser",)),
    "alibi": (record("softmax", alibi_slopes=[0.5, 0.25, 0.125, 0.0]), ("log_normaliser",)),
    "window": (record("softmax", window=9, alibi_slopes=[0.1] * 4), ("log_normaliser",)),
    "encoder": (record("softmax", pattern={"signed": False, "rows_sum_to": 1, "causal": False}), ("log_normaliser",)),
    "encoder window": (
        record("softmax", window=5, pattern={"signed": False, "rows_sum_to": 1, "causal": False}),
        ("log_normaliser",),
    ),
    "linear": (record("gated_linear"), ()),
    "strict": (record("gated_linear", strict=True), ()),
    "decay": (record("gated_linear"), ("log_decay",)),
    "decay write": (record("gated_linear", key_heads=1, value_heads=4), ("log_decay", "write")),
    "strict decay write": (record("gated_linear", strict=True, key_heads=4), ("log_decay", "write")),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[LayerFactors, dict[str, Any], dict[str, np.ndarray]]:
    layer, extra = CASES[request.param]
    arrays = factors(layer, *extra)
    return LayerFactors(layer, arrays), layer, arrays


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the text, so that streaming has seams to get wrong."""
    monkeypatch.setattr("workbench.lab.pattern_factors.TILE_ROWS", 8)
    monkeypatch.setattr("workbench.lab.pattern_factors.TILE_COLUMNS", 5)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the rounding of the result to float32."""
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(expected), initial=0))


# ---- pattern --------------------------------------------------------------------------------------------------------


def test_pattern_tiles_rows_and_values(case: tuple) -> None:
    layer_factors, layer, arrays = case
    for head in range(layer["n_heads"]):
        expected = naive_pattern(layer, arrays, head)
        close(layer_factors.pattern(head), expected)
        close(layer_factors.pattern(head, slice(20, 31), slice(3, 29)), expected[20:31, 3:29])
        close(layer_factors.pattern(head, slice(1, None, 5), [7, 2, 2, 36]), expected[1::5][:, [7, 2, 2, 36]])
        close(layer_factors.row(head, 17), expected[17])
        for i, j in ((0, 0), (36, 0), (20, 19), (3, 30), (36, 36)):
            assert layer_factors.value(head, i, j) == pytest.approx(expected[i, j], rel=1e-10)
        hidden = ~layer_factors.visible()
        assert (expected[hidden] == 0).all() and (expected[~hidden] != 0).all()


@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_overview(case: tuple, kind: str) -> None:
    layer_factors, layer, arrays = case
    for head in (0, 3):
        expected = naive_pattern(layer, arrays, head)
        close(layer_factors.overview(head, 10, kind=kind), pool(expected, 10, 10, kind))
        close(layer_factors.overview(head, 500, kind=kind), expected)
        part = pool(expected[11:30, 4:33], 6, 7, kind)
        close(layer_factors.overview(head, (6, 7), slice(11, 30), slice(4, 33), kind), part)


def test_received(case: tuple) -> None:
    layer_factors, layer, arrays = case
    for head in range(layer["n_heads"]):
        pattern, visible = np.abs(naive_pattern(layer, arrays, head)), layer_factors.visible()
        readers = [[pattern[i, j] for i in range(LENGTH) if visible[i, j]] for j in range(LENGTH)]
        close(layer_factors.received(head), np.array([np.mean(column) if column else np.nan for column in readers]))
    assert np.isnan(layer_factors.received(0)[-1]) == layer["strict"]


def test_offset_profile(case: tuple) -> None:
    layer_factors, layer, arrays = case
    for head in (0, 2):
        pattern, visible = naive_pattern(layer, arrays, head), layer_factors.visible()
        expected = []
        for offset in range(50):
            cells = [pattern[i, i - offset] for i in range(offset, LENGTH) if visible[i, i - offset]]
            expected.append(np.mean(cells) if cells else np.nan)
        assert np.isnan(expected[-1])
        close(layer_factors.offset_profile(head, 50), np.array(expected))
        close(layer_factors.offset_profile(head, 6), np.array(expected[:6]))


def test_entropy_of_probabilities_and_refusal_of_signed_maps(case: tuple) -> None:
    layer_factors, layer, arrays = case
    if layer["form"] != "softmax":
        with pytest.raises(FactorError, match="entropy is not defined, because its pattern is signed"):
            layer_factors.entropy(0)
        return
    for head in (0, 3):
        expected = [-sum(a * math.log(a) for a in row if a > 0) for row in naive_pattern(layer, arrays, head)]
        close(layer_factors.entropy(head), np.array(expected))


def test_summaries_are_the_single_answers(case: tuple) -> None:
    layer_factors, layer, _ = case
    summaries = layer_factors.summaries(size=9)
    heads = range(layer["n_heads"])
    np.testing.assert_array_equal(summaries["overview"], np.stack([layer_factors.overview(head, 9) for head in heads]))
    np.testing.assert_array_equal(summaries["received"], np.stack([layer_factors.received(head) for head in heads]))
    if layer["form"] == "softmax":
        np.testing.assert_array_equal(summaries["entropy"], np.stack([layer_factors.entropy(head) for head in heads]))
        assert set(summaries) == {"overview", "received", "entropy"}
    else:
        norms = np.stack([layer_factors.state_norms(head) for head in heads])
        np.testing.assert_array_equal(summaries["state_norm"], norms)
        assert set(summaries) == {"overview", "received", "state_norm"}


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in CASES if CASES[name][0]["form"] == "gated_linear"])
def linear(request: pytest.FixtureRequest) -> tuple[LayerFactors, dict[str, Any], dict[str, np.ndarray]]:
    layer, extra = CASES[request.param]
    arrays = factors(layer, *extra, length=150)  # more than two chunks of the norm's recurrence
    return LayerFactors(layer, arrays), layer, arrays


def test_states_equal_the_recurrence(linear: tuple) -> None:
    layer_factors, layer, arrays = linear
    for head in range(layer["n_heads"]):
        states = naive_states(arrays, layer["n_heads"], head)
        for t in (0, 1, 63, 64, 149):
            close(layer_factors.state(head, t), states[t])
            close(layer_factors.state_spectrum(head, t), np.linalg.svd(states[t], compute_uv=False))
        close(layer_factors.state_entry(head, 2, 4), states[:, 2, 4])
        close(layer_factors.state_norms(head), np.linalg.norm(states, axis=(1, 2)))
        close(layer_factors.state_difference(head, 30, 90), states[90] - states[30])


def test_the_pattern_is_what_the_state_hands_out(linear: tuple) -> None:
    """scale · q_t S = Σ_j α_tj v_j: the two sides of one layer, S before token t when strict and after it otherwise."""
    layer_factors, layer, arrays = linear
    head, t = 1, 80
    value = arrays["value"][head * layer["n_value_heads"] // layer["n_heads"]]
    # A strict row reads the state before token t, decayed once more on the way to t.
    fade = math.exp(arrays["log_decay"][head, t]) if layer["strict"] and "log_decay" in arrays else 1.0
    read = layer["scale"] * fade * arrays["query"][head, t] @ layer_factors.state(head, t - 1 if layer["strict"] else t)
    np.testing.assert_allclose(layer_factors.row(head, t) @ value, read, rtol=1e-4, atol=1e-4 * np.abs(read).max())


def test_top_entries(linear: tuple) -> None:
    layer_factors, layer, arrays = linear
    state = naive_states(arrays, layer["n_heads"], 3)[100]
    ranked = sorted(np.ndindex(state.shape), key=lambda at: -abs(state[at]))
    top = layer_factors.top_entries(3, 100, n=7)
    assert [(entry.state_k, entry.state_v) for entry in top] == ranked[:7]
    assert [entry.value for entry in top] == pytest.approx([state[at] for at in ranked[:7]])
    assert len(layer_factors.top_entries(3, 100, n=999)) == state.size


def test_top_entries_break_ties_in_index_order() -> None:
    layer = record("gated_linear", heads=1, key_heads=1)
    ones = {name: np.ones((1, 3, 4), np.float32) for name in ("query", "key", "value")}
    top = LayerFactors(layer, ones).top_entries(0, 2, n=5)
    assert [entry[:2] for entry in top] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_strong_and_total_decay_stay_finite_and_exact() -> None:
    """Cumulated decays of −50,000 and resets of −∞, where exp(G_i) · exp(−G_j) would be 0 · ∞."""
    layer = record("gated_linear", heads=1, key_heads=1)
    arrays = factors(layer, "log_decay", length=120)
    arrays["log_decay"][:] = -0.01
    arrays["log_decay"][0, 10:80] = -700.0
    arrays["log_decay"][0, [0, 90, 100]] = -np.inf
    layer_factors = LayerFactors(layer, arrays)
    expected, states = naive_pattern(layer, arrays, 0), naive_states(arrays, 1, 0)
    assert np.isfinite(expected).all() and (expected[95, :90] == 0).all() and expected[95, 90] != 0
    close(layer_factors.pattern(0), expected)
    close(layer_factors.state(0, 99), states[99])
    close(layer_factors.state_entry(0, 1, 1), states[:, 1, 1])
    close(layer_factors.state_norms(0), np.linalg.norm(states, axis=(1, 2)))


def test_norms_where_writes_cancel() -> None:
    """The second token takes back what the first wrote: the true norm is 0, and the documented accuracy is 1e-8."""
    key = np.array([[3.0, 1.0], [3.0, 1.0], [0.5, 0.0]])
    value = np.array([[2.0, 7.0], [-2.0, -7.0], [1.0, 0.0]])
    norms = LinearState(key, value).norms()
    np.testing.assert_allclose(norms, [math.sqrt(530), 0, 0.5], atol=3e-8 * math.sqrt(530))


@pytest.mark.parametrize("bad", [0.5, np.nan])
def test_a_decay_that_is_no_decay_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=f"log decay at position 2 is {bad}, expected at most 0"):
        CumulativeDecay(np.array([0.0, -1.0, bad]))


# ---- caches and stored maps -----------------------------------------------------------------------------------------


def test_softmax_layers_have_a_cache_instead_of_a_state() -> None:
    layer, extra = CASES["window"]
    arrays = factors(layer, *extra)
    layer_factors = LayerFactors(layer, arrays)
    np.testing.assert_array_equal(layer_factors.cache_positions(20), np.arange(12, 21))
    np.testing.assert_array_equal(layer_factors.cache_positions(3), np.arange(4))
    np.testing.assert_array_equal(layer_factors.cache_keys(3, 20), arrays["key"][1, 12:21])
    np.testing.assert_array_equal(layer_factors.cache_keys(1, 20), arrays["key"][0, 12:21])
    np.testing.assert_array_equal(layer_factors.cache_values(3, 20), arrays["value"][0, 12:21])
    for ask in (lambda: layer_factors.state(0, 3), lambda: layer_factors.state_norms(0),
                lambda: layer_factors.top_entries(0, 3), lambda: layer_factors.state_entry(0, 1, 1)):  # fmt: skip
        with pytest.raises(FactorError, match="carries a key-value cache, not a matrix state: use cache_keys"):
            ask()
    linear = LayerFactors(CASES["linear"][0], factors(CASES["linear"][0]))
    with pytest.raises(FactorError, match="is gated_linear: it has no key-value cache; ask for its state"):
        linear.cache_keys(0, 3)


def test_dense_layers_give_back_what_is_stored() -> None:
    generator = np.random.default_rng(3)
    pattern = generator.standard_normal((2, LENGTH, LENGTH)).astype(np.float32)
    states = generator.standard_normal((2, 3, 4, 5)).astype(np.float32)
    layer = record("dense", heads=2)
    arrays = {"pattern": pattern, "states": states, "state_positions": np.array([0, 20, 36], np.int32)}
    layer_factors = LayerFactors(layer, arrays)
    np.testing.assert_array_equal(layer_factors.pattern(1, slice(3, 9), [5, 1]), pattern[1, 3:9][:, [5, 1]])
    close(layer_factors.overview(1, 10), pool(pattern[1].astype(np.float64), 10, 10))
    assert layer_factors.value(0, 4, 30) == pattern[0, 4, 30]
    np.testing.assert_array_equal(layer_factors.state(1, 20), states[1, 1])
    np.testing.assert_array_equal(layer_factors.state_entry(1, 2, 3)[[0, 20, 36]], states[1, :, 2, 3])
    assert np.isnan(layer_factors.state_entry(1, 2, 3)).sum() == LENGTH - 3
    close(layer_factors.state_norms(0)[[0, 20, 36]], np.linalg.norm(states[0], axis=(1, 2)))
    with pytest.raises(FactorError, match="no state after token 21; nearest stored: 0, 20, 36"):
        layer_factors.state(0, 21)
    with pytest.raises(FactorError, match="entropy is not defined"):
        layer_factors.entropy(0)
    with pytest.raises(FactorError, match="3 states but not at which positions"):
        LayerFactors(layer, {"pattern": pattern, "states": states}).state(0, 0)
    vectors = LayerFactors(layer, {**arrays, "states": states[:, :, :, 0]})
    np.testing.assert_array_equal(vectors.state(1, 20), states[1, 1, :, :1])


def test_dense_probabilities_have_an_entropy() -> None:
    layer = record("dense", heads=1, key_heads=1, pattern={"signed": False, "rows_sum_to": 1, "causal": True})
    pattern = np.tril(np.ones((1, 8, 8))) / np.arange(1, 9)[:, None]
    close(LayerFactors(layer, {"pattern": pattern}).entropy(0), np.log(np.arange(1, 9)))


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    layer, extra = CASES["softmax"]
    arrays = factors(layer, *extra)
    layer_factors = LayerFactors(layer, arrays)
    expectations = [
        (lambda: layer_factors.pattern(4), "no head 4: it has 4 heads, counted from 0"),
        (lambda: layer_factors.pattern(-1), "no head -1"),
        (lambda: layer_factors.value(0, 37, 0), "query 37 is no position: the run has 37 tokens"),
        (lambda: layer_factors.value(0, 3, -1), "key -1 is no position"),
        (lambda: layer_factors.pattern(0, slice(40, 50)), "no query positions are chosen"),
        (lambda: layer_factors.pattern(0, slice(None), [1, 99]), "key 99 is no position"),
        (lambda: layer_factors.pattern(0, slice(None), np.array([0.5])), "a slice or a list of whole numbers"),
        (lambda: layer_factors.offset_profile(0, 0), "at least one distance"),
        (lambda: layer_factors.overview(0, kind="median"), "unknown pooling 'median'"),
        (lambda: LayerFactors(layer, {"query": arrays["query"]}), r"lacks the factor\(s\) key, log_normaliser"),
        (lambda: LayerFactors({**layer, "form": None}, arrays), "has no pattern: its record has no form"),
        (lambda: LayerFactors({**layer, "strict": True}, arrays), "leaves its first row without a source"),
        (lambda: LayerFactors({**layer, "form": "sofmax"}, arrays), "form is 'sofmax', expected one of softmax"),
        (lambda: LayerFactors(layer, {**arrays, "key": arrays["key"][:, :5]}), r"key has shape \(2, 5, 6\)"),
        (lambda: LayerFactors({**CASES["linear"][0], "window": 3}, arrays), "has no window"),
    ]
    for ask, message in expectations:
        with pytest.raises(ValueError, match=message):
            ask()
    linear_factors = LayerFactors(CASES["linear"][0], factors(CASES["linear"][0]))
    with pytest.raises(FactorError, match="no state_v 5: it has 5, from 0"):
        linear_factors.state_entry(0, 0, 5)


def test_a_tile_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, extra = CASES["softmax"]
    layer_factors = LayerFactors(layer, factors(layer, *extra))
    monkeypatch.setattr("workbench.lab.pattern_factors.LARGEST_TILE", 100)
    with pytest.raises(FactorError, match=r"a tile of 37 × 37 cells is larger than 100 cells: .* pooled overview"):
        layer_factors.pattern(0)
    assert layer_factors.pattern(0, slice(0, 10), slice(0, 10)).shape == (10, 10)


# ---- synthetic runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, list[str]]:
    store = RunStore(tmp_path_factory.mktemp("runs"))
    return store, write_synthetic_runs(store, tokens=48)


def test_synthetic_runs_agree_with_themselves(synthetic: tuple[RunStore, list[str]]) -> None:
    """Every derived array of every layer against the loops, starting from the stored factors."""
    store, ids = synthetic
    assert store.problems() == [] and len(ids) == 3
    forms = set()
    for run in map(store.open, ids):
        assert run.kind == "trace" and bytes(run.array("tokens").astype(np.uint8)).decode() == run.manifest["text"]
        assert np.isnan(run.array("loss")[0]) and np.isfinite(run.array("loss")[1:]).all()
        assert (np.diff(run.array("next.log_probs"), axis=1) <= 0).all()
        for index, layer in enumerate(run.layers):
            forms.add((layer["form"], layer["strict"]))
            prefix = f"layer.{index}."
            arrays = {name.removeprefix(prefix): run.array(name) for name in run.arrays() if name.startswith(prefix)}
            for head in range(layer["n_heads"]):
                expected = naive_pattern(layer, arrays, head)
                close(run.array(f"overview.{index}")[head], expected)
                visible = LayerFactors.from_run(run, index).visible()
                with np.errstate(invalid="ignore"):
                    received = np.abs(expected).sum(0) / visible.sum(0)
                close(run.array(f"received.{index}")[head], received)
                if layer["form"] == "softmax":
                    np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
                    entropy = [-sum(a * math.log(a) for a in row if a > 0) for row in expected]
                    np.testing.assert_allclose(run.array(f"entropy.{index}")[head], entropy, rtol=1e-5, atol=1e-6)
                else:
                    norms = np.linalg.norm(naive_states(arrays, layer["n_heads"], head), axis=(1, 2))
                    close(run.array(f"state_norm.{index}")[head], norms)
    assert forms == {("softmax", False), ("gated_linear", False), ("gated_linear", True)}


def test_synthetic_runs_hold_what_they_plant(synthetic: tuple[RunStore, list[str]]) -> None:
    store, ids = synthetic
    planted = LayerFactors.from_run(store.open(ids[0]), 0)
    assert planted.offset_profile(0, 3)[1] > 0.9  # previous token
    assert planted.received(2)[0] > 0.9  # sink
    bdh = store.open(ids[2])
    assert 0.01 < np.mean(bdh.array("layer.0.x") > 0) < 0.1 and bdh.array("layer.0.x").dtype == np.float16
    assert bdh.array("layer.0.value").shape[0] == 1 and LayerFactors.from_run(bdh, 0).row(0, 0).max() == 0


def test_synthetic_runs_are_seeded(synthetic: tuple[RunStore, list[str]]) -> None:
    store, ids = synthetic
    again = write_synthetic_runs(store, tokens=48)
    other = write_synthetic_runs(store, tokens=48, seed=9)
    for first, second, third in zip(ids, again, other, strict=True):
        assert store.open(first).verify() == store.open(second).verify() != store.open(third).verify()
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        write_synthetic_runs(store, tokens=1)


def test_a_long_map_streams_in_the_memory_of_a_few_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # tiles of their real size
    store = RunStore(tmp_path)
    run = store.open(write_synthetic_runs(store, tokens=2, long=True)[3])
    layer_factors = LayerFactors.from_run(run, 0)
    assert layer_factors.length == 4096
    tracemalloc.start()
    try:
        overview = layer_factors.overview(0, 256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # a float64 map of 4096 × 4096 is 134 MB
    exact = layer_factors.pattern(0, slice(2048, 2064))
    np.testing.assert_array_equal(overview[128], pool(exact, 1, 256)[0])
    assert np.diagonal(overview).min() > 0.99 and layer_factors.offset_profile(0, 2)[1] > 0.99


def test_nothing_here_loads_torch() -> None:
    modules = "factors, jobs, pooling, runs, synthetic_runs"
    code = f"import sys; from workbench.lab import {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
