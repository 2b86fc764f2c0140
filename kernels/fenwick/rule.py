"""The recurrence under the levels, linear attention or the delta rule, behind one face.

Every level obeys the same transition, so a run of all levels is a run of the ordinary recurrence whose state holds the
levels side by side along state_v. A `Rule` offers just what the forms of this folder need of it.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import delta_rule as delta
from kernels import gated_linear_attention as linear


@dataclass(frozen=True)
class Rule:
    """k [batch, head, pos, state_k]; log_decay None or per token, or per token and state row; at most one of write and
    beta [batch, head, pos]: with beta the rule is the gated delta rule, else gated linear attention. All in one dtype."""

    k: Tensor
    log_decay: Tensor | None
    write: Tensor | None
    beta: Tensor | None
    scale: float

    def part(self, start: int, stop: int) -> "Rule":
        """Tokens start … stop - 1."""
        return self._map(lambda x: x[:, :, start:stop])

    def folded(self, front: int, size: int) -> "Rule":
        """Blocks of `size` tokens as separate sequences; see `folded`."""
        return self._map(lambda x: folded(x, front, size))

    def _map(self, change) -> "Rule":  # type: ignore[no-untyped-def]
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rule(**{name: change(x) if isinstance(x, Tensor) else x for name, x in given.items()})

    def pattern(self, q: Tensor) -> Tensor:
        """[batch, head, query, key]: the weights of the rule without levels."""
        if self.beta is not None:
            return delta.effective_pattern(q, self.k, self.beta, log_decay=self.log_decay, scale=self.scale)
        return linear.effective_pattern(q, self.k, log_decay=self.log_decay, write=self.write, scale=self.scale)

    def read(self, q: Tensor, v: Tensor, state: Tensor | None = None) -> Tensor:
        """Outputs [batch, head, pos, state_v] from the state [batch, head, state_k, state_v] before the first token."""
        if self.beta is not None:
            return delta.delta_rule(
                q, self.k, v, self.beta, log_decay=self.log_decay, scale=self.scale, initial_state=state
            )[0]
        return linear.gated_linear_attention(
            q, self.k, v, log_decay=self.log_decay, write=self.write, scale=self.scale, initial_state=state
        )[0]

    def last_state(self, v: Tensor, state: Tensor | None) -> Tensor:
        """The state after the last token."""
        last = [self.k.shape[2] - 1]
        if self.beta is not None:
            return delta.states_at(self.k, v, self.beta, last, log_decay=self.log_decay, initial_state=state)[:, 0]
        return linear.states_at(self.k, v, last, log_decay=self.log_decay, write=self.write, initial_state=state)[:, 0]


def folded(x: Tensor, front: int, size: int) -> Tensor:
    """[batch, head, pos, …] -> [batch · block, head, size, …], after `front` empty tokens; the last block is filled up.

    Empty tokens are zeros: they neither write nor forget.
    """
    pos = front + x.shape[2]
    back = -pos % size
    x = F.pad(x, (0, 0) * (x.ndim - 3) + (front, back))
    blocks = x.unflatten(2, ((pos + back) // size, size))
    return blocks.transpose(1, 2).flatten(0, 1)


def unfolded(x: Tensor, batch: int, front: int, pos: int) -> Tensor:
    """The inverse of `folded`: [batch · block, head, size, …] -> [batch, head, pos, …]."""
    blocks = x.unflatten(0, (batch, -1)).transpose(1, 2)
    return blocks.flatten(2, 3)[:, :, front : front + pos]


def side_by_side(state: Tensor) -> Tensor:
    """Levels along state_v: [batch, head, level, state_k, state_v] -> [batch, head, state_k, level · state_v]."""
    return state.transpose(2, 3).flatten(3)


def apart(wide: Tensor, n_levels: int) -> Tensor:
    """The inverse of `side_by_side`."""
    return wide.unflatten(3, (n_levels, -1)).transpose(2, 3)


def at_level(v: Tensor, levels: Tensor, n_levels: int) -> Tensor:
    """Values put at their level, zeros at the others: [batch, head, pos, state_v], [pos] -> [batch, head, pos, level · state_v]."""
    chosen = torch.nn.functional.one_hot(levels, n_levels).to(v.dtype)
    return (v.unsqueeze(3) * chosen.unsqueeze(-1)).flatten(3)
