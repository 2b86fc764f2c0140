"""Sinks on planted patterns, at the right places and nowhere else; definitions by hand; calibration; every kind of mixer."""

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from kernels.attention_statistics import pattern_statistics
from probes.sinks import calibrate, calibration_curve, find_sinks, sink_report
from workbench.instrument.errors import RefusedByPattern

LENGTH, BATCH, HEADS = 64, 3, 4


def random_attention(seed: int = 0) -> Tensor:
    """Causal rows of random weights, [batch, head, query, key]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    return scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def planted(positions: tuple[int, ...], head: int, share: float = 0.25) -> Tensor:
    """Random attention in which one head gives each of some positions a share of every row that sees it."""
    pattern = random_attention()
    for position in positions:
        own = pattern[:, head, position + 1 :]
        own *= 1 - share
        own[..., position] += share
    return pattern


def report(pattern: Tensor, real: Tensor | None = None, **options: object):  # type: ignore[no-untyped-def]
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool) if real is None else real
    found = pattern_statistics(pattern, weights="share", mask=real, statistics=["first", "received"])
    return sink_report({0: found}, real, **options)  # type: ignore[arg-type]


def test_planted_sinks_are_found_and_nothing_else() -> None:
    """Sinks at 0, 17 and 40 of head 2: precision = recall = 1 in every sequence."""
    found = report(planted((0, 17, 40), 2), threshold=0.15)
    places = {(sink.head, sink.sequence, sink.position) for sink in found.sinks if sink.position > 2}
    assert places == {(2, sequence, position) for sequence in range(BATCH) for position in (17, 40)}
    strong = {(sink.head, sink.position) for sink in found.sinks if sink.head == 2}
    assert strong >= {(2, 0), (2, 17), (2, 40)}
    assert report(random_attention(), threshold=0.3).sinks == ()


def test_definitions_by_hand() -> None:
    pattern = planted((0,), 1, 0.6)
    found = report(pattern)
    assert np.allclose(found.first_mass[0], pattern[:, :, 1:, 0].mean((0, 2)))
    received = pattern[..., 0].sum(-1) / LENGTH  # the first token's own row is among them
    assert np.allclose(found.sink_rate[0], (received > 0.3).double().mean(0))
    assert found.sink_rate[0, 1] == 1 and found.sink_rate[0, 0] == 0
    assert found.model_sink_rate == pytest.approx(0.25)
    by_column = pattern.sum(-2) / (LENGTH - torch.arange(LENGTH))
    wanted = {(s, h, p) for s, h, p in (by_column > 0.1).nonzero().tolist() if LENGTH - p >= 8}
    assert {(sink.sequence, sink.head, sink.position) for sink in found.sinks} == wanted
    assert found.positions(0)[0] >= 1


def test_the_last_tokens_are_not_judged_by_one_reader() -> None:
    """A head that reads itself gives its last token all of its one reader's weight; that is no sink."""
    pattern = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)
    assert report(pattern, min_readers=12).sinks == ()
    assert any(sink.position == LENGTH - 1 for sink in report(pattern, min_readers=1).sinks)


def test_values_and_residual_at_the_sink() -> None:
    """A sink with a value a tenth as long as the others', and a residual a hundred times as large."""
    pattern = planted((0,), 1, 0.9)
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    found = pattern_statistics(pattern, statistics=["first", "received"])
    values = torch.ones(BATCH, HEADS, LENGTH)
    values[..., 0] = 0.1
    residual = torch.ones(BATCH, LENGTH)
    residual[:, 0] = 100
    result = sink_report({0: found}, real, {0: values}, {0: residual}, threshold=0.5)
    assert result.value_ratio[0, 1] == pytest.approx(0.1) and np.isnan(result.value_ratio[0, 0])
    assert result.residual_ratio[0] == pytest.approx(100)
    assert result.to_json()["value_ratio"][0][0] is None


def test_the_curve_falls() -> None:
    curve = report(planted((0, 17), 2)).curve
    assert all(a >= b for a, b in zip(curve["share_of_heads"], curve["share_of_heads"][1:], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(curve["mass"], curve["mass"][1:], strict=False))


@pytest.mark.parametrize("name", ["gpt", "alibi", "retnet", "mamba2", "bdh"])
def test_padding_and_order_do_not_matter(name: str) -> None:
    model = models.build(name, seed=1).double()
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(2))
    plain = find_sinks(model, tokens, threshold=0.05, min_readers=4)
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :5] = False
    for other in (
        find_sinks(model, padded, mask=mask, threshold=0.05, min_readers=4),
        find_sinks(model, tokens.flip(0), threshold=0.05, min_readers=4),
    ):
        for field in ("first_mass", "sink_rate", "sink_mass", "value_ratio", "residual_ratio"):
            assert np.allclose(getattr(other, field), getattr(plain, field), equal_nan=True), field
        assert len(other.sinks) == len(plain.sinks)


def test_calibration_keeps_rows_and_causality() -> None:
    pattern = random_attention()
    sinks = torch.zeros(BATCH, HEADS, LENGTH, dtype=torch.bool)
    sinks[..., [5, 17]] = True
    assert torch.equal(calibrate(pattern, sinks, 1.0), pattern)
    changed = calibrate(pattern, sinks, 0.4)
    assert (changed.sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal(changed == 0, pattern == 0)
    assert torch.allclose(changed[..., 20:, 17], 0.4 * pattern[..., 20:, 17])
    ratio = changed[..., 20:, 3] / pattern[..., 20:, 3]
    assert torch.allclose(ratio, changed[..., 20:, 9] / pattern[..., 20:, 9])


def test_the_calibration_curve_starts_at_the_loss() -> None:
    model = models.build("gpt", seed=0)
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    sinks = find_sinks(model, tokens, threshold=0.02).sinks
    curve = calibration_curve(model, tokens, sinks, (1.0, 0.0))
    assert curve["loss"][0] == pytest.approx(float(model(tokens, return_type="loss").detach()), abs=1e-6)
    assert curve["loss"][1] != curve["loss"][0]
    with pytest.raises(ValueError, match="No sink to turn down besides the first token"):
        calibration_curve(model, tokens, [sink for sink in sinks if sink.position == 0])


def test_mistakes_are_named() -> None:
    model = models.build("gpt")
    with pytest.raises(ValueError, match="at least two tokens"):
        find_sinks(model, "a")
    with pytest.raises(ValueError, match="threshold: expected a number between 0 and 1"):
        find_sinks(model, "abc", threshold=2)
    with pytest.raises(ValueError, match="beta: expected"):
        calibrate(torch.ones(2, 2), torch.ones(2, dtype=torch.bool), 1.5)
    with pytest.raises(RefusedByPattern, match="whole_patterns=True"):
        find_sinks(models.build("loglinear-mamba2"), "abcdef")
