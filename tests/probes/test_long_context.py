"""Long-context probes: normal keys, a key that stands out, planted profiles, exact waveforms, chunks that do not see each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from models.parts.positions import Rotary
from probes.battery import NoAnswer, run_probes, store_probes
from probes.long_context import (
    AdaptiveHeads,
    SegmentAttention,
    adaptive_heads,
    complementary_bases,
    gaussian_log_mass,
    parallel_entropy,
    segment_attention,
    waveform,
)
from probes.score_tables import score_tables
from workbench.instrument.errors import RefusedByPattern
from workbench.lab.runs import RunStore
from workbench.lab.tasks import make_task


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_criterion_is_right_for_normal_keys() -> None:
    """4096 normal keys of a random covariance, 16 entries: the estimate of log Σ exp(s q·k) is within 0.05 for moderate queries."""
    mixing = torch.randn(16, 16, generator=generator(1), dtype=torch.float64) / 4
    keys = torch.randn(1, 2, 4096, 16, generator=generator(2), dtype=torch.float64) @ mixing + 0.3
    q = torch.randn(1, 2, 20, 16, generator=generator(3), dtype=torch.float64)
    scale = 16**-0.5
    true = (scale * q @ keys.mT).logsumexp(-1)
    estimate = gaussian_log_mass(q, keys, scale) + np.log(4096)
    assert (estimate - true).abs().max() < 0.05


def test_the_criterion_is_the_moment_generating_function() -> None:
    """Against the closed form with the exact mean and covariance of keys ±a around a centre: cosh, to second order in a."""
    centre, a = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.01
    keys = torch.stack([centre + a * torch.tensor([1.0, 0.0]), centre - a * torch.tensor([1.0, 0.0])])[None, None]
    q = torch.tensor([[[[2.0, 3.0]]]], dtype=torch.float64)
    expected = float(q[0, 0, 0] @ centre) + np.log(np.cosh(2 * a))
    assert float(gaussian_log_mass(q, keys, 1.0)) == pytest.approx(expected, abs=1e-7)


def test_it_is_too_small_where_one_key_stands_out() -> None:
    keys = torch.randn(1, 1, 1024, 16, generator=generator(), dtype=torch.float64) / 10
    q = torch.randn(1, 1, 1, 16, generator=generator(1), dtype=torch.float64)
    keys[0, 0, 500] = 6 * q[0, 0, 0]
    true = float((q @ keys.mT).logsumexp(-1))
    assert float(gaussian_log_mass(q, keys, 1.0)) + np.log(1024) < true - 1


@pytest.fixture(scope="module")
def gpt() -> Any:
    model = models.build("gpt", seed=2, n_ctx=128).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def test_exact_shares_are_those_of_the_patterns(gpt: Any) -> None:
    tokens = torch.randint(256, (2, 60), generator=generator())
    found = adaptive_heads(gpt, tokens, sinks=3, recent=10, last=8)
    assert found.queries == tuple(range(52, 60)) and found.exact.shape == found.predicted.shape == (
        gpt.n_layers,
        4,
        2,
        8,
    )
    for layer, pattern in gpt.patterns(tokens).items():
        for column, query in enumerate(found.queries):
            near = [key for key in range(query + 1) if key < 3 or key > query - 10]
            expected = pattern.values[:, :, query, near].sum(-1).detach().T.numpy()
            assert np.abs(found.exact[layer, :, :, column] - expected).max() < 1e-9
    assert np.abs(found.exact - found.predicted).max() < 0.1, "random keys are nearly normal"


def test_grouped_keys_and_rotary_positions() -> None:
    model = models.build("llama").double()
    tokens = torch.randint(256, (1, 40), generator=generator())
    found = adaptive_heads(model, tokens, sinks=2, recent=6, last=1)
    pattern = model.patterns(tokens)[0].values[0, :, -1].detach()
    expected = pattern[:, :2].sum(-1) + pattern[:, -6:].sum(-1)
    assert np.abs(found.exact[0, :, 0, 0] - expected.numpy()).max() < 1e-9


def test_keys_of_another_text_can_be_the_reference(gpt: Any) -> None:
    tokens, other = (torch.randint(256, (1, 50), generator=generator(seed)) for seed in (1, 2))
    a, b = adaptive_heads(gpt, tokens), adaptive_heads(gpt, tokens, reference=other)
    assert np.array_equal(a.exact, b.exact) and not np.array_equal(a.predicted, b.predicted)


def test_errors_of_the_criterion_are_counted() -> None:
    exact, predicted = np.zeros((1, 2, 1, 4)), np.zeros((1, 2, 1, 4))
    exact[0, 0, 0] = [0.95, 0.95, 0.2, 0.2]
    predicted[0, 0, 0] = [0.95, 0.1, 0.95, 0.1]
    found = AdaptiveHeads(exact, predicted, (4, 5, 6, 7), (0,), 0.9)
    assert found.scores.tolist() == [[0.5, 0.0]] and found.predicted_scores.tolist() == [[0.5, 0.0]]
    assert found.missed == pytest.approx(1 / 6) and found.wasted == 0.5
    assert AdaptiveHeads(exact * 0, predicted, (4, 5, 6, 7), (0,), 0.9).to_json()["wasted"] is None


def test_segments_add_up_to_the_pattern(gpt: Any) -> None:
    tokens = torch.randint(256, (3, 40), generator=generator())
    spans = [(1, 5), (5, 20), (22, 30), (30, 36)]
    found = segment_attention(gpt, tokens, spans, rows=2)
    for layer, pattern in gpt.patterns(tokens).items():
        for number, (start, stop) in enumerate(spans):
            expected = pattern.values[:, :, -2:, start:stop].sum(-1).mean((0, 2)).detach().numpy()
            assert np.abs(found.weights[layer, :, number] - expected).max() < 1e-6
    assert found.lengths == (4, 15, 8, 6) and np.allclose(found.density * np.array(found.lengths), found.weights)
    equal = segment_attention(gpt, tokens, 4)
    assert sum(equal.lengths) == 39 and len(equal.to_json()["profile"]) == 4


def test_a_planted_basin_and_its_decoys() -> None:
    """U-shaped, recent only, first only, flat, hill: only the first has a positive depth."""
    weights = np.array([[[4, 1, 1, 4], [1, 1, 1, 7], [7, 1, 1, 1], [2, 2, 2, 2], [1, 4, 4, 1]]], dtype=float)
    depth = SegmentAttention(weights[None], (1, 1, 1, 1), (0,)).scores[0]
    assert depth[0] == pytest.approx(3 / 2.5) and (depth[1:] <= 0).all() and depth[3] == 0 and depth[4] < -1
    longer = SegmentAttention(weights[None] * np.array([1, 3, 3, 1]), (1, 3, 3, 1), (0,)).scores[0]
    assert np.allclose(longer, depth), "per token, so long passages are no hill"
    two = SegmentAttention(np.stack([weights, 2 * weights]), (1, 1, 1, 1), (0,))
    assert np.allclose(two.by_sequence, depth) and two.best(1) == [(0, 0, pytest.approx(1.2))]


def test_the_battery_asks_both(tmp_path: Path) -> None:
    """Results are those of the probes on the same sequences, with intervals over them; recurrent models have no local keys."""
    model = models.load("induction-circuit")
    results = run_probes(model, ["local", "basin"], length=64, sequences=4, vocab=64)
    batch = make_task("induction", vocab_size=64, length=64, seed=0).batch(4, split="validation")
    assert np.allclose(results["local"].scores, adaptive_heads(model, batch.tokens).scores)
    assert np.allclose(results["basin"].scores, segment_attention(model, batch.tokens, 8, rows=8).scores)
    for result in results.values():
        table = score_tables(result)["score"]
        assert np.array_equal(table.values, result.scores) and (table.low <= table.high).all()
    run = store_probes(RunStore(tmp_path), model, results)
    assert run.manifest["results"]["local"]["kind"] == "AdaptiveHeads"
    refused = run_probes(models.build("retnet"), ["local"], length=64, sequences=2)
    assert isinstance(refused["local"], NoAnswer) and "no plain softmax" in refused["local"].reason


def test_waveforms_are_what_rotary_positions_do() -> None:
    """q·R_m q for equal entries, over its value at distance 0, for two bases."""
    for base in (100.0, 10_000.0):
        rotary = Rotary(16, base, 1.0, False, None)
        ones = torch.ones(1, 40, 1, 16, dtype=torch.float64)
        turned = rotary(ones, *rotary.angles(torch.arange(40)[None], torch.float64))[0, :, 0]
        assert np.abs(waveform(16, range(40), base) - (turned @ turned[0] / 16).numpy()).max() < 1e-6


def test_one_frequency_and_scaling_with_the_base() -> None:
    assert np.allclose(waveform(2, [0, 1, 3], 50.0), np.cos([0, 1, 3]))
    slow = waveform(4, [0, 5], 81.0)  # frequencies 1 and 1/9
    assert slow[1] == pytest.approx((np.cos(5) + np.cos(5 / 9)) / 2)


def test_complementary_bases_against_all_pairs() -> None:
    """The greedy pair raises the envelope's lowest point above any single base, and is near the best of all pairs."""
    candidates, distances = [10_000.0, 17_500.0, 18_000.0, 20_000.0, 25_000.0], range(50, 2000)
    waves = {base: waveform(128, distances, base) for base in candidates}
    chosen = complementary_bases(128, candidates, 2, distances)
    lowest = lambda bases: float(np.max([waves[base] for base in bases], axis=0).min())  # noqa: E731
    assert chosen[0] == max(candidates, key=lambda base: waves[base].min())
    assert lowest(chosen) >= max(lowest([base]) for base in candidates)
    best_with_first = max(lowest(pair) for pair in itertools.combinations(candidates, 2) if chosen[0] in pair)
    assert lowest(chosen) == best_with_first


def test_chunks_apart_are_chunks_alone(gpt: Any) -> None:
    """In the first layer the rows inside a chunk are those of the chunk read alone at its place; one chunk changes nothing."""
    tokens = torch.randint(256, (1, 30), generator=generator())
    one = parallel_entropy(gpt, tokens, [(0, 24)])
    assert np.allclose(one.together, one.apart) and one.rise == 0
    found = parallel_entropy(gpt, tokens, [(0, 8), (8, 16), (16, 24)])
    assert np.allclose(found.together, one.together) and np.allclose(found.apart[0], found.together[0])
    assert not np.allclose(found.apart[1:], found.together[1:])

    with_prefix = parallel_entropy(gpt, tokens, [(2, 8), (8, 16), (16, 24)], prefix=2)
    assert not np.allclose(with_prefix.apart, found.apart)


def test_mistakes_and_refusals_are_named(gpt: Any) -> None:
    tokens = torch.zeros(1, 30, dtype=torch.long)
    with pytest.raises(ValueError, match="all of them among the first 4 or the last 26"):
        adaptive_heads(gpt, tokens, recent=26)
    with pytest.raises(ValueError, match="threshold"):
        adaptive_heads(gpt, tokens, threshold=1.5)
    with pytest.raises(RefusedByPattern, match="no plain softmax"):
        adaptive_heads(models.build("retnet"), tokens)
    with pytest.raises(ValueError, match="at least three segments"):
        segment_attention(gpt, tokens, [(0, 4), (4, 8)])
    with pytest.raises(ValueError, match="do not overlap"):
        segment_attention(gpt, tokens, [(0, 4), (3, 8), (8, 9)])
    with pytest.raises(ValueError, match="count: expected 1 to 2"):
        complementary_bases(8, [10.0, 20.0], 3, range(5))
    with pytest.raises(ValueError, match="even d_head"):
        waveform(7, [1])
    with pytest.raises(ValueError, match="Chunk 0"):
        parallel_entropy(gpt, tokens, [(0, 30)])
    with pytest.raises(RefusedByPattern, match="softmax"):
        parallel_entropy(models.build("retnet"), tokens, [(0, 8)])
