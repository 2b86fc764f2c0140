"""Random inputs of gated linear attention for its tests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DECAYS = ("none", "constant", "scalar", "vector")


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    _write: Tensor | None
    _initial: Tensor | None

    @property
    def write(self) -> Tensor:
        assert self._write is not None
        return self._write

    @property
    def initial(self) -> Tensor:
        assert self._initial is not None
        return self._initial

    @property
    def options(self) -> dict[str, Any]:
        return {"log_decay": self.log_decay, "write": self._write, "initial_state": self._initial}

    @property
    def pattern_options(self) -> dict[str, Any]:
        return {"log_decay": self.log_decay, "write": self._write}

    def tensors(self) -> list[Tensor]:
        every = (self.q, self.k, self.v, self.log_decay, self._write, self._initial)
        return [x for x in every if x is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Inputs in another type; decays and states stay at least float32."""
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        narrow = [x.detach().to(dtype) for x in (self.q, self.k, self.v)]
        rest = [None if x is None else x.detach().to(wide) for x in (self.log_decay, self._write, self._initial)]
        return Inputs(*narrow, *rest)


def make_inputs(
    decay: str,
    write: bool = False,
    initial: bool = False,
    shared: bool = False,
    batch: int = 2,
    head: int = 3,
    pos: int = 37,
    state_k: int = 5,
    state_v: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Normal q, k, v, write and state; log decays uniform in [-1, 0). shared: one value head for all heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decay_shape = {
        "none": None,
        "constant": (head,),
        "scalar": (batch, head, pos),
        "vector": (batch, head, pos, state_k),
    }
    shape = decay_shape[decay]
    return Inputs(
        normal(batch, head, pos, state_k),
        normal(batch, head, pos, state_k),
        normal(batch, 1 if shared else head, pos, state_v),
        None if shape is None else -torch.rand(*shape, generator=generator, dtype=dtype),
        normal(batch, head, pos) if write else None,
        normal(batch, head, state_k, state_v) if initial else None,
    )
