"""The models that the dashboard holds in memory: each opened once, the one not asked for longest leaves when they become too much."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

SHARE = 0.5
"""Of the memory that is free or theirs already, at most this much is for models."""


class OpenModels:
    """Models by name.

    Args:
        room: bytes that all of them may take; None: a share of the memory that is free when one is added.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room, self._models = room, OrderedDict[str, Any]()
        self._lock = threading.Lock()

    def get(self, name: str, open_it: Callable[[], Any]) -> Any:
        """The model, opened by `open_it()` when it is not here. Two threads may open the same model at once; one of the two stays."""
        with self._lock:
            if name in self._models:
                self._models.move_to_end(name)
                return self._models[name]
        model = open_it()
        with self._lock:
            model = self._models.setdefault(name, model)
            self._models.move_to_end(name)
            room = self._room if self._room is not None else self._allowed()
            while len(self._models) > 1 and self._taken() > room:
                self._models.popitem(last=False)
        return model

    def about(self) -> list[tuple[str, int]]:
        """Name and bytes of every model here, the last used first."""
        with self._lock:
            return [(name, size_of(model)) for name, model in reversed(self._models.items())]

    def _taken(self) -> int:
        return sum(size_of(model) for model in self._models.values())

    def _allowed(self) -> int:
        from models.pretrained.folders import free_memory

        free = free_memory()
        return 2**62 if free is None else int(SHARE * (free + self._taken()))


def size_of(model: Any) -> int:
    """Bytes of a model's weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
