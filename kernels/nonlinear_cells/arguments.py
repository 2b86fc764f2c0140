"""Checks of the arguments of this folder, and the layouts it works in."""

import torch
from torch import Tensor

from kernels.arguments import check_like, check_tensor, compute_dtype, shape_of

from .cells import Cell, Slots
from .feedback import FeedBack


def check_cell(
    cell: Cell, inputs: Tensor, recurrent: Tensor, recurrent_bias: Tensor | None, mask: Tensor | None
) -> FeedBack:
    """The recurrent weights in the type of the state, once everything fits."""
    check_tensor("inputs", inputs, "batch, head, pos, drive, unit", 5)
    batch, head, pos, drive, unit = inputs.shape
    if 0 in (batch, head, unit):
        raise ValueError(
            f"inputs: expected at least one batch, head and unit (only pos may be 0), got {shape_of(inputs)}"
        )
    if drive != len(cell.drives):
        raise ValueError(
            f"inputs: {type(cell).__name__} has {len(cell.drives)} drives ({', '.join(cell.drives)}), got {drive} along the "
            f"fourth axis of {shape_of(inputs)}"
        )
    shapes = [(head, drive, unit, unit), (head, drive, unit)]
    if not isinstance(recurrent, Tensor) or tuple(recurrent.shape) not in shapes:
        raise ValueError(
            f"recurrent: expected [head, drive, unit, unit] = {list(shapes[0])}, or [head, drive, unit] = {list(shapes[1])} "
            f"for a diagonal, got {shape_of(recurrent) if isinstance(recurrent, Tensor) else type(recurrent).__name__}"
        )
    check_like("recurrent", recurrent, "inputs", inputs, same_dtype=True)
    if recurrent_bias is not None:
        if tuple(recurrent_bias.shape) != shapes[1]:
            raise ValueError(
                f"recurrent_bias: expected [head, drive, unit] = {list(shapes[1])}, got {shape_of(recurrent_bias)}"
            )
        check_like("recurrent_bias", recurrent_bias, "inputs", inputs, same_dtype=True)
    if mask is not None and (tuple(mask.shape) != (batch, pos) or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected booleans [batch, pos] = {[batch, pos]}, got {shape_of(mask)} of {mask.dtype}")
    dtype = compute_dtype(inputs.dtype)
    return FeedBack(recurrent.to(dtype), None if recurrent_bias is None else recurrent_bias.to(dtype))


def check_cell_state(name: str, state: object, cell: Cell, inputs: Tensor) -> Tensor:
    expected = [inputs.shape[0], inputs.shape[1], inputs.shape[4], len(cell.slots)]
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(state).__name__}")
    if list(state.shape) != expected:
        raise ValueError(
            f"{name}: expected [batch, head, unit, slot] = {expected} (slots {', '.join(cell.slots)}), got {shape_of(state)}"
        )
    dtype = compute_dtype(inputs.dtype)
    if state.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the type of states of {inputs.dtype} inputs, got {state.dtype}")
    check_like(name, state, "inputs", inputs, same_dtype=False)
    return state


def empty_state(cell: Cell, inputs: Tensor) -> Tensor:
    """The state before the first token: zeros [batch, head, unit, slot]."""
    batch, head, _, _, unit = inputs.shape
    return inputs.new_zeros(batch, head, unit, len(cell.slots), dtype=compute_dtype(inputs.dtype))


def slots_of(state: Tensor) -> Slots:
    """[batch, head, unit, slot] -> one [head, batch, unit] for each slot."""
    return state.transpose(0, 1).unbind(-1)


def state_of(slots: Slots) -> Tensor:
    """The inverse of `slots_of`."""
    return torch.stack(slots, -1).transpose(0, 1)
