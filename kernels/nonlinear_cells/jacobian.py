"""How strongly each output moves with what drove an earlier token: products of the steps' Jacobians, exactly.

A cell is not linear in anything, so no pattern reproduces its output. What exists is the derivative of the output h_i by
the drive x_j of token j, around the states that the run went through:

    dh_i / dx_j = H J_i J_{i-1} ... J_{j+1} B_j        H picks the slot h,  B_j = ds_j / dx_j,  J_t = ds_t / ds_{t-1}

J_t is [slot x unit, slot x unit]. The update is elementwise, so B, and what J has besides the recurrent weights, are
derivatives of single units, found by forward differentiation for all tokens at once. Rows H J_i ... J_{j+1} of a few
queries are carried backwards over the tokens; a product is never stored, and neither is query x key x unit x unit.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.arguments import check_positions

from .arguments import check_cell
from .cells import Cell
from .tangents import derivative

AT_ONCE = 1 << 21  # numbers of the rows carried at once


@dataclass(frozen=True)
class LocalDerivatives:
    """Derivatives of each unit's new slots, for every token, [batch, head, pos, slot, ..., unit].

    own: by the unit's own slots, [..., slot, slot, unit]. by_input: by its drives x, [..., slot, drive, unit].
    by_recurrent: by the recurrent drives r, same shape; the same tensor where the cell sees only x + r.
    recurrent: R in the type of the state.
    """

    own: Tensor
    by_input: Tensor
    by_recurrent: Tensor
    recurrent: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether units feed back to themselves alone, so that they can be taken apart."""
        return self.recurrent.ndim == 3

    def of_units(self, units: list[int]) -> "LocalDerivatives":
        """The same of some units only; means something for a diagonal R."""
        every = (self.own, self.by_input, self.by_recurrent, self.recurrent)
        return LocalDerivatives(*(part[..., units] for part in every))


def local_derivatives(
    cell: Cell,
    inputs: Tensor,
    recurrent: Tensor,
    before: Tensor,
    *,
    recurrent_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> LocalDerivatives:
    """Derivatives around the states that each token met. before: `CellRun.before`; others as in `run_cell`.

    At padding the state stays, so its derivative by itself is 1 and by any drive 0.
    """
    feed_back = check_cell(cell, inputs, recurrent, recurrent_bias, mask)
    dtype = before.dtype
    x = inputs.to(dtype).transpose(0, 1)
    slots = before.transpose(0, 1).unbind(-1)
    r = feed_back(slots[0])
    n_drives, n_slots = len(cell.drives), len(cell.slots)

    def step(x: Tensor, r: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        return cell.update(x, r, slots)

    def moved_by(x_tangent: Tensor, r_tangent: Tensor, slot: int | None) -> Tensor:
        tangents = tuple(torch.full_like(each, float(place == slot)) for place, each in enumerate(slots))
        _, moved = derivative(step, (x, r, *slots), (x_tangent, r_tangent, *tangents))
        return torch.stack(moved, -2)  # [head, batch, pos, slot, unit]

    none = torch.zeros_like(x)

    def one(drive: int) -> Tensor:
        tangent = torch.zeros_like(x)
        tangent[..., drive, :] = 1
        return tangent

    own = torch.stack([moved_by(none, none, slot) for slot in range(n_slots)], -2)
    by_input = torch.stack([moved_by(one(drive), none, None) for drive in range(n_drives)], -2)
    by_recurrent = by_input
    if not cell.additive:
        by_recurrent = torch.stack([moved_by(none, one(drive), None) for drive in range(n_drives)], -2)
    if mask is not None:
        real = mask[None, :, :, None, None, None]
        stays = torch.eye(n_slots, dtype=dtype, device=own.device).unsqueeze(-1)
        own = torch.where(real, own, stays)
        by_input = by_input * real
        by_recurrent = by_input if cell.additive else by_recurrent * real
    by_input, by_recurrent = by_input.transpose(0, 1), by_recurrent.transpose(0, 1)
    if cell.additive:
        by_recurrent = by_input
    return LocalDerivatives(own.transpose(0, 1), by_input, by_recurrent, feed_back.matrix)


def jacobian_pattern(derivatives: LocalDerivatives, queries: Sequence[int] | Tensor | None = None) -> Tensor:
    """Frobenius norm of dh_i / dx_j over the units of a head and all drives, [batch, head, query, key]; 0 for j > i.

    queries: positions of the rows wanted, in any order; None for all of them.
    """
    batch, head, pos, n_slots, n_drives, unit = derivatives.by_input.shape
    asked = list(range(pos)) if queries is None else check_positions("queries", queries, pos)
    result = derivatives.own.new_zeros(batch, head, len(asked), pos)
    numbers = batch * head * max(n_slots, n_drives) * unit * (1 if derivatives.diagonal else unit)
    for places in _blocks(asked, numbers):
        for key, first, moved in _backwards(derivatives, [asked[place] for place in places]):
            result[:, :, places[first:], key] = moved.flatten(3).square().sum(-1).sqrt()
    return result


def unit_jacobian(
    derivatives: LocalDerivatives,
    drive: int,
    units: Sequence[int] | Tensor | None = None,
    queries: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """dh_i / dx_j of single units by one of their own drives, signed and exact: [batch, head, unit, query, key].

    drive: index into the cell's drives. units, queries: those wanted, in any order; None for all. Only for a diagonal R,
    where a unit is moved by no other. Raises ValueError otherwise, or if an index does not exist.
    """
    if not derivatives.diagonal:
        raise ValueError(
            "derivatives: single units need a diagonal recurrent; here every unit moves the others of its head"
        )
    batch, head, pos, n_slots, n_drives, unit = derivatives.by_input.shape
    check_positions("drive", [drive], n_drives, "drive", "drives")
    chosen = list(range(unit)) if units is None else check_positions("units", units, unit, "unit", "units")
    asked = list(range(pos)) if queries is None else check_positions("queries", queries, pos)
    part = derivatives.of_units(chosen)
    result = derivatives.own.new_zeros(batch, head, len(chosen), len(asked), pos)
    for places in _blocks(asked, batch * head * n_slots * n_drives * len(chosen)):
        for key, first, moved in _backwards(part, [asked[place] for place in places]):
            result[:, :, :, places[first:], key] = moved[..., drive, :].transpose(2, 3)
    return result


def _blocks(queries: list[int], numbers: int) -> Iterator[list[int]]:
    """Places in `queries`, in ascending order of the query, so many at once as fit."""
    places = sorted(range(len(queries)), key=lambda place: queries[place])
    size = max(1, AT_ONCE // numbers)
    for start in range(0, len(places), size):
        yield places[start : start + size]


@torch.no_grad()
def _backwards(derivatives: LocalDerivatives, queries: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """For every key from the last query down to 0: (key, first, dh_i / dx_key of the queries from number `first` on).

    queries ascend. The derivative is [batch, head, query, drive, unit] for a diagonal R, each unit by its own drives, else
    [batch, head, query, unit of h, drive, unit].
    """
    batch, head, _, n_slots, n_drives, unit = derivatives.by_input.shape
    own, by_input, by_recurrent = derivatives.own, derivatives.by_input, derivatives.by_recurrent
    outputs = () if derivatives.diagonal else (unit,)
    # H J_i ... J_{key+1}; H picks the first slot, of every unit or of the unit that the row is about
    rows = own.new_zeros(batch, head, len(queries), *outputs, n_slots, unit)
    rows[..., 0, :] = 1 if derivatives.diagonal else torch.eye(unit, dtype=own.dtype, device=own.device)
    weights = derivatives.recurrent if derivatives.diagonal else derivatives.recurrent.transpose(2, 3).flatten(1, 2)
    for key in range(queries[-1], -1, -1):
        first = bisect_left(queries, key)
        seen = rows[:, :, first:]
        moved = _through(seen, by_input[:, :, key], n_drives)
        yield key, first, moved
        moved = moved if by_recurrent is by_input else _through(seen, by_recurrent[:, :, key], n_drives)
        after = _through(seen, own[:, :, key], n_slots)
        if derivatives.diagonal:
            after[..., 0, :] += (moved * weights[:, None]).sum(-2)
        else:  # [batch, head, query, unit of h, drive * unit] @ [head, 1, drive * unit, unit]
            after[..., 0, :] += moved.flatten(-2) @ weights[:, None]
        rows[:, :, first:] = after


def _through(rows: Tensor, derivative: Tensor, columns: int) -> Tensor:
    """rows [batch, head, query, (unit,) slot, unit] times [batch, head, slot, column, unit], unit by unit."""
    between = [1] * (rows.ndim - 4)
    spread = derivative.view(*derivative.shape[:2], *between, *derivative.shape[2:])
    return sum(
        (rows[..., slot, None, :] * spread[..., slot, :, :] for slot in range(1, rows.shape[-2])),
        rows[..., 0, None, :] * spread[..., 0, :, :],
    )
