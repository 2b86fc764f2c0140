"""Gated linear attention: every form against the token-by-token recurrence, and that one against written-out sums."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gated_linear_attention import gated_linear_attention
from tests.kernels.gla_inputs import DECAYS, Inputs, make_inputs

BATCH, HEAD, POS, STATE_K, STATE_V = 2, 3, 37, 5, 4


def run(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    return gated_linear_attention(inputs.q, inputs.k, inputs.v, **{**inputs.options, **options})


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, error


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
def test_the_recurrence_is_the_written_out_sum(decay: str, strict: bool) -> None:
    """Scalar arithmetic in plain loops: every pair, every channel, every decay product spelt out."""
    inputs = make_inputs(decay, write=True, initial=True, batch=1, head=2, pos=6, state_k=3, state_v=2)
    q, k, v, write, initial = inputs.q[0], inputs.k[0], inputs.v[0], inputs.write[0], inputs.initial[0]
    output, final = run(inputs, mode="recurrent", strict=strict, scale=0.3)

    def kept(h: int, d: int, j: int, i: int) -> float:
        """The decay of state row d from after token j to after token i."""
        g = inputs.log_decay
        if g is None:
            return 1.0
        steps = range(j + 1, i + 1)
        if g.ndim == 1:
            return math.exp(sum(g[h].item() for _ in steps))
        return math.exp(sum((g[0, h, s] if g.ndim == 3 else g[0, h, s, d]).item() for s in steps))

    for h, i, e in itertools.product(range(2), range(6), range(2)):
        read = 0.0
        for d in range(3):
            state = kept(h, d, -1, i) * initial[h, d, e].item()
            for j in range(i if strict else i + 1):
                state += kept(h, d, j, i) * (write[h, j] * k[h, j, d] * v[h, j, e]).item()
            read += q[h, i, d].item() * state
        assert abs(output[0, h, i, e].item() - 0.3 * read) < 1e-12
    for h, d, e in itertools.product(range(2), range(3), range(2)):
        state = kept(h, d, -1, 5) * initial[h, d, e].item()
        state += sum(kept(h, d, j, 5) * (write[h, j] * k[h, j, d] * v[h, j, e]).item() for j in range(6))
        assert abs(final[0, h, d, e].item() - state) < 1e-12


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_all_forms_agree(decay: str, strict: bool, write: bool, initial: bool, shared: bool) -> None:
    inputs = make_inputs(decay, write=write, initial=initial, shared=shared)
    expected, expected_state = run(inputs, mode="recurrent", strict=strict, scale=0.3)
    forms: list[dict[str, Any]] = [{"mode": "parallel"}, {"mode": "chunked"}]
    forms += [{"mode": "chunked", "chunk_size": size} for size in (1, 7, 16, 64)]
    for form in forms:
        output, state = run(inputs, strict=strict, scale=0.3, **form)
        assert_close(output, expected, 1e-10)
        assert_close(state, expected_state, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_wide_states_walk_chunk_by_chunk(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers when no two chunk states fit side by side, and the caller's initial state is left alone."""
    import sys

    monkeypatch.setattr(sys.modules["kernels.gated_linear_attention.chunked"], "SIDE_BY_SIDE", {"cpu": 1})
    inputs = make_inputs(decay, write=True, initial=True)
    before = inputs.initial.clone()
    expected, expected_state = run(inputs, mode="recurrent")
    with torch.no_grad():
        output, state = run(inputs, chunk_size=8)
    assert_close(output, expected, 1e-10)
    assert_close(state, expected_state, 1e-10)
    assert torch.equal(inputs.initial, before)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
@pytest.mark.parametrize("pos", [0, 1, 2])
def test_short_lengths(decay: str, mode: str, pos: int) -> None:
    inputs = make_inputs(decay, write=True, initial=True, pos=pos)
    output, state = run(inputs, mode=mode)
    assert output.shape == (BATCH, HEAD, pos, STATE_V)
    if pos == 0:
        assert torch.equal(state, inputs.initial)
    else:
        expected, expected_state = run(inputs, mode="recurrent")
        assert_close(output, expected, 1e-12)
        assert_close(state, expected_state, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
def test_decoding_token_by_token_continues_a_run(decay: str, strict: bool) -> None:
    inputs = make_inputs(decay, write=True)
    expected, expected_state = run(inputs, strict=strict)
    options = {"log_decay": inputs.log_decay, "write": inputs.write}

    def window(start: int, stop: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor | None]]:
        cut = {n: x if x is None or x.ndim == 1 else x[:, :, start:stop] for n, x in options.items()}
        return tuple(x[:, :, start:stop] for x in (inputs.q, inputs.k, inputs.v)), cut  # type: ignore[return-value]

    tensors, cut = window(0, 30)
    output, state = gated_linear_attention(*tensors, **cut, strict=strict)  # type: ignore[arg-type]
    outputs = [output]
    for t in range(30, POS):
        tensors, cut = window(t, t + 1)
        carried = {**cut, "initial_state": state}
        output, state = gated_linear_attention(*tensors, **carried, strict=strict)  # type: ignore[arg-type]
        outputs.append(output)
    assert_close(torch.cat(outputs, 2), expected, 1e-10)
    assert_close(state, expected_state, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_edit_at_a_stop_is_the_naive_loop_with_the_same_edit(decay: str, mode: str, strict: bool) -> None:
    inputs = make_inputs(decay, write=True, initial=True)
    stops = [0, 5, 20, POS - 1]

    def edit(position: int, state: Tensor) -> Tensor | None:
        if position == 5:
            return None
        edited = state.clone()
        edited[:, 1] = 0.0
        edited[:, 2] += position + 1
        return edited

    state, outputs = inputs.initial, []
    states: dict[int, Tensor] = {}
    for t in range(POS):
        decay_t = torch.ones(1, 1, 1, dtype=torch.float64)
        if inputs.log_decay is not None:
            g = inputs.log_decay
            decay_t = g.exp()[None, :, None] if g.ndim == 1 else g[:, :, t].reshape(BATCH, HEAD, -1).exp()
        decayed = decay_t.unsqueeze(-1) * state
        key, value = inputs.k[:, :, t], inputs.v[:, :, t]
        state = decayed + torch.einsum("bhk,bhv->bhkv", key * inputs.write[:, :, t, None], value)
        outputs.append(torch.einsum("bhk,bhkv->bhv", inputs.q[:, :, t], decayed if strict else state))
        if t in stops:
            states[t] = state
            edited = edit(t, state)
            state = state if edited is None else edited

    seen: dict[int, Tensor] = {}

    def on_state(position: int, state: Tensor) -> Tensor | None:
        seen[position] = state
        return edit(position, state)

    output, final = run(inputs, mode=mode, strict=strict, chunk_size=8, stops=stops, on_state=on_state)
    assert_close(output, torch.stack(outputs, 2), 1e-10)
    assert_close(final, state, 1e-10)
    assert list(seen) == stops
    for position in stops:  # compared after the run: what the callback kept never changes later
        assert_close(seen[position], states[position], 1e-10)
    plain, _ = run(inputs, mode=mode, strict=strict, chunk_size=8)
    assert_close(output[:, :, :1], plain[:, :, :1], 1e-12)  # the edit after token 0 changes nothing up to token 0
    assert (output[:, :, 1] - plain[:, :, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "form", [{"mode": "chunked", "chunk_size": 16}, {"mode": "chunked", "chunk_size": 7}, {"mode": "parallel"}]
)
def test_gradients_are_those_of_the_recurrence(decay: str, strict: bool, form: dict[str, Any]) -> None:
    def gradients(**options: Any) -> list[Tensor]:
        inputs = make_inputs(decay, write=True, initial=True, shared=True)
        leaves = [x.requires_grad_() for x in inputs.tensors()]
        weights = torch.Generator().manual_seed(5)

        def on_state(position: int, state: Tensor) -> Tensor:
            return state * 0.5

        output, state = run(inputs, strict=strict, stops=[11], on_state=on_state, **options)
        loss = (output * torch.randn(output.shape, generator=weights, dtype=torch.float64)).sum()
        loss = loss + (state * torch.randn(state.shape, generator=weights, dtype=torch.float64)).sum()
        return list(torch.autograd.grad(loss, leaves))

    for actual, expected in zip(gradients(**form), gradients(mode="recurrent"), strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("mode", ["chunked", "parallel"])
@pytest.mark.parametrize("strict", [False, True])
def test_strong_decay_is_safe_in_float32(decay: str, mode: str, strict: bool) -> None:
    """-20 per token over 200 tokens with gentle stretches between: exp(-G) alone would overflow after five tokens."""
    inputs = make_inputs(decay, write=True, initial=True, pos=200)
    assert inputs.log_decay is not None
    log_decay = torch.full_like(inputs.log_decay, -20.0)
    if log_decay.ndim > 1:
        log_decay[:, :, 60:140] = -1e-3
    expected, expected_state = run(inputs, mode="recurrent", strict=strict, log_decay=log_decay)
    small = inputs.to(torch.float32)
    for tensor in small.tensors():
        tensor.requires_grad_()
    strong = log_decay.float().requires_grad_()
    output, state = run(small, mode=mode, strict=strict, log_decay=strong)
    scale = expected.abs().max().item()
    assert_close(output.double(), expected, 2e-6 * scale)
    assert_close(state.double(), expected_state, 2e-6 * max(1.0, expected_state.abs().max().item()))
    output.sum().backward()
    for tensor in (*small.tensors()[:-1], strong):
        if tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all()
    assert strong.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
def test_sixteen_bit_inputs_keep_a_float32_state(dtype: torch.dtype, decay: str, mode: str) -> None:
    inputs = make_inputs(decay, write=True, pos=100).to(dtype)
    expected, expected_state = run(inputs.to(torch.float64), mode="recurrent")
    output, state = run(inputs, mode=mode)
    assert output.dtype == dtype and state.dtype == torch.float32
    # The state sees only float32 rounding; the output one rounding to 16 bits.
    assert_close(state.double(), expected_state, 2e-6 * expected_state.abs().max().item())
    assert_close(output.double(), expected, torch.finfo(dtype).eps * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, automatic = run(inputs, mode=mode)
    assert torch.equal(automatic, state)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
def test_a_shared_value_equals_the_expanded_one(decay: str, mode: str) -> None:
    inputs = make_inputs(decay, write=True, shared=True)
    output, state = run(inputs, mode=mode)
    inputs.v = inputs.v.expand(-1, HEAD, -1, -1).contiguous()
    expected, expected_state = run(inputs, mode=mode)
    assert_close(output, expected, 1e-13)
    assert_close(state, expected_state, 1e-13)


@pytest.mark.parametrize("decay", DECAYS)
def test_one_graph_under_compile(decay: str) -> None:
    inputs = make_inputs(decay, write=True, initial=True)
    expected, _ = run(inputs)
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="eager")
    output, _ = compiled(inputs.q, inputs.k, inputs.v, **inputs.options)
    assert_close(output, expected, 1e-12)


def test_strided_inputs_need_no_copy_by_the_caller() -> None:
    """[batch, pos, head, width] projections are passed as transposed views."""
    inputs = make_inputs("scalar", write=True)
    expected, _ = run(inputs)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    assert not q.is_contiguous()
    assert_close(gated_linear_attention(q, k, v, **inputs.options)[0], expected, 1e-12)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _zeros(2, 3, 8)}, r"q: expected 4 axes .* got shape \[2, 3, 8\]"),
        ({"q": _zeros(2, 3, 8, 6)}, r"q: expected the shape of k, \[2, 3, 8, 5\] .* got \[2, 3, 8, 6\]"),
        ({"q": _zeros(2, 3, 8, 5, dtype=torch.float64)}, r"q: expected torch.float32 as for k, got torch.float64"),
        ({"k": _zeros(2, 3, 8, 5, dtype=torch.int64)}, r"k: expected a floating-point tensor, got torch.int64"),
        ({"v": _zeros(2, 2, 8, 4)}, r"v: expected \[batch=2, head=3 or 1, pos=8, state_v\] .* got \[2, 2, 8, 4\]"),
        ({"v": _zeros(1, 3, 8, 4)}, r"v: expected \[batch=2.* got \[1, 3, 8, 4\]"),
        ({"v": _zeros(2, 3, 7, 4)}, r"v: expected .*pos=8.* got \[2, 3, 7, 4\]"),
        ({"v": _zeros(2, 3, 8, 0)}, r"v: expected at least one state_v, got \[2, 3, 8, 0\]"),
        ({"k": _zeros(0, 3, 8, 5)}, r"k: expected at least one batch, head and state_k .* got \[0, 3, 8, 5\]"),
        ({"v": _zeros(2, 3, 8, 4).to("meta")}, r"v: expected device cpu as for k, got meta"),
        ({"log_decay": _zeros(2, 3)}, r"log_decay: expected \[head=3\], .* got \[2, 3\]"),
        ({"log_decay": _zeros(1, 3, 8)}, r"log_decay: expected .* got \[1, 3, 8\]"),
        ({"log_decay": _zeros(2, 3, 8, 1)}, r"log_decay: expected .* got \[2, 3, 8, 1\]"),
        ({"log_decay": _zeros(3, dtype=torch.int64)}, r"log_decay: expected a floating-point tensor"),
        ({"write": _zeros(2, 3, 8, 1)}, r"write: expected 3 axes"),
        ({"write": _zeros(2, 1, 8)}, r"write: expected \[batch, head, pos\] = \[2, 3, 8\], got \[2, 1, 8\]"),
        ({"initial_state": _zeros(2, 3, 4, 5)}, r"initial_state: expected .* = \[2, 3, 5, 4\], got \[2, 3, 4, 5\]"),
        ({"initial_state": _zeros(2, 3, 5, 4, dtype=torch.float64)}, r"initial_state: expected torch.float32"),
        ({"chunk_size": 0}, r"chunk_size: expected a positive integer, got 0"),
        ({"chunk_size": 2.0}, r"chunk_size: expected a positive integer, got 2.0"),
        ({"mode": "chunk"}, r"mode: unknown mode 'chunk'.*Did you mean 'chunked'"),
        ({"mode": "paralel"}, r"Did you mean 'parallel'"),
        ({"stops": [3]}, r"stops: given without on_state"),
        ({"on_state": lambda t, s: None}, r"on_state: given without stops"),
        (
            {"stops": [3, 3], "on_state": lambda t, s: None},
            r"stops: expected strictly increasing positions, got 3 before 3",
        ),
        (
            {"stops": [5, 3], "on_state": lambda t, s: None},
            r"stops: expected strictly increasing positions, got 5 before 3",
        ),
        ({"stops": [8], "on_state": lambda t, s: None}, r"stops: position 8 is outside 0 … 7"),
        ({"stops": [-1], "on_state": lambda t, s: None}, r"stops: position -1 is outside"),
        ({"stops": [1.5], "on_state": lambda t, s: None}, r"stops: expected integer positions, got 1.5"),
        (
            {"stops": [2], "on_state": lambda t, s: s[0]},
            r"on_state at position 2: expected .* = \[2, 3, 5, 4\], got \[3, 5, 4\]",
        ),
        ({"stops": [2], "on_state": lambda t, s: s.double()}, r"on_state at position 2: expected torch.float32"),
    ],
)
def test_every_mistake_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": _zeros(2, 3, 8, 5), "k": _zeros(2, 3, 8, 5), "v": _zeros(2, 3, 8, 4)}
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_what_is_no_tensor_is_named() -> None:
    x = _zeros(2, 3, 8, 5)
    with pytest.raises(TypeError, match="v: expected a tensor"):
        gated_linear_attention(x, x, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_state at position 1: expected a tensor or None, got int"):
        gated_linear_attention(x, x, x, stops=[1], on_state=lambda t, s: 3)  # type: ignore[arg-type, return-value]
