"""A call that its model reads piece after piece, because what an early piece leaves enters the first layer under a later one.

Hook points then fire once per piece, as they fire once per token in a generation: functions and interventions get the piece, whose first
position is `hook.offset`. What is stored is put together again, so that a cache holds whole texts; a function that only reads can have
the same (`whole_call`), one that finds tokens by their place in the call too (`by_position`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.instrument.hook_points import ACTIVE, Entry, HookPoint

TEXT = ("pos", "query")  # axes along which a call is cut
HIDDEN = ("scores", "mask")  # roles that say of a token which is not read: -inf; any other says 0


def whole_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook function that only reads: of a call that is read in pieces it gets the activation of the whole, once, at the end."""
    function.reads_whole_call = True  # type: ignore[attr-defined]
    return function


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook function that treats every token by itself, found by its place in the call: of a call that is read in pieces it gets each
    piece at its place in a tensor of the whole, zero elsewhere, and what it makes of the piece counts."""
    function.acts_by_position = True  # type: ignore[attr-defined]
    return function


class Pieces:
    """The pieces of one call of `length` tokens, the first of which is at the absolute position `offset`."""

    silent = False

    def __init__(self, offset: int, length: int) -> None:
        self.offset, self.length = offset, length
        self.start = self.stop = 0
        self._held: dict[tuple[Entry, HookPoint], list[Tensor]] = {}

    @property
    def rest(self) -> int:
        """Tokens of the call behind the piece that is running."""
        return self.length - self.stop

    @contextmanager
    def reading(self, start: int, stop: int) -> Iterator[None]:
        """While the tokens from `start` to before `stop` of the call are read."""
        outer = ACTIVE.piece, ACTIVE.offset
        self.start, self.stop = start, stop
        ACTIVE.piece, ACTIVE.offset = self, self.offset + start
        try:
            yield
        finally:
            ACTIVE.piece, ACTIVE.offset = outer

    def passed(self, point: HookPoint, x: Tensor, entries: Sequence[Entry]) -> Tensor:
        """What the model goes on with when a piece passes a hook point. What stores whole texts waits for the last piece."""
        for entry in entries:
            if entry.joins:
                self._held.setdefault((entry, point), []).append(x)
            else:
                x = entry.fire(x, point, None)
        return x

    def finish(self) -> None:
        """Hand what waits the whole text. Call when no piece is running any more."""
        for (entry, point), parts in self._held.items():
            entry.fire(joined(point, parts), point, None)
        self._held.clear()

    def at_its_place(self, x: Tensor, point: HookPoint) -> Tensor:
        """A piece as part of the whole call, zero elsewhere."""
        around = []
        for axis, size in zip(reversed(point.axes), reversed(x.shape), strict=True):
            if axis in TEXT:
                around += [self.start, self.rest]
            else:
                around += [0, self.offset + self.length - size if axis == "key" else 0]
        return F.pad(x, around)

    def part_of(self, value: Tensor, x: Tensor, point: HookPoint) -> Tensor:
        """What of a value that was given for the whole call concerns the piece `x`; axes that do not count its tokens stay."""
        for back, axis in enumerate(reversed(point.axes), 1):
            if back > value.dim():
                break
            size, here = value.shape[-back], x.shape[-back]
            if axis in TEXT and size == self.length:
                value = value.narrow(-back, self.start, here)
            elif axis == "key" and size == self.offset + self.length:
                value = value.narrow(-back, 0, here)
        return value


class Silence:
    """While a model runs its blocks over something that is not the text, no hook on the text's hook points fires."""

    silent = True
    rest = 0

    def __init__(self, outer: Any) -> None:
        self.outer = outer

    def passed(self, point: HookPoint, x: Tensor, entries: Sequence[Entry]) -> Tensor:
        """The activation as it is."""
        return x


@contextmanager
def silence() -> Iterator[None]:
    """No hook point of the running thread fires, or says that it is watched, within the block, unless `aloud`."""
    outer: Any = ACTIVE.piece
    ACTIVE.piece = Silence(outer)
    try:
        yield
    finally:
        ACTIVE.piece = outer


def aloud(point: HookPoint, x: Tensor) -> Tensor:
    """Pass a hook point of what runs in the silence itself."""
    around = ACTIVE.piece
    ACTIVE.piece = around.outer if isinstance(around, Silence) else around
    try:
        return point(x)
    finally:
        ACTIVE.piece = around


def joined(point: HookPoint, parts: Sequence[Tensor], unread: float | None = None) -> Tensor:
    """The pieces of an activation as one tensor, along the axis that counts tokens; where there is none, the last piece.

    Maps from something else to tokens, which have all keys from the beginning, are summed: each piece tells of keys of its own.
    A piece knows the keys up to its own end. At later ones it gets `unread`; None: what a token says that is not read, 0 or before a
    softmax -inf.
    """
    axis = next((axis for axis in TEXT if axis in point.axes), None)
    if axis is None and "key" in point.axes:
        return torch.stack(list(parts)).sum(0)
    if axis is None or len(parts) == 1:
        return parts[-1]
    if "key" in point.axes:
        place = point.axes.index("key")
        fill = unread if unread is not None else float("-inf") if point.role in HIDDEN else 0.0
        widest = max(part.shape[place] for part in parts)
        behind = [0, 0] * (len(point.axes) - 1 - place)
        parts = [F.pad(part, (*behind, 0, widest - part.shape[place]), value=fill) for part in parts]
    return torch.cat(list(parts), dim=point.axes.index(axis))
