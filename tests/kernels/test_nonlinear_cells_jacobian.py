"""The Jacobian maps of the nonlinear cells against autograd's own Jacobian of the whole run."""

from functools import cache

import pytest
import torch
from torch import Tensor

from kernels.nonlinear_cells import LocalDerivatives, jacobian_pattern, local_derivatives, run_cell, unit_jacobian
from kernels.nonlinear_cells import jacobian as module
from tests.kernels.nonlinear_cells_inputs import BATCH, DIAGONAL, HEAD, NAMES, POS, UNIT, make_inputs

EXACT = 1e-12


def mask(padded: bool) -> Tensor | None:
    real = torch.ones(BATCH, POS, dtype=torch.bool)
    real[0, :3] = real[1, 6] = False
    return real if padded else None


@cache
def by_autograd(name: str, padded: bool = False) -> Tensor:
    """dh_i / dx_j as [batch, head, query, unit of h, key, drive, unit]."""
    cell, inputs, recurrent, bias = make_inputs(name)

    def output(x: Tensor) -> Tensor:
        return run_cell(cell, x, recurrent, recurrent_bias=bias, mask=mask(padded)).output

    whole = torch.autograd.functional.jacobian(
        output, inputs
    )  # [batch, head, query, unit, batch, head, key, drive, unit]
    rows = [[whole[b, h, :, :, b, h] for h in range(HEAD)] for b in range(BATCH)]
    return torch.stack([torch.stack(row) for row in rows])


def derivatives(name: str, padded: bool = False) -> LocalDerivatives:
    cell, inputs, recurrent, bias = make_inputs(name)
    run = run_cell(cell, inputs, recurrent, recurrent_bias=bias, mask=mask(padded), keep_before=True)
    assert run.before is not None
    return local_derivatives(cell, inputs, recurrent, run.before, recurrent_bias=bias, mask=mask(padded))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_norms_are_those_of_the_whole_jacobian(name: str, padded: bool) -> None:
    expected = by_autograd(name, padded).square().sum((3, 5, 6)).sqrt()
    got = jacobian_pattern(derivatives(name, padded))
    assert float((got - expected).abs().max()) < EXACT * max(1.0, float(expected.max()))
    assert float(got.triu(1).abs().max()) == 0 and float(got.diagonal(dim1=2, dim2=3)[1, :, 0].min()) > 0


@pytest.mark.parametrize("name", ["lstm", "gru", "paralstm"])
def test_chosen_rows_and_few_rows_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any order, repeated, and carried one at a time are rows of the whole map."""
    local = derivatives(name)
    whole = jacobian_pattern(local)
    asked = [8, 0, 8, POS - 1, 3]
    assert torch.equal(jacobian_pattern(local, asked), whole[:, :, asked])
    monkeypatch.setattr(module, "AT_ONCE", 1)
    assert torch.allclose(jacobian_pattern(local, asked), whole[:, :, asked], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("drive", [0, 2])
def test_single_units_are_signed_and_exact(name: str, drive: int) -> None:
    expected = by_autograd(name)[..., drive, :].diagonal(dim1=3, dim2=5).permute(0, 1, 4, 2, 3)
    got = unit_jacobian(derivatives(name), drive)
    assert got.shape == (BATCH, HEAD, UNIT, POS, POS)
    assert float((got - expected).abs().max()) < EXACT
    assert bool((got < 0).any()) and bool((got > 0).any())
    chosen = unit_jacobian(derivatives(name), drive, units=[2, 0], queries=[7, 1])
    assert torch.equal(chosen, got[:, :, [2, 0]][:, :, :, [7, 1]])
    # and no unit is moved by another one
    off = by_autograd(name).permute(0, 1, 2, 4, 5, 3, 6) * (1 - torch.eye(UNIT, dtype=torch.float64))
    assert float(off.abs().max()) == 0


def test_an_edited_state_is_what_later_tokens_are_differentiated_at() -> None:
    """After an edit the map is that of a fresh run from the edited state."""
    cell, inputs, recurrent, bias = make_inputs("lstm")
    states: list[Tensor] = []

    def edit(position: int, state: Tensor) -> Tensor:
        states.append(0.5 * state + 0.2)
        return states[-1]

    run = run_cell(cell, inputs, recurrent, recurrent_bias=bias, stops=[4], on_state=edit, keep_before=True)
    rest = run_cell(cell, inputs[:, :, 5:], recurrent, recurrent_bias=bias, initial_state=states[0], keep_before=True)
    assert run.before is not None and rest.before is not None
    got = jacobian_pattern(local_derivatives(cell, inputs, recurrent, run.before, recurrent_bias=bias))
    expected = jacobian_pattern(local_derivatives(cell, inputs[:, :, 5:], recurrent, rest.before, recurrent_bias=bias))
    assert float((got[:, :, 5:, 5:] - expected).abs().max()) < EXACT


def test_refusals_are_in_words() -> None:
    with pytest.raises(ValueError, match="single units need a diagonal recurrent"):
        unit_jacobian(derivatives("lstm"), 0)
    with pytest.raises(ValueError, match=r"drive: drive 3 is outside 0 … 2"):
        unit_jacobian(derivatives("paragru"), 3)
    with pytest.raises(ValueError, match=r"queries: position 99 is outside"):
        jacobian_pattern(derivatives("lstm"), [99])
