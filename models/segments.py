"""Texts read in segments of a fixed length: which segment and place each token has, and reading with the memory handed on.

Segments are counted in every text by itself, padding left out, so that neither padding nor the way in which a text is cut into calls moves
their borders.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.context import Context
from workbench.instrument.states import ModelState


class SegmentGrid:
    """Where the tokens of a call, or of a part of it, lie in segments of `length` tokens.

    The first row of the grid is the segment that earlier calls began (or a new one); its first places are theirs.

    Args:
        before: real tokens read before, a number or [batch]. real: True at real tokens, [batch or 1, pos]. length: of a segment.
    """

    def __init__(self, before: int | Tensor, real: Tensor, length: int) -> None:
        self.length = length
        begun = torch.as_tensor(before, device=real.device).expand(real.shape[0]) % length
        at = begun[:, None] + real.cumsum(1) - 1
        self.end = begun + real.sum(1)  # [batch or 1], counted from the beginning of the first row
        self.segments = int((self.end.max() - 1).clamp(min=0)) // length + 1
        self.at = torch.where(real, at, self.segments * length)  # padding goes to a place that nobody reads

    def filled(self) -> Tensor:
        """True where a place holds a token of this or an earlier call, [batch or 1, segment, place]."""
        places = torch.arange(self.segments * self.length, device=self.end.device)
        return (places < self.end[:, None]).unflatten(1, (self.segments, self.length))

    def sort(self, x: Tensor, begun: Tensor | None = None) -> Tensor:
        """x [batch, pos, ...] by segment, [batch, segment, place, ...]; `begun` [batch, place, ...] is the segment carried so far."""
        grid = x.new_zeros(x.shape[0], self.segments * self.length + 1, *x.shape[2:])
        if begun is not None:
            grid = torch.cat([begun.to(x.dtype), grid[:, self.length :]], dim=1)
        grid = grid.scatter(1, self._index(x), x)
        return grid[:, :-1].unflatten(1, (self.segments, self.length))

    def unsort(self, grid: Tensor) -> Tensor:
        """[batch, segment, place, ...] -> [batch, pos, ...]; padding gets what the last place has."""
        flat = grid.flatten(1, 2)
        return flat.gather(1, self._index(flat).clamp(max=flat.shape[1] - 1))

    def unfinished(self, grid: Tensor) -> Tensor:
        """The segment that is not full yet, [batch, place, ...]; zeros where nothing is begun."""
        row = (self.end // self.length).expand(grid.shape[0])
        padded = torch.cat([grid, torch.zeros_like(grid[:, :1])], dim=1)
        return padded[torch.arange(grid.shape[0], device=grid.device), row]

    def _index(self, x: Tensor) -> Tensor:
        """`at`, as scatter and gather want it for a tensor [batch, pos or place, ...]."""
        at = self.at.reshape(*self.at.shape, *[1] * (x.dim() - 2))
        return at.expand(x.shape[0], -1, *x.shape[2:])


def real_tokens(context: Context, length: int, device: torch.device) -> Tensor:
    """True at the real tokens of a call of `length` tokens, [batch or 1, pos]."""
    return torch.ones(1, length, dtype=torch.bool, device=device) if context.mask is None else context.mask


def in_segments(
    model: Any, tokens: Tensor, length: int, state: ModelState | None = None, detach: bool = True, **options: Any
) -> Iterator[tuple[Any, ModelState]]:
    """Run a model over pieces of `length` tokens, handing the state on: yields the output and the state after each piece.

    Args:
        tokens: [batch, pos]. state: to begin with. detach: no gradient goes back into earlier pieces (Transformer-XL's way to train).
        options: of the model's call, e.g. `return_type="loss"`.

    The state can be patched between segments: send the edited one to the generator, or go on from it with a new one.

    Raises:
        ValueError: pieces of less than one token.
    """
    if length < 1:
        raise ValueError(f"Segments of {length} tokens. Expected at least 1.")
    for start in range(0, tokens.shape[1], length):
        output, state = model(tokens[:, start : start + length], state=state, return_state=True, **options)
        edited = yield output, state
        state = state if edited is None else edited
        state = state.detach() if detach else state
