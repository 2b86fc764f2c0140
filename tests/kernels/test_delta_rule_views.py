"""Pattern, pseudo-values, traces, states and norms of the delta rule, each against what the naive loop stored."""

from typing import Any

import pytest
import torch

from kernels.delta_rule import (
    delta_rule,
    delta_rule_and_pseudo_values,
    effective_pattern,
    pseudo_values,
    state_norms,
    states_at,
    trace_entries,
    values_probe,
)
from tests.kernels.delta_rule_inputs import DECAYS, make_inputs, naive

BATCH, HEAD, POS, STATE_K, STATE_V = 2, 3, 37, 5, 4


@pytest.mark.parametrize("decay", DECAYS)
def test_pattern_times_values_is_the_output_and_the_probe(decay: str) -> None:
    inputs = make_inputs(decay)
    options: dict[str, Any] = {"log_decay": inputs.log_decay, "scale": 0.3}
    alpha = effective_pattern(inputs.q, inputs.k, inputs.beta, **options)
    assert alpha.shape == (BATCH, HEAD, POS, POS)
    assert (alpha.triu(1) == 0).all()
    assert (alpha @ inputs.v - naive(inputs, scale=0.3)[0]).abs().max() <= 1e-12
    for mode in ("recurrent", "chunked"):
        probe = values_probe(delta_rule, inputs.q, inputs.k, beta=inputs.beta, **options, mode=mode)
        assert (alpha - probe).abs().max() <= 1e-12


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pos", [1, 37, 150])
def test_a_row_subset_is_those_rows(decay: str, pos: int) -> None:
    inputs = make_inputs(decay, pos=pos, batch=1)
    probe = values_probe(delta_rule, inputs.q, inputs.k, beta=inputs.beta, log_decay=inputs.log_decay, mode="recurrent")
    for rows in ([0], [pos - 1, 0, pos // 2, pos // 2]):
        alpha = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, queries=rows)
        assert alpha.shape == (1, HEAD, len(rows), pos)
        assert (alpha - probe[:, :, rows]).abs().max() <= 1e-12
    none = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, queries=[])
    assert none.shape == (1, HEAD, 0, pos)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("queries", [None, [30, 4]])
def test_the_factors_are_what_they_say_and_multiply_to_the_pattern(decay: str, queries: list[int] | None) -> None:
    inputs = make_inputs(decay)
    alpha, factors = effective_pattern(
        inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, scale=0.3, queries=queries, factors=True
    )
    plain = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, scale=0.3, queries=queries)
    assert torch.equal(alpha, plain)
    assert (factors.product() - alpha).abs().max() <= 1e-12
    assert torch.equal(factors.write, inputs.beta)
    rows = list(range(POS)) if queries is None else queries
    if decay == "vector":
        assert factors.decay is None
        return
    # One decay per token leaves match and erase those of DeltaNet, and multiplies the whole pattern.
    bare = effective_pattern(inputs.q, inputs.k, inputs.beta, scale=0.3, queries=queries)
    match = (0.3 * inputs.q @ inputs.k.mT).tril()
    recall = (inputs.beta.unsqueeze(-1) * (inputs.k @ inputs.k.mT)).tril(-1)
    assert (factors.match - match[:, :, rows]).abs().max() <= 1e-12
    erase = torch.linalg.inv(torch.eye(POS, dtype=torch.float64) + recall)
    assert (factors.erase - erase).abs().max() <= 1e-12
    if decay == "none":
        assert factors.decay is None
        return
    assert factors.decay is not None and inputs.log_decay is not None
    assert (alpha - bare * factors.decay).abs().max() <= 1e-12
    g = inputs.log_decay if decay == "scalar" else inputs.log_decay[None, :, None].expand(BATCH, HEAD, POS)
    for i, row in enumerate(rows):
        for j in (0, row // 2, row):
            assert torch.allclose(factors.decay[:, :, i, j], g[:, :, j + 1 : row + 1].sum(-1).exp(), rtol=1e-12)
        assert (factors.decay[:, :, i, row + 1 :] == 0).all()


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_the_pattern_survives_long_strong_decay_in_float32(decay: str) -> None:
    """After 150 tokens of -20 the cumulative sum is -3000, and the gentle tokens behind it differ by 1e-3."""
    inputs = make_inputs(decay, pos=200, batch=1)
    assert inputs.log_decay is not None
    inputs.log_decay.fill_(-20.0)
    if inputs.log_decay.ndim > 1:
        inputs.log_decay[:, :, 150:] = -1e-3
    expected = values_probe(
        delta_rule, inputs.q, inputs.k, beta=inputs.beta, log_decay=inputs.log_decay, mode="recurrent"
    )
    small = inputs.to(torch.float32)
    alpha = effective_pattern(small.q, small.k, small.beta, log_decay=small.log_decay)
    assert torch.isfinite(alpha).all()
    assert (alpha.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_pattern_carries_gradients() -> None:
    inputs = make_inputs("vector", pos=12, batch=1)
    leaves = [inputs.q, inputs.k, inputs.beta, inputs.log_decay]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    alpha = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay)
    expected = naive(inputs)[0]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)  # type: ignore[arg-type]
    actual = torch.autograd.grad((alpha @ inputs.v).square().sum(), leaves)  # type: ignore[arg-type]
    for got, want in zip(actual, wanted, strict=True):
        assert want.abs().max() > 0 and (got - want).abs().max() <= 1e-10


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_views_are_what_the_loop_stored(decay: str, initial: bool, shared: bool) -> None:
    inputs = make_inputs(decay, initial=initial, shared=shared, pos=150)
    _, states, written, _ = naive(inputs)
    arguments = (inputs.k, inputs.v, inputs.beta)
    forms: list[dict[str, Any]] = [{}, {"chunk_size": 7}, {"mode": "recurrent"}]
    for form in forms:
        assert (pseudo_values(*arguments, **{**inputs.options, **form}) - written).abs().max() <= 1e-12
    entries = [(0, 0, 0), (2, 4, 3), (1, 2, 1), (1, 2, 1)]
    trace = trace_entries(*arguments, entries, **inputs.options)
    assert trace.shape == (BATCH, 150, 4)
    assert (trace - torch.stack([states[:, :, h, i, j] for h, i, j in entries], -1)).abs().max() <= 1e-12
    positions = [149, 0, 70, 70, 3]
    asked = states_at(*arguments, positions, **inputs.options)
    assert asked.shape == (BATCH, len(positions), HEAD, STATE_K, STATE_V)
    assert (asked - states[:, positions]).abs().max() <= 1e-12
    norms = state_norms(*arguments, **inputs.options)
    assert (norms - states.flatten(3).norm(dim=-1).transpose(1, 2)).abs().max() <= 1e-10


@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_a_run_hands_out_its_own_pseudo_values_edits_included(mode: str) -> None:
    inputs = make_inputs("scalar", initial=True)
    arguments = (inputs.q, inputs.k, inputs.v, inputs.beta)
    options: dict[str, Any] = {**inputs.options, "mode": mode, "stops": [10], "on_state": lambda t, s: 2 * s}
    output, written, state = delta_rule_and_pseudo_values(*arguments, **options)
    expected, _, expected_written, expected_state = naive(inputs, edit=lambda t, s: 2 * s if t == 10 else None)
    assert (output - expected).abs().max() <= 1e-10
    assert (written - expected_written).abs().max() <= 1e-10
    assert (state - expected_state).abs().max() <= 1e-10
    plain, plain_state = delta_rule(*arguments, **options)
    assert torch.equal(plain, output) and torch.equal(plain_state, state)


@pytest.mark.parametrize("decay", DECAYS)
def test_views_of_bfloat16_inputs_are_float32(decay: str) -> None:
    inputs = make_inputs(decay, pos=50).to(torch.bfloat16)
    wide = inputs.to(torch.float64)
    _, states, written, _ = naive(wide)
    arguments = (inputs.k, inputs.v, inputs.beta)
    tolerance = 2e-6 * states.abs().max().item()
    actual = pseudo_values(*arguments, **inputs.options)
    assert actual.dtype == torch.float32 and (actual.double() - written).abs().max() <= 2e-6 * written.abs().max()
    trace = trace_entries(*arguments, [(1, 2, 3)], **inputs.options)
    assert trace.dtype == torch.float32 and (trace[..., 0].double() - states[:, :, 1, 2, 3]).abs().max() <= tolerance
    asked = states_at(*arguments, [49], **inputs.options)
    assert asked.dtype == torch.float32 and (asked.double() - states[:, 49:]).abs().max() <= tolerance
    alpha = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay)
    expected = effective_pattern(wide.q, wide.k, wide.beta, log_decay=wide.log_decay)
    assert alpha.dtype == torch.float32 and (alpha.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_no_tokens_have_no_views() -> None:
    inputs = make_inputs("scalar", pos=0)
    arguments = (inputs.k, inputs.v, inputs.beta)
    assert pseudo_values(*arguments, **inputs.options).shape == (BATCH, HEAD, 0, STATE_V)
    _, written, _ = delta_rule_and_pseudo_values(inputs.q, *arguments, **inputs.options)
    assert written.shape == (BATCH, HEAD, 0, STATE_V)
    assert trace_entries(*arguments, [(0, 0, 0)], **inputs.options).shape == (BATCH, 0, 1)
    assert states_at(*arguments, [], **inputs.options).shape == (BATCH, 0, HEAD, STATE_K, STATE_V)
    assert state_norms(*arguments, **inputs.options).shape == (BATCH, HEAD, 0)
    alpha, factors = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, factors=True)
    assert alpha.shape == factors.product().shape == (BATCH, HEAD, 0, 0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("pattern", {"queries": [40]}, r"queries: position 40 is outside 0 … 36"),
        ("pattern", {"beta": torch.zeros(2, 3)}, r"beta: expected 3 axes"),
        ("pseudo", {"mode": "chunk"}, r"mode: unknown mode 'chunk'.*Did you mean 'chunked'"),
        ("pseudo", {"chunk_size": 0}, r"chunk_size: expected a positive integer"),
        ("pseudo", {"beta": torch.zeros(2, 3, 36)}, r"beta: expected \[batch, head, pos\] = \[2, 3, 37\]"),
        ("trace", {"entries": [(0, 5, 0)]}, r"entries: state_k index 5"),
        ("trace", {"entries": [(0, 0, 0)], "log_decay": torch.zeros(2)}, r"log_decay: expected \[head=3\]"),
        ("states", {"positions": [37]}, r"positions: position 37 is outside 0 … 36"),
        ("states", {"positions": [1], "initial_state": torch.zeros(2, 3, 4, 5)}, r"initial_state: expected"),
        ("norms", {"beta": torch.zeros(2, 3, 37, 1)}, r"beta: expected 3 axes"),
    ],
)
def test_every_mistake_is_named(function: str, options: dict[str, Any], message: str) -> None:
    inputs = make_inputs("none", dtype=torch.float32)
    beta = options.pop("beta", inputs.beta)
    with pytest.raises(ValueError, match=message):
        if function == "pattern":
            effective_pattern(inputs.q, inputs.k, beta, **options)
        elif function == "pseudo":
            pseudo_values(inputs.k, inputs.v, beta, **options)
        elif function == "trace":
            trace_entries(inputs.k, inputs.v, beta, options.pop("entries"), **options)
        elif function == "states":
            states_at(inputs.k, inputs.v, beta, options.pop("positions"), **options)
        else:
            state_norms(inputs.k, inputs.v, beta, **options)
