"""The diagonal scan: both forms, forwards and in reverse, against sums written out pair by pair and a naive loop."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.diagonal_scan import diagonal_scan, scan_states_at

BATCH, POS = 2, 37
TYPES = (torch.float64, torch.complex128)
SHAPES = [(), (3,), (2, 3)]


def make_inputs(
    dtype: torch.dtype, channels: tuple[int, ...] = (2, 3), pos: int = POS, decay_shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log decay with |a| in (e^-1, 1] and any phase, inputs, initial state)."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, pos, *channels) if decay_shape is None else decay_shape
    log_decay = -torch.rand(shape, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        log_decay = torch.complex(log_decay, 3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(BATCH, pos, *channels, generator=generator, dtype=dtype)
    return log_decay.to(dtype), inputs, torch.randn(BATCH, *channels, generator=generator, dtype=dtype)


def naive(
    decay: Tensor,
    inputs: Tensor,
    state: Tensor,
    reverse: bool = False,
    edit: Callable[[int, Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    pos = inputs.shape[1]
    decay = decay.expand(inputs.shape) if decay.ndim == inputs.ndim else decay.expand(inputs.shape[2:])
    states: dict[int, Tensor] = {}
    for t in reversed(range(pos)) if reverse else range(pos):
        state = (decay if decay.ndim < inputs.ndim else decay[:, t]) * state + inputs[:, t]
        states[t] = state
        edited = None if edit is None else edit(t, state)
        state = state if edited is None else edited
    return torch.stack([states[t] for t in range(pos)], 1), state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, error


@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
def test_it_is_the_sum_over_earlier_tokens(mode: str) -> None:
    """Plain numbers: h_t = sum_j b_j exp(sum of log a over j < s <= t), the initial state standing before token 0."""
    log_decay, inputs, initial = make_inputs(torch.float64, (1,), pos=20)
    states, _ = diagonal_scan(log_decay, inputs, initial, decay_is_log=True, mode=mode)
    for t in range(20):
        total = initial[1, 0].item() * math.exp(sum(log_decay[1, s, 0].item() for s in range(t + 1)))
        for j in range(t + 1):
            kept = math.exp(sum(log_decay[1, s, 0].item() for s in range(j + 1, t + 1)))
            total += kept * inputs[1, j, 0].item()
        assert abs(states[1, t, 0].item() - total) <= 1e-12


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", ["auto", "recurrent", "blocked"])
@pytest.mark.parametrize("pos", [0, 1, 2, 16, 17, 37, 150])
def test_all_forms_are_the_naive_loop(
    dtype: torch.dtype, channels: tuple[int, ...], reverse: bool, mode: str, pos: int
) -> None:
    log_decay, inputs, initial = make_inputs(dtype, channels, pos)
    for start in (None, initial):
        states, final = diagonal_scan(log_decay.exp(), inputs, start, reverse=reverse, mode=mode)
        again, _ = diagonal_scan(log_decay, inputs, start, reverse=reverse, mode=mode, decay_is_log=True)
        before = torch.zeros_like(initial) if start is None else start
        if pos == 0:
            assert states.shape == inputs.shape and torch.equal(final, before)
            continue
        expected, expected_final = naive(log_decay.exp(), inputs, before, reverse)
        assert_close(states, expected, 1e-12)
        assert_close(again, expected, 1e-12)
        assert_close(final, expected_final, 1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("decay_shape", [(2, 3), (1, 1, 2, 3), (2, 37, 1, 1), (1, 37, 2, 1), (2, 1, 1, 3)])
@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
def test_a_decay_constant_along_an_axis_need_not_be_repeated(
    dtype: torch.dtype, decay_shape: tuple[int, ...], mode: str
) -> None:
    log_decay, inputs, initial = make_inputs(dtype, decay_shape=decay_shape)
    for reverse in (False, True):
        states, final = diagonal_scan(log_decay, inputs, initial, decay_is_log=True, mode=mode, reverse=reverse)
        expected, expected_final = naive(log_decay.exp(), inputs, initial, reverse)
        assert_close(states, expected, 1e-12)
        assert_close(final, expected_final, 1e-12)
        asked = scan_states_at(log_decay, inputs, [5, 30], initial, decay_is_log=True, reverse=reverse)
        assert_close(asked, expected[:, [5, 30]], 1e-12)


def test_factors_of_zero_and_above_one() -> None:
    """Zero forgets everything before it; growth is allowed."""
    inputs = torch.randn(1, 40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decay = torch.full_like(inputs, 1.1)
    decay[:, 25] = 0.0
    for mode in ("recurrent", "blocked"):
        states, _ = diagonal_scan(decay, inputs, mode=mode)
        expected, _ = naive(decay, inputs, torch.zeros(1, 1, dtype=torch.float64))
        assert torch.equal(states[:, 25], inputs[:, 25])
        assert_close(states, expected, 1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_real_inputs_of_a_complex_decay_have_complex_states(dtype: torch.dtype) -> None:
    log_decay, inputs, _ = make_inputs(torch.complex128)
    other = inputs.real if dtype == torch.float64 else inputs
    states, final = diagonal_scan(log_decay, other, decay_is_log=True)
    expected, _ = naive(log_decay.exp(), other, torch.zeros(BATCH, 2, 3, dtype=torch.complex128))
    assert final.dtype == torch.complex128
    assert_close(states, expected, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
def test_segments_hand_the_state_on(reverse: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in segments of eight tokens, and states at chosen tokens without the others."""
    import sys

    module = sys.modules["kernels.diagonal_scan.scan"]
    monkeypatch.setattr(module, "SEGMENT", {"cpu": 1})
    monkeypatch.setattr(module, "NARROW", {"cpu": 0 if mode == "recurrent" else 1 << 20})
    log_decay, inputs, initial = make_inputs(torch.float64)
    expected, _ = naive(log_decay.exp(), inputs, initial, reverse)
    states, _ = diagonal_scan(log_decay, inputs, initial, decay_is_log=True, reverse=reverse)
    assert_close(states, expected, 1e-12)
    positions = [36, 0, 20, 20, 7]
    asked = scan_states_at(log_decay, inputs, positions, initial, decay_is_log=True, reverse=reverse)
    assert_close(asked, expected[:, positions], 1e-12)
    assert torch.equal(
        scan_states_at(log_decay, inputs, torch.tensor(positions), initial, decay_is_log=True, reverse=reverse), asked
    )
    assert scan_states_at(log_decay, inputs, [], initial).shape == (BATCH, 0, 2, 3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
def test_an_edit_at_a_stop_is_the_naive_loop_with_the_same_edit(reverse: bool, mode: str) -> None:
    log_decay, inputs, initial = make_inputs(torch.float64)
    stops = [0, 5, 20, POS - 1]

    def edit(position: int, state: Tensor) -> Tensor | None:
        return state * 2 + position if position in stops and position != 5 else None

    seen: dict[int, Tensor] = {}

    def on_state(position: int, state: Tensor) -> Tensor | None:
        seen[position] = state
        return edit(position, state)

    states, final = diagonal_scan(
        log_decay.exp(), inputs, initial, reverse=reverse, mode=mode, stops=stops, on_state=on_state
    )
    expected, expected_final = naive(log_decay.exp(), inputs, initial, reverse, edit)
    assert_close(states, expected, 1e-12 * expected.abs().max().item())
    assert_close(final, expected_final, 1e-12 * expected_final.abs().max().item())
    assert list(seen) == (stops[::-1] if reverse else stops)
    for position, state in seen.items():
        assert_close(state, expected[:, position], 1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_naive_loop(dtype: torch.dtype, mode: str, reverse: bool) -> None:
    def gradients(fast: bool) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in make_inputs(dtype)]
        log_decay, inputs, initial = leaves
        if fast:
            states, final = diagonal_scan(log_decay, inputs, initial, decay_is_log=True, mode=mode, reverse=reverse)
        else:
            states, final = naive(log_decay.exp(), inputs, initial, reverse)
        weights = torch.linspace(-1, 1, POS, dtype=torch.float64)[None, :, None, None]
        return list(torch.autograd.grad(((weights * states).abs().square().sum() + final.abs().sum()), leaves))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["recurrent", "blocked"])
def test_sixteen_bit_inputs_keep_a_float32_state(dtype: torch.dtype, mode: str) -> None:
    log_decay, inputs, _ = make_inputs(torch.float64, pos=100)
    log_decay, inputs = log_decay.to(dtype), inputs.to(dtype)
    states, final = diagonal_scan(log_decay, inputs, decay_is_log=True, mode=mode)
    zeros = torch.zeros(BATCH, 2, 3, dtype=torch.float64)
    expected, expected_final = naive(log_decay.double().exp(), inputs.double(), zeros)
    assert states.dtype == dtype and final.dtype == torch.float32
    assert_close(final.double(), expected_final, 2e-6 * expected_final.abs().max().item())
    assert_close(states.double(), expected, torch.finfo(dtype).eps * expected.abs().max().item())
    turned, _ = diagonal_scan(torch.complex(log_decay.float(), log_decay.float()), inputs, decay_is_log=True)
    assert turned.dtype == torch.complex64


def test_strong_decay_is_safe_in_float32() -> None:
    log_decay = torch.full((1, 200, 4), -20.0)
    log_decay[:, 60:140] = -1e-3
    inputs = torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(0))
    expected, _ = naive(log_decay.double().exp(), inputs.double(), torch.zeros(1, 4, dtype=torch.float64))
    states, _ = diagonal_scan(log_decay, inputs, decay_is_log=True, mode="blocked")
    assert_close(states.double(), expected, 2e-6 * expected.abs().max().item())


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": _zeros(8)}, r"inputs: expected \[batch, pos, \*channels\], got shape \[8\]"),
        ({"inputs": _zeros(2, 8, 0)}, r"inputs: expected at least one batch and channel"),
        ({"inputs": _zeros(2, 8, 3, dtype=torch.int64)}, r"inputs: expected a floating-point or complex tensor"),
        ({"decay": _zeros(2, 8, 3, dtype=torch.int64)}, r"decay: expected a floating-point or complex tensor"),
        ({"decay": _zeros(2, 8, 4)}, r"decay: expected \[2, 8, 3\] .* or \[3\] \[\*channels\], got \[2, 8, 4\]"),
        ({"decay": _zeros(8, 3)}, r"decay: expected \[2, 8, 3\] .* got \[8, 3\]"),
        ({"decay": _zeros(3).to("meta")}, r"decay: expected device cpu as for inputs, got meta"),
        ({"initial_state": _zeros(3, 2)}, r"initial_state: expected \[batch, \*channels\] = \[2, 3\], got \[3, 2\]"),
        ({"initial_state": _zeros(2, 3, dtype=torch.float64)}, r"initial_state: expected torch.float32"),
        ({"decay": _zeros(3, dtype=torch.complex64), "initial_state": _zeros(2, 3)}, r"expected torch.complex64"),
        ({"mode": "block"}, r"mode: unknown mode 'block'.*Did you mean 'blocked'"),
        ({"stops": [3]}, r"stops: given without on_state"),
        ({"on_state": lambda t, s: None}, r"on_state: given without stops"),
        ({"stops": [3, 3], "on_state": lambda t, s: None}, r"stops: expected strictly increasing"),
        ({"stops": [8], "on_state": lambda t, s: None}, r"stops: position 8 is outside 0 … 7"),
        ({"stops": [2], "on_state": lambda t, s: s[0]}, r"on_state at position 2: expected .* = \[2, 3\], got \[3\]"),
        ({"stops": [2], "on_state": lambda t, s: s[0], "reverse": True}, r"on_state at position 2: expected"),
    ],
)
def test_every_mistake_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"decay": _zeros(2, 8, 3), "inputs": _zeros(2, 8, 3), **change}
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**arguments)


def test_what_is_no_tensor_or_position_is_named() -> None:
    with pytest.raises(TypeError, match="decay: expected a tensor, got float"):
        diagonal_scan(0.9, _zeros(2, 8, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions: position 8 is outside 0 … 7"):
        scan_states_at(_zeros(3), _zeros(2, 8, 3), [8])
