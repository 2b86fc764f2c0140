"""The cells against their equations written out and torch's own, Newton's method against the loop, states and gates on the way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.nonlinear_cells import LSTM, CellRun, ParaLSTM, cell_gates, cell_states_at, run_cell
from tests.kernels.nonlinear_cells_inputs import BATCH, DIAGONAL, HEAD, NAMES, POS, UNIT, make_inputs, written_out

EXACT = 1e-12
MODES = [(name, mode) for name in NAMES for mode in (("recurrent", "newton") if name in DIAGONAL else ("recurrent",))]


def run(name: str, mode: str = "recurrent", **options: Any) -> CellRun:
    cell, inputs, recurrent, bias = make_inputs(name)
    return run_cell(cell, inputs, recurrent, recurrent_bias=bias, mode=mode, **options)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_outputs_and_state_are_the_equations(name: str, mode: str) -> None:
    cell, inputs, recurrent, bias = make_inputs(name)
    expected = written_out(name, inputs, recurrent, bias, cell)
    got = run(name, mode)
    assert largest(got.output - torch.stack([s["h"] for s in expected], 2)) < EXACT
    state = dict(zip(cell.slots, got.state.unbind(-1), strict=True))
    if name == "slstm":  # the stabiliser only scales c and n
        state = {"h": state["h"], **{slot: state[slot] * state["m"].exp() for slot in ("c", "n")}}
    for slot, value in state.items():
        assert largest(value - expected[-1][slot]) < EXACT * max(1.0, largest(value)), slot


def torch_weights(name: str, module: nn.RNNBase, cell: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, recurrent, recurrent bias) of a torch module, its gates put in the cell's order."""
    order = {"lstm": ("input", "forget", "candidate", "output"), "gru": ("reset", "update", "candidate")}
    torch_gates = order.get(name, ("candidate",))
    take = [torch_gates.index(drive) for drive in cell.drives]

    def by_drive(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (len(take), UNIT))[take]

    inputs = torch.einsum("bti,gui->btgu", x, by_drive(module.weight_ih_l0)) + by_drive(module.bias_ih_l0)
    return inputs[:, None], by_drive(module.weight_hh_l0).transpose(1, 2)[None], by_drive(module.bias_hh_l0)[None]


@pytest.mark.parametrize("name", ["elman", "relu", "lstm", "gru"])
def test_one_head_is_the_module_of_torch(name: str) -> None:
    """Outputs, final state and every gradient to 1e-12, with an initial state."""
    makers = {
        "lstm": nn.LSTM,
        "gru": nn.GRU,
        "elman": nn.RNN,
        "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    }
    torch.manual_seed(0)
    module = makers[name](5, UNIT, batch_first=True).double()
    cell = make_inputs(name)[0]
    x = torch.randn(BATCH, POS, 5, dtype=torch.float64)
    start = 0.5 * torch.randn(len(cell.slots), 1, BATCH, UNIT, dtype=torch.float64)
    expected, final = module(x, (start[0], start[1]) if name == "lstm" else start[0])
    inputs, recurrent, bias = torch_weights(name, module, cell, x)
    got = run_cell(cell, inputs, recurrent, recurrent_bias=bias, initial_state=start.permute(2, 1, 3, 0))
    assert largest(got.output[:, 0] - expected) < EXACT
    final = torch.stack(final if name == "lstm" else (final,), -1)[0]
    assert largest(got.state[:, 0] - final) < EXACT
    weights = list(module.parameters())
    ours = torch.autograd.grad(got.output.square().sum(), weights)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        assert largest(a - b) < 1e-11


@pytest.mark.parametrize("name", DIAGONAL)
def test_newton_iterations_square_the_error(name: str) -> None:
    """T = 40, 12 units; ParaGRU: 6e-3, 7e-6, 5e-12, rounding after 2, 3, 4, 5 iterations; ParaLSTM, one later."""
    scale = {"paragru": 0.8, "paralstm": 0.5}[name]
    cell, inputs, recurrent, bias = make_inputs(name, pos=40, head=1, unit=12, scale=scale)
    expected = run_cell(cell, inputs, recurrent, recurrent_bias=bias).output
    bounds = {2: 5e-2, 3: 2e-3, 4: 1e-6, 5: 1e-10}
    errors = {}
    for iterations, bound in bounds.items():
        got = run_cell(
            cell, inputs, recurrent, recurrent_bias=bias, mode="newton", iterations=iterations, keep_residual=True
        )
        errors[iterations] = largest(got.output - expected)
        assert got.iterations == iterations and errors[iterations] < bound
        assert got.residual is not None
        if errors[iterations] > 1e-9:  # the residual tells the error, up to the units' own gain
            assert 0.1 < largest(got.residual) / errors[iterations] < 10
    assert errors[2] > 1e-5, "nothing to converge from"
    assert errors[4] < 10 * errors[3] ** 1.5
    free = run_cell(cell, inputs, recurrent, recurrent_bias=bias, mode="newton")
    assert free.iterations <= 7 and largest(free.output - expected) < EXACT


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize(("scale", "chunk_size"), [(30.0, None), (30.0, 4), (1.0, 1), (1.0, 7)])
def test_newton_always_arrives(name: str, scale: float, chunk_size: int | None) -> None:
    """Weights far too large for fast convergence: the solution is still that of the loop; chunks change nothing."""
    cell, inputs, recurrent, bias = make_inputs(name, pos=150, scale=scale)
    expected = run_cell(cell, inputs, recurrent, recurrent_bias=bias)
    got = run_cell(cell, inputs, recurrent, recurrent_bias=bias, mode="newton", chunk_size=chunk_size)
    assert largest(got.output - expected.output) < 1e-10
    assert largest(got.state - expected.state) < 1e-10
    assert got.iterations <= (chunk_size or 150)


@pytest.mark.parametrize("wide", [False, True])
def test_newton_in_blocks_and_token_by_token(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the scan of 2 x 2 blocks give the loop's numbers."""
    from kernels.nonlinear_cells import block_scan

    monkeypatch.setattr(block_scan, "NARROW", {"cpu": 0 if wide else 10**9})
    cell, inputs, recurrent, bias = make_inputs("paralstm", pos=75)
    expected = run_cell(cell, inputs, recurrent, recurrent_bias=bias)
    got = run_cell(cell, inputs, recurrent, recurrent_bias=bias, mode="newton")
    assert largest(got.output - expected.output) < EXACT


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_newton_are_those_of_the_loop(name: str, padded: bool) -> None:
    """Inputs, weights, biases, peepholes, initial state: analytically the loop's, and numerically right (gradcheck)."""
    cell, inputs, recurrent, bias = make_inputs(name, pos=6, head=2, unit=3)
    state = torch.randn(BATCH, 2, 3, len(cell.slots), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(BATCH, 6, dtype=torch.bool)
    mask[0, :2] = mask[1, 4:] = not padded
    peephole = [cell.peephole] if isinstance(cell, ParaLSTM) else []
    leaves = [x.detach().requires_grad_() for x in (inputs, recurrent, bias, state, *peephole)]

    def both(mode: str, *leaves: Tensor) -> Tensor:
        made = ParaLSTM(leaves[4]) if peephole else cell
        x, r, b, s = leaves[:4]
        got = run_cell(made, x, r, recurrent_bias=b, initial_state=s, mask=mask, mode=mode)
        return torch.cat([got.output.flatten(), got.state.flatten()])

    weight = torch.linspace(-1, 2, both("recurrent", *leaves).numel(), dtype=torch.float64)
    expected = torch.autograd.grad((both("recurrent", *leaves) * weight).sum(), leaves)
    got = torch.autograd.grad((both("newton", *leaves) * weight).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert largest(a - b) < 1e-10
    assert torch.autograd.gradcheck(lambda *x: both("newton", *x), leaves, fast_mode=True)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_padding_leaves_no_trace(name: str, mode: str) -> None:
    cell, inputs, recurrent, bias = make_inputs(name)
    mask = torch.ones(BATCH, POS, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, [2, 5, 6]] = False
    got = run_cell(cell, inputs, recurrent, recurrent_bias=bias, mask=mask, mode=mode)
    for row in range(BATCH):
        real = inputs[row : row + 1, :, mask[row]]
        alone = run_cell(cell, real, recurrent, recurrent_bias=bias, mode=mode)
        assert largest(got.output[row : row + 1, :, mask[row]] - alone.output) < EXACT
        assert largest(got.state[row : row + 1] - alone.state) < EXACT


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("stops", [[0], [2, 3, POS - 1], list(range(POS))])
def test_an_edited_state_is_a_run_that_was_cut_edited_and_continued(name: str, mode: str, stops: list[int]) -> None:
    cell, inputs, recurrent, bias = make_inputs(name)

    def edit(position: int, state: Tensor) -> Tensor | None:
        return None if position % 3 == 2 else 0.8 * state + 0.05

    outputs, state, start = [], None, 0
    for end in [*stops, POS - 1]:
        if end < start:
            break
        piece = run_cell(
            cell, inputs[:, :, start : end + 1], recurrent, recurrent_bias=bias, initial_state=state, mode=mode
        )
        outputs.append(piece.output)
        edited = edit(end, piece.state) if end in stops else None
        state = piece.state if edited is None else edited
        start = end + 1
    got = run(name, mode, stops=stops, on_state=edit, keep_before=True)
    assert largest(got.output - torch.cat(outputs, 2)) < EXACT
    assert state is not None and largest(got.state - state) < EXACT
    # what each token met: the state after the one before, as edited
    assert got.before is not None and largest(got.before[:, :, 0]) == 0
    for t in range(1, POS):
        seen = cell_states_at(cell, inputs, recurrent, [t - 1], recurrent_bias=bias)[:, 0]
        if t - 1 < stops[0]:
            assert largest(got.before[:, :, t] - seen) < EXACT


@pytest.mark.parametrize(("name", "mode"), [case for case in MODES if case[0] not in ("elman", "relu")])
def test_an_edited_gate_is_the_step_with_that_gate(name: str, mode: str) -> None:
    """Reading a gate changes nothing; setting one gives what the equations give with that number in its place."""
    cell = make_inputs(name)[0]
    seen: dict[tuple[int, str], Tensor] = {}

    def read(position: int, gate: str, value: Tensor) -> None:
        assert value.shape == (BATCH, HEAD, UNIT)
        seen[position, gate] = value

    every = {gate: [1, 4] for gate in cell.gates}
    plain = run(name, mode)
    watched = run(name, mode, gate_stops=every, on_gate=read)
    assert largest(watched.output - plain.output) < EXACT
    assert set(seen) == {(position, gate) for position in (1, 4) for gate in cell.gates}
    for gate in cell.gates:
        got = run(
            name, mode, gate_stops={gate: [4]}, on_gate=lambda position, gate, value: torch.full_like(value, 0.25)
        )
        assert largest(got.output[:, :, :4] - plain.output[:, :, :4]) < EXACT, gate
        assert largest(got.output[:, :, 4] - plain.output[:, :, 4]) > 1e-3, gate
        assert largest(got.output[:, :, 5:] - plain.output[:, :, 5:]) > 1e-6, gate
        # undone: the gate's own value put back
        back = run(
            name, mode, gate_stops={gate: [4]}, on_gate=lambda position, gate, value: seen[position, gate].clone()
        )
        assert largest(back.output - plain.output) < EXACT, gate


@pytest.mark.parametrize(("name", "mode"), [case for case in MODES if case[0] not in ("elman", "relu")])
def test_gates_of_every_token_are_those_handed_out_one_by_one(name: str, mode: str) -> None:
    """Also around an edited state and an edited gate, and the gates of the same token that follow from it."""
    cell, inputs, recurrent, bias = make_inputs(name)
    every = {gate: list(range(POS)) for gate in cell.gates}
    for edited in cell.gates:
        seen: dict[str, dict[int, Tensor]] = {gate: {} for gate in cell.gates}

        def on_gate(position: int, gate: str, value: Tensor, edited=edited, seen=seen) -> Tensor:
            value = torch.full_like(value, 0.3) if gate == edited and position in (2, 5) else value
            seen[gate][position] = value
            return value

        options: dict[str, Any] = {"stops": [3], "on_state": lambda position, state: 0.5 * state, "keep_before": True}
        got = run(name, mode, gate_stops=every, on_gate=on_gate, **options)
        replaced = {edited: {position: seen[edited][position] for position in (5, 2)}}
        found = cell_gates(cell, inputs, recurrent, got.before, recurrent_bias=bias, replaced=replaced)
        assert set(found) == set(seen)
        for gate, values in seen.items():
            assert largest(found[gate] - torch.stack([values[t] for t in range(POS)], 2)) < EXACT, gate
    with pytest.raises(ValueError, match="has no gate 'forgot'; expected one of"):
        cell_gates(cell, inputs, recurrent, got.before, replaced={"forgot": {}})


def test_a_forget_gate_of_zero_forgets() -> None:
    """With f = 0 at a token and nothing fed back, what follows does not depend on what came before."""
    cell, inputs, recurrent, _ = make_inputs("lstm")
    other = inputs.clone()
    other[:, :, :5] += 1.0
    outputs = []
    for x in (inputs, other):
        got = run_cell(
            cell,
            x,
            torch.zeros_like(recurrent),
            gate_stops={"forget": [5]},
            on_gate=lambda position, gate, value: torch.zeros_like(value),
        )
        outputs.append(got.output)
    assert torch.equal(outputs[0][:, :, 5:], outputs[1][:, :, 5:])
    assert not torch.equal(outputs[0][:, :, :5], outputs[1][:, :, :5])


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_states_at_chosen_positions(name: str, mode: str) -> None:
    cell, inputs, recurrent, bias = make_inputs(name)
    asked = [7, 0, 7, POS - 1]
    states = cell_states_at(cell, inputs, recurrent, asked, recurrent_bias=bias, mode=mode)
    assert states.shape == (BATCH, 4, HEAD, UNIT, len(cell.slots))
    for number, position in enumerate(asked):
        expected = run_cell(cell, inputs[:, :, : position + 1], recurrent, recurrent_bias=bias).state
        assert largest(states[:, number] - expected) < EXACT
    assert cell_states_at(cell, inputs, recurrent, []).shape == (BATCH, 0, HEAD, UNIT, len(cell.slots))


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bit_inputs_keep_a_float32_state(name: str) -> None:
    cell, inputs, recurrent, bias = make_inputs(name)
    if isinstance(cell, ParaLSTM):
        cell = ParaLSTM(cell.peephole.bfloat16())
    half = [x.bfloat16() for x in (inputs, recurrent, bias)]
    got = run_cell(cell, half[0], half[1], recurrent_bias=half[2])
    assert got.output.dtype == torch.bfloat16 and got.state.dtype == torch.float32
    expected = run_cell(cell, half[0].float(), half[1].float(), recurrent_bias=half[2].float())
    assert largest(got.output.float() - expected.output) < 1e-2 * max(1.0, largest(expected.output))
    assert torch.equal(got.state, expected.state)


def test_slstm_survives_drives_that_overflow_an_exponential() -> None:
    """Input drives of ± 200 in float32: finite outputs and gradients, equal to float64 written without a stabiliser."""
    cell, inputs, recurrent, bias = make_inputs("slstm")
    inputs[:, :, 4, 0] = 200.0
    inputs[:, :, 7, 0] = -200.0
    inputs[:, :, 0, 1] = 40.0
    expected = torch.stack([s["h"] for s in written_out("slstm", inputs, recurrent, bias, cell)], 2)
    x = inputs.float().requires_grad_()
    got = run_cell(cell, x, recurrent.float(), recurrent_bias=bias.float()).output
    got.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert largest(got.double() - expected) < 1e-4


def test_no_tokens() -> None:
    cell, inputs, recurrent, _ = make_inputs("lstm")
    state = torch.randn(BATCH, HEAD, UNIT, 2, dtype=torch.float64)
    got = run_cell(cell, inputs[:, :, :0], recurrent, initial_state=state)
    assert got.output.shape == (BATCH, HEAD, 0, UNIT) and torch.equal(got.state, state)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"inputs": torch.zeros(2, 3, 5, 3, 4)}, "LSTM has 4 drives"),
    ({"inputs": torch.zeros(2, 3, 5)}, "inputs: expected 5 axes"),
    ({"recurrent": torch.zeros(3, 4, 4, 5)}, r"recurrent: expected \[head, drive, unit, unit\] = \[3, 4, 4, 4\]"),
    ({"recurrent": torch.zeros(3, 4, 4, 4).double()}, "recurrent: expected torch.float32"),
    ({"recurrent_bias": torch.zeros(3, 4)}, "recurrent_bias: expected"),
    (
        {"initial_state": torch.zeros(2, 3, 4)},
        r"initial_state: expected \[batch, head, unit, slot\] = \[2, 3, 4, 2\] \(slots h, c\)",
    ),
    ({"initial_state": torch.zeros(2, 3, 4, 2).double()}, "initial_state: expected torch.float32"),
    ({"mask": torch.ones(2, 4)}, r"mask: expected booleans \[batch, pos\]"),
    ({"mode": "newtn"}, "Did you mean 'newton'"),
    ({"mode": "newton"}, "newton needs a diagonal recurrent"),
    ({"iterations": 0}, "iterations: expected a positive integer"),
    ({"stops": [3, 1], "on_state": print}, "strictly increasing"),
    ({"on_state": print}, "given without stops"),
    ({"stops": [1]}, "given without on_state"),
    ({"gate_stops": {"keep": [1]}, "on_gate": print}, "LSTM has no gate 'keep'; expected one of input, forget"),
    ({"on_gate": print}, "given without gate_stops"),
    ({"stops": [1], "on_state": lambda p, s: s[..., :1]}, "on_state at position 1: expected"),
    (
        {"gate_stops": {"forget": [2]}, "on_gate": lambda p, n, g: g[:1]},
        "on_gate at position 2, gate 'forget': expected",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"inputs": torch.zeros(2, 3, 5, 4, 4), "recurrent": torch.zeros(3, 4, 4, 4)} | change
    with pytest.raises(ValueError, match=message):
        run_cell(LSTM(), arguments.pop("inputs"), arguments.pop("recurrent"), **arguments)
