"""Random inputs of the delta rule for its tests, and the recurrence spelt out with what it stores on the way."""

from collections.abc import Callable
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
    beta: Tensor
    log_decay: Tensor | None
    initial: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        return {"log_decay": self.log_decay, "initial_state": self.initial}

    def tensors(self) -> list[Tensor]:
        every = (self.q, self.k, self.v, self.beta, self.log_decay, self.initial)
        return [x for x in every if x is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Inputs in another type; beta, decays and states stay at least float32."""
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        q, k, v = (x.detach().to(dtype) for x in (self.q, self.k, self.v))
        log_decay, initial = (None if x is None else x.detach().to(wide) for x in (self.log_decay, self.initial))
        return Inputs(q, k, v, self.beta.detach().to(wide), log_decay, initial)


def make_inputs(
    decay: str,
    initial: bool = False,
    shared: bool = False,
    batch: int = 2,
    head: int = 3,
    pos: int = 37,
    state_k: int = 5,
    state_v: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Normal q, v and state; keys of length 1; beta uniform in [0, 2); log decays uniform in [-1, 0)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    shapes = {
        "none": None,
        "constant": (head,),
        "scalar": (batch, head, pos),
        "vector": (batch, head, pos, state_k),
    }
    shape = shapes[decay]
    return Inputs(
        normal(batch, head, pos, state_k),
        torch.nn.functional.normalize(normal(batch, head, pos, state_k), dim=-1),
        normal(batch, 1 if shared else head, pos, state_v),
        2 * torch.rand(batch, head, pos, generator=generator, dtype=dtype),
        None if shape is None else -torch.rand(*shape, generator=generator, dtype=dtype),
        normal(batch, head, state_k, state_v) if initial else None,
    )


def naive(
    inputs: Inputs, scale: float = 1.0, edit: Callable[[int, Tensor], Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence written with sums over named axes, sharing no code with the package.

    edit(position, state) may replace the state after a token. Returns (output, states before edits [batch, pos, head,
    state_k, state_v], pseudo-values, state carried out).
    """
    batch, head, pos, state_k = inputs.k.shape
    state_v = inputs.v.shape[3]
    state = (
        torch.zeros(batch, head, state_k, state_v, dtype=inputs.k.dtype) if inputs.initial is None else inputs.initial
    )
    outputs, states, written = [], [], []
    for t in range(pos):
        g = inputs.log_decay
        if g is not None:
            step = g.exp()[None, :, None] if g.ndim == 1 else g[:, :, t].reshape(batch, head, -1).exp()
            state = step.unsqueeze(-1) * state
        key, value = inputs.k[:, :, t], inputs.v[:, :, t]
        error = value - torch.einsum("bhkv,bhk->bhv", state, key)
        pseudo_value = inputs.beta[:, :, t, None] * error
        state = state + torch.einsum("bhk,bhv->bhkv", key, pseudo_value)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", inputs.q[:, :, t], state))
        states.append(state)
        written.append(pseudo_value)
        edited = None if edit is None else edit(t, state)
        state = state if edited is None else edited
    return torch.stack(outputs, 2), torch.stack(states, 1), torch.stack(written, 2), state
