"""All tokens at once: Newton's method on the stacked equations h_t = f(x_t, h_{t-1}), for cells with a diagonal R.

    F_t = f(x_t, h_{t-1}),  J_t = df/dh at h_{t-1}           both for all tokens at once, from the current iterate h
    d_t = J_t d_{t-1} + (F_t - h_t),  h <- h + d             one linear scan over the tokens

ParaRNN (Danieli et al. 2025, arXiv 2510.21450, section 3; the idea: Lim et al. 2024, arXiv 2309.12252). With a diagonal R
the Jacobian is a number for every unit (one slot) or a small block (two slots). The first iterate is what each token
would do alone, f(x_t, 0). An iteration makes at least one more token exact, so `pos` iterations always suffice; a few do,
because the error is squared each time.

Gradients are those of the solution. In the last iteration h and J are constants and F carries the graph of x and of the
weights, so that what autograd sees is d = (I - J)^-1 dF, the implicit derivative, at the cost of one more scan and however
many iterations came before. It is as exact as the iterate is; a derivative of that derivative is not available.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_scan import Matrix, Vector, block_scan
from .cells import Cell, Slots
from .feedback import FeedBack
from .tangents import derivative


@dataclass(frozen=True)
class Solved:
    """What Newton's method found: the slots after every token, [head, batch, pos, unit] each, and its iterations."""

    slots: Slots
    iterations: int


def newton(
    cell: Cell,
    inputs: Tensor,
    feed_back: FeedBack,
    slots: Slots,
    mask: Tensor | None,
    iterations: int | None,
    tolerance: float,
) -> Solved:
    """Arguments as in `loop.loop`. iterations: how many; None: until |F - h| is at most `tolerance`, and one more."""
    by_head = inputs.transpose(0, 1)  # [head, batch, pos, drive, unit]
    real = None if mask is None else mask[None, :, :, None]

    def step(*before: Tensor) -> Slots:
        after = cell.update(by_head, feed_back(before[0]), before)
        if real is None:
            return after
        return tuple(torch.where(real, new, old) for new, old in zip(after, before, strict=True))

    pos = inputs.shape[2]
    with torch.no_grad():
        guess = step(*(torch.zeros_like(slot).unsqueeze(2).expand(-1, -1, pos, -1) for slot in slots))
        done = 0
        while done < (pos if iterations is None else iterations) - 1:
            before = shifted(guess, slots)
            after, jacobian = with_jacobian(step, before)
            errors = tuple(new - old for new, old in zip(after, guess, strict=True))
            if iterations is None and max(float(error.abs().max()) for error in errors) <= tolerance:
                break
            guess = _corrected(after, guess, _scan(jacobian, errors))
            done += 1
        before = shifted(guess, slots)
        _, jacobian = with_jacobian(step, before)
    # the first token continues the given slots, through which a gradient may flow; the others continue a constant
    before = tuple(torch.cat([slot.unsqueeze(2), old[:, :, 1:]], 2) for slot, old in zip(slots, before, strict=True))
    after = step(*before)
    errors = tuple(new - old for new, old in zip(after, guess, strict=True))
    return Solved(_corrected(after, guess, _scan(jacobian, errors)), done + 1)


def shifted(slots: Slots, first: Slots) -> Slots:
    """The slots before every token: those after the token before it."""
    return tuple(torch.cat([start.unsqueeze(2), slot[:, :, :-1]], 2) for slot, start in zip(slots, first, strict=True))


def with_jacobian(step: Callable[..., Slots], before: Slots) -> tuple[Slots, Matrix]:
    """step(*before) and its derivative by each slot, elementwise over units: jacobian[a][b] = d after[a] / d before[b]."""
    columns = []
    after: Slots = ()
    for number in range(len(before)):
        only = tuple(torch.full_like(slot, float(place == number)) for place, slot in enumerate(before))
        after, column = derivative(step, before, only)
        columns.append(column)
    return after, tuple(zip(*columns, strict=True))


def _scan(jacobian: Matrix, errors: Vector) -> Vector:
    """`block_scan` in the layout of the slots."""
    head, batch, pos, unit = errors[0].shape

    def flat(x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3).reshape(batch, pos, head * unit)

    solved = block_scan(tuple(tuple(map(flat, row)) for row in jacobian), tuple(map(flat, errors)))
    return tuple(x.view(batch, pos, head, unit).permute(2, 0, 1, 3) for x in solved)


def _corrected(after: Slots, guess: Slots, change: Slots) -> Slots:
    """guess + change, or after where a scan through far-off iterates overflowed: a plain iteration, exact one token further."""
    moved = (old + step for old, step in zip(guess, change, strict=True))
    return tuple(torch.where(new.isfinite(), new, plain) for new, plain in zip(moved, after, strict=True))
