"""What a run of the memory needs to know, and what it carries."""

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

from .links import Link
from .losses import Loss
from .memory import Memory


class Carry(NamedTuple):
    """What is handed from token to token, each [batch, head, row, column].

    state: what is accumulated (for the identity link: the weights). momentum: None without. anchor: the state at which the gradients of
    the running block are taken.
    """

    state: Tensor
    momentum: Tensor | None
    anchor: Tensor


class Signals(NamedTuple):
    """Per token, [batch, head, pos]: the loss before the token is written, and the norm of its gradient: the surprise."""

    loss: Tensor
    surprise: Tensor


@dataclass(frozen=True)
class Tokens:
    """What the tokens bring, each [batch, head, pos, …] or None: queries, keys, values, step size, log decay, log momentum, threshold."""

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    log_decay: Tensor | None
    log_momentum: Tensor | None
    threshold: Tensor | None

    def part(self, start: int, stop: int) -> "Tokens":
        """Tokens start … stop - 1."""
        return Tokens(*(None if x is None else x[:, :, start:stop] for x in self.listed()))  # type: ignore[arg-type]

    def listed(self) -> list[Tensor | None]:
        """The fields in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Rule:
    """memory, loss, link: see their files. every: tokens of a block, whose gradients are all taken at the state before it."""

    memory: Memory
    loss: Loss
    link: Link
    every: int
