"""The gates of every token at once, from the states that the tokens met: one elementwise update instead of a second loop."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .arguments import check_cell
from .cells import Cell


def cell_gates(
    cell: Cell,
    inputs: Tensor,
    recurrent: Tensor,
    before: Tensor,
    *,
    recurrent_bias: Tensor | None = None,
    replaced: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """{gate: [batch, head, pos, unit]} of a run, in the type of the state.

    Parameters
    ----------
    before : `CellRun.before`, the state that each token met; the other arguments as in `run_cell`
    replaced : {gate: {position: [batch, head, unit]}}, values with which `on_gate` had the run go on; gates of the same
        token that depend on them follow

    Raises ValueError naming the argument that does not fit, or a gate that the cell lacks.
    """
    feed_back = check_cell(cell, inputs, recurrent, recurrent_bias, None)
    unknown = set(replaced or {}) - set(cell.gates)
    if unknown:
        raise ValueError(
            f"replaced: {type(cell).__name__} has no gate {min(unknown)!r}; expected one of {', '.join(cell.gates) or 'none'}"
        )
    slots = before.transpose(0, 1).unbind(-1)
    found: dict[str, Tensor] = {}

    def record(name: str, gate: Tensor) -> Tensor:
        others = (replaced or {}).get(name, {})
        if others:
            positions = torch.tensor(sorted(others), device=gate.device)
            values = torch.stack([others[position].transpose(0, 1) for position in sorted(others)], 2)
            gate = gate.index_copy(2, positions, values.to(gate.dtype))
        found[name] = gate.transpose(0, 1)
        return gate

    cell.update(inputs.to(before.dtype).transpose(0, 1), feed_back(slots[0]), slots, record)
    return found
