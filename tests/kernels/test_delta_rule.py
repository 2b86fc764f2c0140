"""The delta rule: both forms against the naive loop, and that one against a written-out product of matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.delta_rule import delta_rule
from tests.kernels.delta_rule_inputs import DECAYS, Inputs, make_inputs, naive

BATCH, HEAD, POS, STATE_K, STATE_V = 2, 3, 37, 5, 4


def run(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    return delta_rule(inputs.q, inputs.k, inputs.v, inputs.beta, **{**inputs.options, **options})


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, error


@pytest.mark.parametrize("decay", DECAYS)
def test_the_state_is_a_product_of_transitions(decay: str) -> None:
    """S_t = sum_j A_t … A_{j+1} beta_j k_j v_j^T with A_s = (I - beta_s k_s k_s^T) diag(decay_s), for every pair."""
    inputs = make_inputs(decay, initial=True, batch=1, head=2, pos=6, state_k=3, state_v=2)
    output, final = run(inputs, mode="recurrent", scale=0.3)
    assert inputs.initial is not None
    for h in range(2):
        transitions, written = [], []
        for s in range(6):
            key, beta = inputs.k[0, h, s], inputs.beta[0, h, s]
            kept = torch.ones(3, dtype=torch.float64)
            if inputs.log_decay is not None:
                g = inputs.log_decay
                kept = kept * (g[h] if g.ndim == 1 else g[0, h, s]).exp()
            transitions.append((torch.eye(3, dtype=torch.float64) - beta * torch.outer(key, key)) @ torch.diag(kept))
            written.append(beta * torch.outer(key, inputs.v[0, h, s]))
        for t in range(6):
            state = torch.zeros(3, 2, dtype=torch.float64)
            for j in range(-1, t + 1):
                term = inputs.initial[0, h] if j < 0 else written[j]
                for s in range(j + 1, t + 1):
                    term = transitions[s] @ term
                state = state + term
            assert_close(output[0, h, t], 0.3 * state.T @ inputs.q[0, h, t], 1e-12)
        assert_close(final[0, h], state, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_all_forms_are_the_naive_loop(decay: str, initial: bool, shared: bool) -> None:
    inputs = make_inputs(decay, initial=initial, shared=shared)
    expected, _, _, expected_state = naive(inputs, scale=0.3)
    forms: list[dict[str, Any]] = [{"mode": "recurrent"}, {}]
    forms += [{"chunk_size": size} for size in (1, 7, 16, 64)]
    for form in forms:
        output, state = run(inputs, scale=0.3, **form)
        assert_close(output, expected, 1e-10)
        assert_close(state, expected_state, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_of_one_chunk(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers when no two chunks are prepared together, and the caller's initial state is left alone."""
    import sys

    monkeypatch.setattr(sys.modules["kernels.delta_rule.chunked"], "PREPARED", {"cpu": 1})
    inputs = make_inputs(decay, initial=True)
    assert inputs.initial is not None
    before = inputs.initial.clone()
    expected, _, _, expected_state = naive(inputs)
    output, state = run(inputs, chunk_size=8)
    assert_close(output, expected, 1e-10)
    assert_close(state, expected_state, 1e-10)
    assert torch.equal(inputs.initial, before)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
@pytest.mark.parametrize("pos", [0, 1, 2])
def test_short_lengths(decay: str, mode: str, pos: int) -> None:
    inputs = make_inputs(decay, initial=True, pos=pos)
    output, state = run(inputs, mode=mode)
    assert output.shape == (BATCH, HEAD, pos, STATE_V)
    if pos == 0:
        assert inputs.initial is not None and torch.equal(state, inputs.initial)
    else:
        expected, _, _, expected_state = naive(inputs)
        assert_close(output, expected, 1e-12)
        assert_close(state, expected_state, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_decoding_token_by_token_continues_a_run(decay: str) -> None:
    inputs = make_inputs(decay)
    expected, expected_state = run(inputs)
    state, outputs = None, []
    for start, stop in [(0, 30), *((t, t + 1) for t in range(30, POS))]:
        g = inputs.log_decay
        g = g if g is None or g.ndim == 1 else g[:, :, start:stop]
        piece = [x[:, :, start:stop] for x in (inputs.q, inputs.k, inputs.v, inputs.beta)]
        output, state = delta_rule(*piece, log_decay=g, initial_state=state)
        outputs.append(output)
    assert state is not None
    assert_close(torch.cat(outputs, 2), expected, 1e-10)
    assert_close(state, expected_state, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_an_edit_at_a_stop_is_the_naive_loop_with_the_same_edit(decay: str, mode: str) -> None:
    inputs = make_inputs(decay, initial=True)
    stops = [0, 5, 20, POS - 1]

    def edit(position: int, state: Tensor) -> Tensor | None:
        if position not in stops or position == 5:
            return None
        edited = state.clone()
        edited[:, 1] = 0.0
        edited[:, 2] += position + 1
        return edited

    seen: dict[int, Tensor] = {}

    def on_state(position: int, state: Tensor) -> Tensor | None:
        seen[position] = state
        return edit(position, state)

    expected, states, _, carried = naive(inputs, edit=edit)
    output, final = run(inputs, mode=mode, chunk_size=8, stops=stops, on_state=on_state)
    assert_close(output, expected, 1e-10)
    assert_close(final, carried, 1e-10)
    assert list(seen) == stops
    for position in stops:  # compared after the run: what the callback kept never changes later
        assert_close(seen[position], states[:, position], 1e-10)
    plain, _ = run(inputs, mode=mode, chunk_size=8)
    assert_close(output[:, :, :1], plain[:, :, :1], 1e-12)  # the edit after token 0 changes nothing up to token 0
    assert (output[:, :, 1] - plain[:, :, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk_size", [7, 16])
def test_gradients_are_those_of_the_naive_loop(decay: str, chunk_size: int) -> None:
    def gradients(chunked: bool) -> list[Tensor]:
        inputs = make_inputs(decay, initial=True, shared=True)
        leaves = [x.requires_grad_() for x in inputs.tensors()]
        if chunked:
            output, state = run(inputs, chunk_size=chunk_size, stops=[11], on_state=lambda t, s: s * 0.5)
        else:
            output, _, _, state = naive(inputs, edit=lambda t, s: s * 0.5 if t == 11 else None)
        weights = torch.Generator().manual_seed(5)
        loss = (output * torch.randn(output.shape, generator=weights, dtype=torch.float64)).sum()
        loss = loss + (state * torch.randn(state.shape, generator=weights, dtype=torch.float64)).sum()
        return list(torch.autograd.grad(loss, leaves))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_strong_decay_is_safe_in_float32(decay: str) -> None:
    """-20 per token over 200 tokens with gentle stretches between: exp(-G) alone would overflow after five tokens."""
    inputs = make_inputs(decay, initial=True, pos=200)
    assert inputs.log_decay is not None
    inputs.log_decay.fill_(-20.0)
    if inputs.log_decay.ndim > 1:
        inputs.log_decay[:, :, 60:140] = -1e-3
    expected, _, _, expected_state = naive(inputs)
    small = inputs.to(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in small.tensors()]
    output, state = run(small)
    assert_close(output.double(), expected, 2e-6 * expected.abs().max().item())
    assert_close(state.double(), expected_state, 2e-6 * expected_state.abs().max().item())
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_sixteen_bit_inputs_keep_a_float32_state(dtype: torch.dtype, decay: str, mode: str) -> None:
    inputs = make_inputs(decay, pos=100).to(dtype)
    expected, _, _, expected_state = naive(inputs.to(torch.float64))
    output, state = run(inputs, mode=mode)
    assert output.dtype == dtype and state.dtype == torch.float32
    # The state sees only float32 rounding; the output one rounding to 16 bits.
    assert_close(state.double(), expected_state, 2e-6 * expected_state.abs().max().item())
    assert_close(output.double(), expected, torch.finfo(dtype).eps * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, automatic = run(inputs, mode=mode)
    assert torch.equal(automatic, state)


def test_beta_one_replaces_what_the_key_recalls_and_beta_zero_leaves_it() -> None:
    """Orthonormal keys are an addressable memory: a second write at an address replaces the first."""
    k = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2]][None, None]
    v = torch.arange(8, dtype=torch.float64).reshape(1, 1, 4, 2)
    beta = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    _, state = delta_rule(k, k, v, beta)
    assert torch.equal(state[0, 0], torch.stack([v[0, 0, 2], v[0, 0, 1], torch.zeros(2, dtype=torch.float64)]))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_one_graph_under_compile(decay: str) -> None:
    inputs = make_inputs(decay, initial=True)
    expected, _ = run(inputs)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="eager")
    output, _ = compiled(inputs.q, inputs.k, inputs.v, inputs.beta, **inputs.options)
    assert_close(output, expected, 1e-12)


def test_strided_inputs_need_no_copy_by_the_caller() -> None:
    """[batch, pos, head, width] projections are passed as transposed views."""
    inputs = make_inputs("scalar")
    expected, _ = run(inputs)
    q, k, v, beta = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.tensors()[:4])
    assert not q.is_contiguous()
    assert_close(delta_rule(q, k, v, beta, **inputs.options)[0], expected, 1e-12)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _zeros(2, 3, 8, 6)}, r"q: expected the shape of k, \[2, 3, 8, 5\] .* got \[2, 3, 8, 6\]"),
        ({"k": _zeros(2, 3, 8, 5, dtype=torch.int64)}, r"k: expected a floating-point tensor, got torch.int64"),
        ({"v": _zeros(2, 2, 8, 4)}, r"v: expected \[batch=2, head=3 or 1, pos=8, state_v\] .* got \[2, 2, 8, 4\]"),
        ({"beta": _zeros(2, 3, 8, 1)}, r"beta: expected 3 axes \[batch, head, pos\], got shape \[2, 3, 8, 1\]"),
        ({"beta": _zeros(2, 1, 8)}, r"beta: expected \[batch, head, pos\] = \[2, 3, 8\], got \[2, 1, 8\]"),
        ({"beta": _zeros(2, 3, 8).to("meta")}, r"beta: expected device cpu as for k, got meta"),
        ({"log_decay": _zeros(2, 3)}, r"log_decay: expected \[head=3\], .* got \[2, 3\]"),
        ({"initial_state": _zeros(2, 3, 4, 5)}, r"initial_state: expected .* = \[2, 3, 5, 4\], got \[2, 3, 4, 5\]"),
        ({"initial_state": _zeros(2, 3, 5, 4, dtype=torch.float64)}, r"initial_state: expected torch.float32"),
        ({"chunk_size": 0}, r"chunk_size: expected a positive integer, got 0"),
        ({"mode": "parallel"}, r"mode: unknown mode 'parallel'; expected one of \['chunked', 'recurrent'\]"),
        ({"mode": "recurent"}, r"Did you mean 'recurrent'"),
        ({"stops": [3]}, r"stops: given without on_state"),
        ({"on_state": lambda t, s: None}, r"on_state: given without stops"),
        ({"stops": [5, 3], "on_state": lambda t, s: None}, r"stops: expected strictly increasing positions"),
        ({"stops": [8], "on_state": lambda t, s: None}, r"stops: position 8 is outside 0 … 7"),
        (
            {"stops": [2], "on_state": lambda t, s: s[0]},
            r"on_state at position 2: expected .* = \[2, 3, 5, 4\], got \[3, 5, 4\]",
        ),
    ],
)
def test_every_mistake_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": _zeros(2, 3, 8, 5), "k": _zeros(2, 3, 8, 5), "v": _zeros(2, 3, 8, 4)}
    arguments = {**arguments, "beta": _zeros(2, 3, 8), **change}
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments)


def test_what_is_no_tensor_is_named() -> None:
    x = _zeros(2, 3, 8, 5)
    with pytest.raises(TypeError, match="beta: expected a tensor"):
        delta_rule(x, x, x, None)  # type: ignore[arg-type]
