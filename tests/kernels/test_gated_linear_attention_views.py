"""Pattern, traces, states and norms of gated linear attention, each against states stored by the recurrence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gated_linear_attention import (
    effective_pattern,
    gated_linear_attention,
    state_norms,
    states_at,
    trace_entries,
    values_probe,
)
from tests.kernels.gla_inputs import DECAYS, Inputs, make_inputs

BATCH, HEAD, POS, STATE_K, STATE_V = 2, 3, 37, 5, 4


def stored_states(inputs: Inputs) -> Tensor:
    """[batch, pos, head, state_k, state_v], by stopping the recurrence after every token."""
    states: list[Tensor] = []
    pos = inputs.k.shape[2]
    gated_linear_attention(
        inputs.k,
        inputs.k,
        inputs.v,
        **inputs.options,
        mode="recurrent",
        stops=list(range(pos)),
        on_state=lambda position, state: states.append(state),
    )
    return torch.stack(states, 1)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_pattern_times_values_is_the_output_and_the_probe(decay: str, strict: bool, write: bool) -> None:
    inputs = make_inputs(decay, write=write)
    options: dict[str, Any] = {**inputs.pattern_options, "scale": 0.3, "strict": strict}
    alpha = effective_pattern(inputs.q, inputs.k, **options)
    assert alpha.shape == (BATCH, HEAD, POS, POS)
    assert (alpha.triu(0 if strict else 1) == 0).all()
    for mode in ("recurrent", "chunked"):
        output, _ = gated_linear_attention(inputs.q, inputs.k, inputs.v, **options, mode=mode)
        assert (alpha @ inputs.v - output).abs().max() <= 1e-12
        probe = values_probe(gated_linear_attention, inputs.q, inputs.k, **options, mode=mode)
        assert (alpha - probe).abs().max() <= 1e-12


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pos", [1, 37, 300])
def test_a_row_subset_is_those_rows(decay: str, strict: bool, pos: int) -> None:
    inputs = make_inputs(decay, write=True, pos=pos, batch=1)
    options: dict[str, Any] = {**inputs.pattern_options, "strict": strict}
    probe = values_probe(gated_linear_attention, inputs.q, inputs.k, **options, mode="recurrent")
    rows = [0] if pos == 1 else [pos - 1, 0, 17, 17, 5]
    alpha = effective_pattern(inputs.q, inputs.k, **options, queries=rows)
    assert alpha.shape == (1, HEAD, len(rows), pos)
    assert (alpha - probe[:, :, rows]).abs().max() <= 1e-12
    assert torch.equal(effective_pattern(inputs.q, inputs.k, **options, queries=torch.tensor(rows)), alpha)
    assert effective_pattern(inputs.q, inputs.k, **options, queries=[]).shape == (1, HEAD, 0, pos)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_pattern_of_no_tokens_is_empty(decay: str) -> None:
    inputs = make_inputs(decay, pos=0)
    assert effective_pattern(inputs.q, inputs.k, **inputs.pattern_options).shape == (BATCH, HEAD, 0, 0)


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_the_pattern_survives_long_strong_decay_in_float32(decay: str) -> None:
    """After 150 tokens of -20 the cumulative sum is -3000, and the gentle tokens behind it differ by 1e-3."""
    inputs = make_inputs(decay, pos=200, batch=1)
    assert inputs.log_decay is not None
    log_decay = torch.full_like(inputs.log_decay, -20.0)
    if log_decay.ndim > 1:
        log_decay[:, :, 150:] = -1e-3
    expected = values_probe(gated_linear_attention, inputs.q, inputs.k, log_decay=log_decay, mode="recurrent")
    alpha = effective_pattern(inputs.q.float(), inputs.k.float(), log_decay=log_decay.float())
    assert torch.isfinite(alpha).all()
    assert (alpha.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pos", [1, 16, 17, 150])
def test_traced_entries_are_the_stored_states(decay: str, write: bool, initial: bool, shared: bool, pos: int) -> None:
    inputs = make_inputs(decay, write=write, initial=initial, shared=shared, pos=pos)
    states = stored_states(inputs)
    entries = [(0, 0, 0), (2, 4, 3), (1, 2, 1), (1, 2, 1), (2, 0, 3)]
    trace = trace_entries(inputs.k, inputs.v, entries, **inputs.options)
    expected = torch.stack([states[:, :, h, i, j] for h, i, j in entries], -1)
    assert trace.shape == expected.shape == (BATCH, pos, len(entries))
    assert (trace - expected).abs().max() <= 1e-12
    assert torch.equal(trace_entries(inputs.k, inputs.v, torch.tensor(entries), **inputs.options), trace)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_states_and_norms_are_the_stored_states(decay: str, write: bool, initial: bool, shared: bool) -> None:
    inputs = make_inputs(decay, write=write, initial=initial, shared=shared, pos=150)
    states = stored_states(inputs)
    positions = [149, 0, 70, 70, 3]
    asked = states_at(inputs.k, inputs.v, positions, **inputs.options)
    assert asked.shape == (BATCH, len(positions), HEAD, STATE_K, STATE_V)
    assert (asked - states[:, positions]).abs().max() <= 1e-12
    expected = states.flatten(3).norm(dim=-1).transpose(1, 2)
    for chunk_size in (None, 7, 1):
        norms = state_norms(inputs.k, inputs.v, **inputs.options, chunk_size=chunk_size)
        assert norms.shape == (BATCH, HEAD, 150)
        assert (norms - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_views_survive_strong_decay_in_float32(decay: str) -> None:
    inputs = make_inputs(decay, write=True, initial=True, pos=200)
    assert inputs.log_decay is not None
    inputs.log_decay.fill_(-20.0)
    if inputs.log_decay.ndim > 1:
        inputs.log_decay[:, :, 60:140] = -1e-3
    states = stored_states(inputs)
    small = inputs.to(torch.float32)
    tolerance = 2e-6 * states.abs().max().item()
    trace = trace_entries(small.k, small.v, [(0, 1, 2), (2, 4, 0)], **small.options)
    assert (trace.double() - torch.stack([states[:, :, 0, 1, 2], states[:, :, 2, 4, 0]], -1)).abs().max() <= tolerance
    asked = states_at(small.k, small.v, [10, 130, 199], **small.options)
    assert (asked.double() - states[:, [10, 130, 199]]).abs().max() <= tolerance
    norms = state_norms(small.k, small.v, **small.options)
    expected = states.flatten(3).norm(dim=-1).transpose(1, 2)
    assert ((norms.double() - expected).abs() <= 1e-5 * expected).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_views_of_bfloat16_inputs_are_float32(decay: str) -> None:
    inputs = make_inputs(decay, write=True, pos=50).to(torch.bfloat16)
    states = stored_states(inputs.to(torch.float64))
    tolerance = 2e-6 * states.abs().max().item()
    trace = trace_entries(inputs.k, inputs.v, [(1, 2, 3)], **inputs.options)
    assert trace.dtype == torch.float32 and (trace[..., 0].double() - states[:, :, 1, 2, 3]).abs().max() <= tolerance
    asked = states_at(inputs.k, inputs.v, [49], **inputs.options)
    assert asked.dtype == torch.float32 and (asked.double() - states[:, 49:]).abs().max() <= tolerance
    alpha = effective_pattern(inputs.q, inputs.k, **inputs.pattern_options)
    wide = inputs.to(torch.float64)
    expected = effective_pattern(wide.q, wide.k, **wide.pattern_options)
    assert alpha.dtype == torch.float32 and (alpha.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_traces_carry_gradients() -> None:
    inputs = make_inputs("vector", write=True, initial=True, pos=20, batch=1)
    leaves = [x.requires_grad_() for x in inputs.tensors()[1:]]
    trace = trace_entries(inputs.k, inputs.v, [(1, 2, 3)], **inputs.options)[0, 13, 0]
    expected = stored_states(inputs)[0, 13, 1, 2, 3]
    for actual, wanted in zip(torch.autograd.grad(trace, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert wanted.abs().max() > 0
        assert (actual - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("trace", {"entries": [(0, 5, 0)]}, r"entries: state_k index 5 of \(0, 5, 0\) is outside 0 … 4"),
        ("trace", {"entries": [(3, 0, 0)]}, r"entries: head index 3"),
        ("trace", {"entries": [(0, 0, -1)]}, r"entries: state_v index -1"),
        ("trace", {"entries": [(0, 0)]}, r"entries: expected triples"),
        ("trace", {"entries": [(0, 0, 0)], "write": torch.zeros(2, 3, 8)}, r"write: expected .* \[2, 3, 37\]"),
        ("states", {"positions": [37]}, r"positions: position 37 is outside 0 … 36"),
        ("states", {"positions": [1], "initial_state": torch.zeros(2, 3, 4, 5)}, r"initial_state: expected"),
        ("pattern", {"queries": [40]}, r"queries: position 40 is outside 0 … 36"),
        ("pattern", {"log_decay": torch.zeros(2)}, r"log_decay: expected \[head=3\]"),
        ("norms", {"log_decay": torch.zeros(2)}, r"log_decay: expected \[head=3\]"),
        ("norms", {"chunk_size": 0}, r"chunk_size: expected a positive integer"),
    ],
)
def test_every_mistake_is_named(function: str, options: dict[str, Any], message: str) -> None:
    inputs = make_inputs("none", dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        if function == "trace":
            trace_entries(inputs.k, inputs.v, options.pop("entries"), **options)
        elif function == "states":
            states_at(inputs.k, inputs.v, options.pop("positions"), **options)
        elif function == "pattern":
            effective_pattern(inputs.q, inputs.k, **options)
        else:
            state_norms(inputs.k, inputs.v, **options)
