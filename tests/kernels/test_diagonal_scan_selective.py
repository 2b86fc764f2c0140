"""Mamba's selective scan: forms, states, entries and pattern against a naive loop and a sum over pairs of tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.diagonal_scan import selective_entries, selective_pattern, selective_scan, selective_states_at

BATCH, POS, CHANNEL, STATE = 2, 37, 6, 4


@dataclass
class Inputs:
    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    initial: Tensor

    @property
    def scan(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.delta, self.A, self.B, self.C

    @property
    def writing(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.delta, self.A, self.B

    def tensors(self) -> list[Tensor]:
        return [*self.scan, self.D, self.initial]


def make_inputs(pos: int = POS, channel: int = CHANNEL, dtype: torch.dtype = torch.float64) -> Inputs:
    """A = -1 … -state as Mamba starts it, a little spread; steps up to 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    A = -torch.arange(1.0, STATE + 1).expand(channel, STATE).double() * normal(channel, STATE).double().abs().add(0.5)
    delta = torch.rand(BATCH, pos, channel, generator=generator, dtype=torch.float64)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    return Inputs(
        normal(BATCH, pos, channel),
        delta.to(dtype),
        A.to(wide),
        normal(BATCH, pos, STATE),
        normal(BATCH, pos, STATE),
        normal(channel),
        normal(BATCH, channel, STATE).to(wide),
    )


def naive(
    inputs: Inputs, initial: Tensor | None = None, edit: Callable[[int, Tensor], Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output with skip, states before edits [batch, pos, channel, state], state carried out), by named axes."""
    state = torch.zeros_like(inputs.initial) if initial is None else initial
    outputs, states = [], []
    for t in range(inputs.x.shape[1]):
        decay = torch.einsum("bc,cn->bcn", inputs.delta[:, t], inputs.A).exp()
        written = torch.einsum("bc,bc,bn->bcn", inputs.delta[:, t], inputs.x[:, t], inputs.B[:, t])
        state = decay * state + written
        outputs.append(torch.einsum("bcn,bn->bc", state, inputs.C[:, t]) + inputs.D * inputs.x[:, t])
        states.append(state)
        edited = None if edit is None else edit(t, state)
        state = state if edited is None else edited
    return torch.stack(outputs, 1), torch.stack(states, 1), state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, error


def test_output_and_pattern_are_the_sum_over_pairs() -> None:
    """Plain numbers, every pair of tokens and every number of the state."""
    inputs = make_inputs(pos=7, channel=2)
    output, _ = selective_scan(*inputs.scan, mode="recurrent")
    alpha = selective_pattern(inputs.delta, inputs.A, inputs.B, inputs.C)
    for c in range(2):
        for i in range(7):
            total = 0.0
            for j in range(i + 1):
                waited = sum(inputs.delta[1, s, c].item() for s in range(j + 1, i + 1))
                weight = sum(
                    (inputs.C[1, i, n] * inputs.B[1, j, n] * inputs.delta[1, j, c]).item()
                    * math.exp(inputs.A[c, n].item() * waited)
                    for n in range(STATE)
                )
                assert abs(alpha[1, c, i, j].item() - weight) <= 1e-12
                total += weight * inputs.x[1, j, c].item()
            assert abs(output[1, i, c].item() - total) <= 1e-12


@pytest.mark.parametrize("pos", [0, 1, 2, 37, 150])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_all_forms_are_the_naive_loop(pos: int, start: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """wide: the state walks token by token inside a chunk, as that of a whole Mamba layer does."""
    import sys

    monkeypatch.setattr(sys.modules["kernels.diagonal_scan.scan"], "NARROW", {"cpu": 0 if wide else 1 << 20})
    inputs = make_inputs(pos)
    initial = inputs.initial if start else None
    forms: list[dict[str, Any]] = [{"mode": "recurrent"}, {}]
    forms += [{"chunk_size": size} for size in (1, 7, 16, 64)]
    for form in forms:
        output, final = selective_scan(*inputs.scan, inputs.D, initial, **form)
        assert output.shape == (BATCH, pos, CHANNEL)
        if pos == 0:
            assert torch.equal(final, torch.zeros_like(final) if initial is None else initial)
            continue
        expected, _, expected_final = naive(inputs, initial)
        assert_close(output, expected, 1e-12)
        assert_close(final, expected_final, 1e-12)


@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_an_edit_at_a_stop_is_the_naive_loop_with_the_same_edit(mode: str) -> None:
    inputs = make_inputs()
    stops = [0, 5, 20, POS - 1]

    def edit(position: int, state: Tensor) -> Tensor | None:
        return state * 2 + position if position in stops and position != 5 else None

    seen: dict[int, Tensor] = {}

    def on_state(position: int, state: Tensor) -> Tensor | None:
        seen[position] = state
        return edit(position, state)

    output, final = selective_scan(
        *inputs.scan, inputs.D, inputs.initial, mode=mode, chunk_size=8, stops=stops, on_state=on_state
    )
    expected, states, expected_final = naive(inputs, inputs.initial, edit)
    assert_close(output, expected, 1e-12 * expected.abs().max().item())
    assert_close(final, expected_final, 1e-12 * expected_final.abs().max().item())
    assert list(seen) == stops
    for position, state in seen.items():
        assert_close(state, states[:, position], 1e-12 * states.abs().max().item())


def test_decoding_token_by_token_continues_a_run() -> None:
    inputs = make_inputs()
    expected, _, expected_final = naive(inputs)
    state, outputs = None, []
    for start, stop in [(0, 30), *((t, t + 1) for t in range(30, POS))]:
        x, delta, B, C = (tensor[:, start:stop] for tensor in (inputs.x, inputs.delta, inputs.B, inputs.C))
        output, state = selective_scan(x, delta, inputs.A, B, C, inputs.D, state)
        outputs.append(output)
    assert state is not None
    assert_close(torch.cat(outputs, 1), expected, 1e-12)
    assert_close(state, expected_final, 1e-12)


@pytest.mark.parametrize("chunk_size", [7, None])
def test_gradients_are_those_of_the_naive_loop(chunk_size: int | None) -> None:
    def gradients(fast: bool) -> list[Tensor]:
        inputs = make_inputs()
        leaves = [x.requires_grad_() for x in inputs.tensors()]
        if fast:
            output, final = selective_scan(
                *inputs.scan, inputs.D, inputs.initial, chunk_size=chunk_size, stops=[11], on_state=lambda t, s: s * 0.5
            )
        else:
            output, _, final = naive(inputs, inputs.initial, lambda t, s: s * 0.5 if t == 11 else None)
        return list(torch.autograd.grad(output.square().sum() + final.square().sum(), leaves))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("pos", [1, 37, 150])
def test_states_and_entries_are_what_the_loop_stored(start: bool, pos: int) -> None:
    inputs = make_inputs(pos)
    initial = inputs.initial if start else None
    _, states, _ = naive(inputs, initial)
    positions = [pos - 1, 0, pos // 2, pos // 2]
    asked = selective_states_at(*inputs.writing, positions, initial)
    assert asked.shape == (BATCH, 4, CHANNEL, STATE)
    assert_close(asked, states[:, positions], 1e-12)
    assert selective_states_at(*inputs.writing, [], initial).shape == (BATCH, 0, CHANNEL, STATE)
    entries = [(0, 0), (5, 3), (2, 1), (2, 1)]
    trace = selective_entries(*inputs.writing, entries, initial)
    assert_close(trace, torch.stack([states[:, :, c, n] for c, n in entries], -1), 1e-12)
    assert torch.equal(selective_entries(*inputs.writing, torch.tensor(entries), initial), trace)


@pytest.mark.parametrize("pos", [1, 37, 150])
def test_pattern_times_inputs_is_the_output(pos: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    inputs = make_inputs(pos)
    expected, _, _ = naive(inputs)
    arguments = (inputs.delta, inputs.A, inputs.B, inputs.C)
    alpha = selective_pattern(*arguments, inputs.D)
    assert alpha.shape == (BATCH, CHANNEL, pos, pos)
    assert (alpha.triu(1) == 0).all()
    assert_close(torch.einsum("bcij,bjc->bic", alpha, inputs.x), expected, 1e-12)
    # One-hot inputs in every channel at once read the pattern off the recurrence, a column at a time.
    for j in {0, pos // 2, pos - 1}:
        one_hot = torch.zeros_like(inputs.x)
        one_hot[:, j] = 1.0
        column, _ = selective_scan(one_hot, *inputs.scan[1:], inputs.D, mode="recurrent")
        assert_close(alpha[..., j], column.mT, 1e-12)
    # Row and channel subsets, and a weighted sum, one channel at a time.
    monkeypatch.setattr(sys.modules["kernels.diagonal_scan.pattern"], "AT_ONCE", 1)
    rows, channels = [pos - 1, 0, pos // 2], [4, 0, 4]
    some = selective_pattern(*arguments, inputs.D, channels=channels, queries=rows)
    assert_close(some, alpha[:, channels][:, :, rows], 1e-12)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    total = selective_pattern(*arguments, inputs.D, channels=torch.tensor(channels), weights=weights)
    assert_close(total, torch.einsum("bcij,c->bij", alpha[:, channels], weights), 1e-12)
    assert selective_pattern(*arguments, channels=[]).shape == (BATCH, 0, pos, pos)
    assert selective_pattern(*arguments, queries=[], weights=torch.ones(CHANNEL)).shape == (BATCH, 0, pos)


def test_large_steps_are_safe_in_float32() -> None:
    """delta A from -5 to -100 per token: the state is reset, and a split exponential would overflow at once."""
    inputs = make_inputs(pos=200)
    inputs.delta[:, 50:120] = 20.0
    inputs.delta[:, 120:] = 1e-3
    expected, _, expected_final = naive(inputs)
    small = Inputs(*(tensor.float() for tensor in inputs.tensors()))
    output, final = selective_scan(*small.scan, small.D)
    assert_close(output.double(), expected, 2e-6 * expected.abs().max().item())
    assert_close(final.double(), expected_final, 2e-6 * expected_final.abs().max().item())
    alpha = selective_pattern(small.delta, small.A, small.B, small.C, small.D)
    assert_close(torch.einsum("bcij,bjc->bic", alpha.double(), inputs.x), expected, 2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_sixteen_bit_inputs_keep_a_float32_state(dtype: torch.dtype, mode: str) -> None:
    inputs = make_inputs(pos=100, dtype=dtype)
    wide = Inputs(*(tensor.double() for tensor in inputs.tensors()))
    expected, states, expected_final = naive(wide)
    output, final = selective_scan(*inputs.scan, inputs.D, mode=mode)
    assert output.dtype == dtype and final.dtype == torch.float32
    tolerance = 2e-6 * states.abs().max().item()
    assert_close(final.double(), expected_final, tolerance)
    assert_close(output.double(), expected, torch.finfo(dtype).eps * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, automatic = selective_scan(*inputs.scan, inputs.D, mode=mode)
    assert torch.equal(automatic, final)
    asked = selective_states_at(*inputs.writing, [50])
    assert asked.dtype == torch.float32
    assert_close(asked.double(), states[:, [50]], tolerance)
    trace = selective_entries(*inputs.writing, [(1, 2)])
    assert trace.dtype == torch.float32
    assert_close(trace[..., 0].double(), states[:, :, 1, 2], tolerance)
    assert selective_pattern(inputs.delta, inputs.A, inputs.B, inputs.C).dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor made under it holds."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_neither_all_states_nor_all_channel_patterns_exist_at_once() -> None:
    inputs = make_inputs(pos=2048, channel=64, dtype=torch.float32)
    everything = inputs.x.numel() * STATE
    runs: list[Callable[[], object]] = [
        lambda: selective_scan(*inputs.scan, inputs.D),
        lambda: selective_states_at(*inputs.writing, [1000, 2047]),
        lambda: selective_entries(*inputs.writing, [(3, 1), (60, 2)]),
    ]
    for run in runs:
        with LargestTensor() as seen:
            run()
        assert 0 < seen.numbers <= everything / 4
    delta, B, C = (tensor[:, :400] for tensor in (inputs.delta, inputs.B, inputs.C))
    with LargestTensor() as seen:
        selective_pattern(delta, inputs.A, B, C, weights=torch.ones(64))
    assert 0 < seen.numbers <= 1 << 22 < BATCH * 64 * 400 * 400


def test_one_graph_under_compile() -> None:
    inputs = make_inputs()
    expected, _ = selective_scan(*inputs.scan, inputs.D)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs.scan, inputs.D)[0], expected, 1e-12)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": _zeros(2, 8)}, r"delta: expected 3 axes \[batch, pos, channel\]"),
        ({"x": _zeros(2, 8, 5)}, r"x: expected the shape of delta, \[2, 8, 3\] .* got \[2, 8, 5\]"),
        ({"A": _zeros(3)}, r"A: expected 2 axes \[channel, state\]"),
        ({"A": _zeros(4, 5)}, r"A: expected \[channel=3, state\] .* got \[4, 5\]"),
        ({"A": _zeros(3, 5, dtype=torch.complex64)}, r"A: expected a floating-point tensor, got torch.complex64"),
        ({"B": _zeros(2, 8, 4)}, r"B: expected \[batch, pos, state\] = \[2, 8, 5\], got \[2, 8, 4\]"),
        ({"C": _zeros(1, 8, 5)}, r"C: expected \[batch, pos, state\] = \[2, 8, 5\], got \[1, 8, 5\]"),
        ({"D": _zeros(5)}, r"D: expected \[channel\] = \[3\], got \[5\]"),
        ({"initial_state": _zeros(2, 5, 3)}, r"initial_state: expected \[batch, channel, state\] = \[2, 3, 5\]"),
        ({"initial_state": _zeros(2, 3, 5, dtype=torch.float64)}, r"initial_state: expected torch.float32"),
        ({"chunk_size": 0}, r"chunk_size: expected a positive integer, got 0"),
        ({"mode": "chunk"}, r"mode: unknown mode 'chunk'.*Did you mean 'chunked'"),
        ({"stops": [3]}, r"stops: given without on_state"),
        ({"on_state": lambda t, s: None}, r"on_state: given without stops"),
        ({"stops": [2], "on_state": lambda t, s: s[0]}, r"on_state at position 2: expected .* = \[2, 3, 5\]"),
    ],
)
def test_every_mistake_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": _zeros(2, 8, 3),
        "delta": _zeros(2, 8, 3),
        "A": _zeros(3, 5),
        "B": _zeros(2, 8, 5),
        "C": _zeros(2, 8, 5),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (selective_pattern, {"channels": [6]}, r"channels: channel 6 is outside 0 … 5 \(channel = 6\)"),
        (selective_pattern, {"queries": [37]}, r"queries: position 37 is outside 0 … 36"),
        (selective_pattern, {"weights": torch.ones(2)}, r"weights: expected one for each of the 6 channels, got 2"),
        (selective_states_at, {"positions": [-1]}, r"positions: position -1 is outside 0 … 36"),
        (selective_entries, {"entries": [(6, 0)]}, r"entries: channel index 6 of \(6, 0\) is outside 0 … 5"),
        (selective_entries, {"entries": [(0, 4)]}, r"entries: state index 4"),
        (selective_entries, {"entries": [(0, 0, 0)]}, r"entries: expected pairs \(channel, state index\)"),
    ],
)
def test_every_mistake_of_a_view_is_named(
    function: Callable[..., Tensor], options: dict[str, Any], message: str
) -> None:
    inputs = make_inputs()
    arguments = inputs.scan[1:] if function is selective_pattern else inputs.writing
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
