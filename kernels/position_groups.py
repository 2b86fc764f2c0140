"""Sequences of a batch that stand at the same positions, for recurrences whose rule depends on the position itself.

Padding lets no time pass, so the sequences of a padded batch disagree about the position of a token. Forms that work on
aligned blocks of positions run each group of agreeing sequences on its real tokens alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.arguments import shape_of


def check_places(start: int | Tensor, real: Tensor | None, like: Tensor) -> tuple[int | Tensor, Tensor | None]:
    """`start` (tokens read before this call) as one number, or [batch] where sequences differ; `real` as given.

    like : [batch, head, pos, …]. Raises ValueError naming the argument that does not fit.
    """
    batch, pos = like.shape[0], like.shape[2]
    if isinstance(start, Tensor):
        if start.shape != (batch,) or start.dtype != torch.long:
            raise ValueError(
                f"start: expected a number, or integers [batch={batch}], got {shape_of(start)} {start.dtype}"
            )
        first = int(start[0])
        start = first if bool((start == first).all()) else start
    elif not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ValueError(f"start: expected a number of tokens (at least 0), or integers [batch={batch}], got {start!r}")
    if real is not None and (real.shape != (batch, pos) or real.dtype != torch.bool):
        raise ValueError(f"real: expected booleans [batch={batch}, pos={pos}], got {shape_of(real)} {real.dtype}")
    return start, real


def starts(start: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """[batch]."""
    return start.to(device) if isinstance(start, Tensor) else torch.full((batch,), start, device=device)


def positions_of(start: int | Tensor, real: Tensor | None, like: Tensor) -> Tensor:
    """Position of every token in its own sequence, [batch, pos]; a padding token has that of the real one before it."""
    batch, pos = like.shape[0], like.shape[2]
    first = starts(start, batch, like.device)[:, None]
    if real is None:
        return first + torch.arange(pos, device=like.device)
    return (first + real.cumsum(1) - 1).clamp(min=0)


def run_in_groups(
    run: Callable[[Sequence[Tensor | None], Tensor, int], tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    state: Tensor,
    start: int | Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs every group of sequences with the same start and the same real tokens, and puts the results together.

    tensors : [batch, head, pos, …] or None; the first is a tensor. state : [batch, …]. run(tensors, state, start)
    gives (output [batch, head, pos, …], state) of a group without padding. Outputs of padding are zero.
    """
    like = tensors[0]
    assert like is not None
    if real is None and not isinstance(start, Tensor):
        return run(tensors, state, start)
    batch, pos = like.shape[0], like.shape[2]
    first = starts(start, batch, like.device)
    mask = like.new_ones(batch, pos, dtype=torch.bool) if real is None else real
    keys = torch.cat([first[:, None], mask.long()], 1)
    groups, member = keys.unique(dim=0, return_inverse=True)
    output: Tensor | None = None
    states: list[Tensor] = []
    rows_in_order: list[Tensor] = []
    for number, group in enumerate(groups):
        rows, kept = (member == number).nonzero().squeeze(-1), group[1:].nonzero().squeeze(-1)
        rows_in_order.append(rows)
        if not len(kept):
            states.append(state[rows])
            continue
        parts = [None if x is None else x[rows][:, :, kept] for x in tensors]
        result, after = run(parts, state[rows], int(group[0]))
        states.append(after)
        if output is None:
            output = result.new_zeros(batch, result.shape[1], pos, *result.shape[3:])
        output = _placed(output, result, rows, kept)
    if output is None:  # nothing but padding: what a run without tokens gives has the right heads and widths
        nothing, _ = run([None if x is None else x[:, :, :0] for x in tensors], state, 0)
        output = nothing.new_zeros(batch, nothing.shape[1], pos, *nothing.shape[3:])
    return output, torch.cat(states)[torch.cat(rows_in_order).argsort()]


def _placed(output: Tensor, result: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    """`output` with `result` at these sequences and tokens, differentiably."""
    inner = output.new_zeros(len(rows), *output.shape[1:]).index_copy(2, kept, result)
    return output.index_add(0, rows, inner)
