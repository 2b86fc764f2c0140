"""Constants that must not lose precision when a model is cast to 16 bit: phases and decays near 1 would be ruined."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose buffers named in `exact_buffers` follow `.to(device)` but never change dtype."""

    exact_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in self.exact_buffers}
        result = super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return result
