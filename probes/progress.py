"""Progress and cancelling for long measurements: one way for all probes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Report = Callable[[float, str], None]


class MeasurementCancelled(InterruptedError):
    """The caller set the `cancel` event; nothing is returned."""


@dataclass(frozen=True)
class Progress:
    """Tells `callback(fraction, message)` how far a job is, and raises MeasurementCancelled as soon as `cancel` is set.

    `first` and `last` are the fractions at which this part of the job begins and ends.
    """

    callback: Report | None = None
    cancel: threading.Event | None = None
    first: float = 0.0
    last: float = 1.0

    def __call__(self, fraction: float, message: str) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise MeasurementCancelled(f"Cancelled while: {message}.")
        if self.callback is not None:
            self.callback(self.first + fraction * (self.last - self.first), message)

    def part(self, first: float, last: float) -> "Progress":
        """The stretch from `first` to `last` of this part."""
        width = self.last - self.first
        return Progress(self.callback, self.cancel, self.first + first * width, self.first + last * width)


def watched(items: Sequence[T], what: str, progress: Report | None, cancel: threading.Event | None) -> Iterator[T]:
    """The items one by one; before each, `progress(fraction, message)` is told and a set `cancel` raises MeasurementCancelled."""
    tell, total = Progress(progress, cancel), len(items)
    for number, item in enumerate(items):
        tell(number / total, f"{what}, {number} of {total}")
        yield item
    if progress is not None:
        progress(1.0, f"{what}, {total} of {total}")
