"""Running a cell over a sequence, with state and gates that can be read and edited on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.arguments import check_mode, check_positions, check_positive_integer, check_stops
from kernels.stops import OnState, run_in_pieces

from .arguments import check_cell, check_cell_state, empty_state, slots_of, state_of
from .cells import Cell, Slots, Watch, unwatched
from .loop import loop
from .newton import newton, shifted

MODES = ("recurrent", "newton")
OnGate = Callable[[int, str, Tensor], Tensor | None]


@dataclass(frozen=True)
class CellRun:
    """What a run gives: `output` [batch, head, pos, unit] in the type of the inputs, the final `state` and, if asked for,

    `before`: the state that each token met, edits included, [batch, head, pos, unit, slot]; `residual`: how far each token's
    state is from what the cell makes of the one before, the largest unit's, [batch, head, pos]; `iterations`: of Newton's
    method, the most that any piece took (0 for the loop).
    """

    output: Tensor
    state: Tensor
    before: Tensor | None
    residual: Tensor | None
    iterations: int


def run_cell(
    cell: Cell,
    inputs: Tensor,
    recurrent: Tensor,
    *,
    recurrent_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "recurrent",
    chunk_size: int | None = None,
    iterations: int | None = None,
    tolerance: float | None = None,
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
    gate_stops: Mapping[str, Sequence[int]] | None = None,
    on_gate: OnGate | None = None,
    keep_before: bool = False,
    keep_residual: bool = False,
) -> CellRun:
    """Runs slots_t = update(x_t, R h_{t-1} + bias, slots_{t-1}) over the tokens.

    Parameters
    ----------
    cell : one of `kernels.nonlinear_cells.cells`
    inputs : x, [batch, head, pos, drive, unit], biases included
    recurrent : R, [head, drive, unit, unit] (from, to), or [head, drive, unit] for a diagonal
    recurrent_bias : None or [head, drive, unit]; it differs from a bias of the inputs only in a GRU's candidate
    initial_state : None (zeros) or [batch, head, unit, slot]
    mask : True at real tokens, [batch, pos]; at others the state stays as it is
    mode : "recurrent" (token by token) or "newton" (all at once; needs a diagonal R)
    chunk_size : tokens that Newton's method solves at once; None: all
    iterations : of Newton's method; None: until no state is further than `tolerance` from what the cell makes of the one
        before, then one more. A fixed number leaves a residual, which `keep_residual` tells
    tolerance : None for eps ** 0.75 of the type of the state
    stops : strictly increasing positions at which the state is handed to `on_state`
    on_state : called as on_state(position, state [batch, head, unit, slot]) once that token is read and written. Returns
        None to leave the state alone, or the state to go on with, so an edit changes later positions only
    gate_stops : for names of the cell's gates, positions at which that gate is handed to `on_gate`
    on_gate : called as on_gate(position, name, gate [batch, head, unit]) while the token is read. Returns None, or the gate
        to use instead, so an edit changes this position's output, its state, and what follows
    keep_before, keep_residual : fill these fields of the result

    The state is float32 for 16-bit inputs, else of their type. Gradients flow to every tensor, edits included; through
    Newton's method they are the implicit derivative (see `newton`). A token whose gate is watched is a step of the loop.
    Raises ValueError naming the argument, what was expected and what was given.
    """
    feed_back = check_cell(cell, inputs, recurrent, recurrent_bias, mask)
    check_mode(mode, MODES)
    if mode == "newton" and not feed_back.diagonal:
        raise ValueError(
            "mode: newton needs a diagonal recurrent [head, drive, unit]: a full one couples all units of a head"
        )
    for name, number in (("chunk_size", chunk_size), ("iterations", iterations)):
        if number is not None:
            check_positive_integer(name, number)
    state = (
        empty_state(cell, inputs)
        if initial_state is None
        else check_cell_state("initial_state", initial_state, cell, inputs)
    )
    pos = inputs.shape[2]
    if stops is None and on_state is not None:
        raise ValueError("on_state: given without stops, so it would never be called; pass the positions to stop at")
    state_stops = [] if stops is None else check_stops(stops, on_state, pos)
    watched = _watched_gates(cell, gate_stops, on_gate, pos)
    if pos == 0:
        nothing = inputs[:, :, :, 0]
        return CellRun(
            nothing, state, nothing.unsqueeze(-1).expand(*nothing.shape, len(cell.slots)), nothing[..., 0], 0
        )
    dtype = state.dtype
    limit = torch.finfo(dtype).eps ** 0.75 if tolerance is None else tolerance
    entered: list[Slots] = []  # the slots before every token, piece by piece, [head, batch, pos, unit] each
    residuals: list[Tensor] = []
    most_iterations = 0

    def run(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most_iterations
        slots = slots_of(state)
        x, real = inputs[:, :, start:stop].to(dtype), None if mask is None else mask[:, start:stop]
        if mode == "recurrent" or start in watched:
            watch: Watch = unwatched
            if start in watched:
                watch = _watcher(start, watched[start], on_gate)
            history, slots = loop(cell, x, feed_back, slots, real, watch)
            columns = tuple(torch.stack(parts, 2) for parts in zip(*history, strict=True)) if keep_before else ()
            output = columns[0] if keep_before else torch.stack([each[0] for each in history], 2)
            before = shifted(columns, slots_of(state)) if keep_before else ()
            if keep_residual:
                residuals.append(torch.zeros_like(output[..., 0]))
        else:
            solved = newton(cell, x, feed_back, slots, real, iterations, limit)
            most_iterations = max(most_iterations, solved.iterations)
            before = shifted(solved.slots, slots)
            output, slots = solved.slots[0], tuple(slot[:, :, -1] for slot in solved.slots)
            if keep_residual:
                residuals.append(_residual(cell, x, feed_back, before, solved.slots, real))
        if keep_before:
            entered.append(before)
        return output, state_of(slots)

    def hand_out(position: int, state: Tensor) -> Tensor | None:
        if on_state is None or position not in state_stops:
            return None
        edited = on_state(position, state)
        return None if edited is None else check_cell_state(f"on_state at position {position}", edited, cell, inputs)

    # A watched gate is a piece of its own, and Newton's method takes a chunk at a time.
    ends = {*state_stops, *watched, *(position - 1 for position in watched if position)}
    if mode == "newton" and chunk_size is not None:
        ends |= set(range(chunk_size - 1, pos, chunk_size))
    outputs, state = run_in_pieces(run, pos, sorted(ends), state, hand_out, lambda name, edited: None)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    kept = torch.stack([torch.cat(parts, 2) for parts in zip(*entered, strict=True)], -1) if keep_before else None
    return CellRun(
        output.transpose(0, 1).to(inputs.dtype),
        state,
        None if kept is None else kept.transpose(0, 1),
        torch.cat(residuals, 2).transpose(0, 1) if keep_residual else None,
        most_iterations,
    )


def cell_states_at(
    cell: Cell, inputs: Tensor, recurrent: Tensor, positions: Sequence[int] | Tensor, **options: object
) -> Tensor:
    """States after the tokens at `positions`, storing only those. Arguments as in `run_cell`, without stops.

    positions may come in any order and repeat. Returns [batch, position, head, unit, slot] in the order asked.
    Raises ValueError naming the argument that does not fit.
    """
    asked = check_positions("positions", positions, inputs.shape[2])
    if not asked:
        state = run_cell(cell, inputs[:, :, :0], recurrent, **{**options, "mask": None}).state  # type: ignore[arg-type]
        return state.unsqueeze(1)[:, :0]
    kept: dict[int, Tensor] = {}
    last = max(asked) + 1
    mask = options.pop("mask", None)
    run_cell(
        cell,
        inputs[:, :, :last],
        recurrent,
        mask=None if mask is None else mask[:, :last],  # type: ignore[index]
        stops=sorted(set(asked)),
        on_state=lambda position, state: kept.update({position: state}),
        **options,  # type: ignore[arg-type]
    )
    return torch.stack([kept[position] for position in asked], 1)


def _watched_gates(
    cell: Cell, gate_stops: Mapping[str, Sequence[int]] | None, on_gate: OnGate | None, pos: int
) -> dict[int, set[str]]:
    """The gates to hand out, by position."""
    if gate_stops is None and on_gate is not None:
        raise ValueError("on_gate: given without gate_stops, so it would never be called; pass gates and positions")
    watched: dict[int, set[str]] = {}
    for name, positions in (gate_stops or {}).items():
        if name not in cell.gates:
            raise ValueError(
                f"gate_stops: {type(cell).__name__} has no gate {name!r}; expected one of {', '.join(cell.gates) or 'none'}"
            )
        for position in check_stops(positions, on_gate, pos):
            watched.setdefault(position, set()).add(name)
    return watched


def _watcher(position: int, names: set[str], on_gate: OnGate | None) -> Callable[[str, Tensor], Tensor]:
    """The watch of one step: gates are handed out as [batch, head, unit]."""

    def watch(name: str, gate: Tensor) -> Tensor:
        if on_gate is None or name not in names:
            return gate
        edited = on_gate(position, name, gate.transpose(0, 1))
        if edited is None:
            return gate
        expected = gate.transpose(0, 1).shape
        if edited.shape != expected or edited.dtype != gate.dtype:
            raise ValueError(
                f"on_gate at position {position}, gate {name!r}: expected {list(expected)} of {gate.dtype}, got "
                f"{list(edited.shape)} of {edited.dtype}"
            )
        return edited.transpose(0, 1)

    return watch


def _residual(cell: Cell, x: Tensor, feed_back: object, before: Slots, after: Slots, mask: Tensor | None) -> Tensor:
    """Largest |f(x_t, s_{t-1}) - s_t| over the units and slots, [head, batch, pos]."""
    made = cell.update(x.transpose(0, 1), feed_back(before[0]), before)  # type: ignore[operator]
    if mask is not None:
        made = tuple(torch.where(mask[None, :, :, None], new, old) for new, old in zip(made, before, strict=True))
    gaps = [(new - given).abs().amax(-1) for new, given in zip(made, after, strict=True)]
    return torch.stack(gaps).amax(0)
