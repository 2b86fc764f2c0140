"""Progress and cancelling for the long searches of this package."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


class SearchCancelled(RuntimeError):
    """The caller set the `cancel` event; nothing was changed and nothing is returned."""


@dataclass(frozen=True)
class Progress:
    """Tells `callback(fraction, message)` how far a job is, and raises SearchCancelled as soon as `cancel` is set.

    `first` and `last` are the fractions at which this part of the job begins and ends.
    """

    callback: Callable[[float, str], None] | None = None
    cancel: threading.Event | None = None
    first: float = 0.0
    last: float = 1.0

    def __call__(self, fraction: float, message: str) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise SearchCancelled(f"Cancelled while: {message}.")
        if self.callback is not None:
            self.callback(self.first + fraction * (self.last - self.first), message)

    def part(self, first: float, last: float) -> "Progress":
        """The stretch from `first` to `last` of this part."""
        width = self.last - self.first
        return Progress(self.callback, self.cancel, self.first + first * width, self.first + last * width)
