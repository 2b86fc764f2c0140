"""Progress and cancelling for long measurements."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Report = Callable[[float, str], None]


class MeasurementCancelled(RuntimeError):
    """The caller set the `cancel` event; nothing was changed and nothing is returned."""


def watched(items: Sequence[T], what: str, progress: Report | None, cancel: threading.Event | None) -> Iterator[T]:
    """The items one by one; before each, `progress(fraction, message)` is told and a set `cancel` raises MeasurementCancelled."""
    total = len(items)
    for number, item in enumerate(items):
        if cancel is not None and cancel.is_set():
            raise MeasurementCancelled(f"Cancelled while: {what}, {number} of {total}.")
        if progress is not None:
            progress(number / total, f"{what}, {number} of {total}")
        yield item
    if progress is not None:
        progress(1.0, f"{what}, {total} of {total}")
