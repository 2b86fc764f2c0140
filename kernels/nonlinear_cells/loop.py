"""The recurrence, one token at a time: the definition of every cell, and the oracle of Newton's method.

A step is a handful of small operations, so its cost is their number. Drives are laid out token by token before the loop,
heads lead so that feeding back is one batched product, and nothing is packed or copied between steps.
"""

import torch
from torch import Tensor

from .cells import Cell, Slots, Watch, unwatched
from .feedback import FeedBack


def loop(
    cell: Cell, inputs: Tensor, feed_back: FeedBack, slots: Slots, mask: Tensor | None = None, watch: Watch = unwatched
) -> tuple[list[Slots], Slots]:
    """inputs [batch, head, pos, drive, unit] in the type of the state; slots [head, batch, unit] each; mask [batch, pos].

    Returns (the slots after every token, those after the last).
    """
    by_token = inputs.permute(2, 1, 0, 3, 4).contiguous().unbind(0)
    real = [None] * len(by_token) if mask is None else mask.t()[:, None, :, None].unbind(0)
    history: list[Slots] = []
    for x, is_real in zip(by_token, real, strict=True):
        new = cell.update(x, feed_back(slots[0]), slots, watch)
        if is_real is not None:
            new = tuple(torch.where(is_real, after, before) for after, before in zip(new, slots, strict=True))
        history.append(new)
        slots = new
    return history, slots
