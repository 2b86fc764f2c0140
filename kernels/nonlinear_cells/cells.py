"""The recurrent cells, each as one elementwise update: what a unit does with its drives and its own state.

Every cell has the same shape. A token drives each unit through a few numbers x (one for each of the cell's `drives`), the
heads' last outputs drive it through as many numbers r = R h_{t-1}, and the update mixes both with the unit's own slots:

    new slots = update(x_t, r_t, slots)          the first slot is the output h, which R feeds back

The update is elementwise over units, so all coupling between units lies in R; this is what Newton's method and the
Jacobian maps of this folder build on. In an update, tensors are [head, ..., unit] and drives [head, ..., drive, unit].
`watch(name, gate)` is called for every gate and returns what the update goes on with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Slots = tuple[Tensor, ...]
Watch = Callable[[str, Tensor], Tensor]


def unwatched(name: str, gate: Tensor) -> Tensor:
    """The watch of a step at which nobody looks."""
    return gate


class Cell:
    """Base of the cells. `drives`, `gates` and `slots` are names in the order of their axes.

    additive: the update sees only x + r.
    """

    drives: tuple[str, ...]
    gates: tuple[str, ...]
    slots: tuple[str, ...] = ("h",)
    additive: bool = True

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        """inputs, recurrent [head, ..., drive, unit]; each slot [head, ..., unit]. Returns the new slots."""
        raise TypeError(f"{type(self).__name__} does not say how it updates its state")


@dataclass(frozen=True)
class Elman(Cell):
    """h_t = tanh(x + r), or ReLU (Elman 1990). `activation` is "tanh" or "relu"."""

    activation: str = "tanh"
    drives = ("candidate",)
    gates = ()

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        drive = (inputs + recurrent).squeeze(-2)
        return (torch.tanh(drive) if self.activation == "tanh" else torch.relu(drive),)


@dataclass(frozen=True)
class LSTM(Cell):
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    i, f, o = sigmoid(x + r),  g = tanh(x + r),  c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)
    """

    drives = ("input", "forget", "output", "candidate")
    gates = ("input", "forget", "output", "candidate")
    slots = ("h", "c")

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        drive = inputs + recurrent
        i, f, o = torch.sigmoid(drive[..., :3, :]).unbind(-2)
        g = torch.tanh(drive[..., 3, :])
        i, f, o, g = watch("input", i), watch("forget", f), watch("output", o), watch("candidate", g)
        c = torch.addcmul(f * slots[1], i, g)
        return o * torch.tanh(c), c


@dataclass(frozen=True)
class GRU(Cell):
    """Cho et al. 2014 in the form of cuDNN and torch: the reset gate r acts behind the recurrent product.

    r, u = sigmoid(x + R h),  n = tanh(x + r (R h)),  h_t = u h_{t-1} + (1 - u) n
    """

    drives = ("reset", "update", "candidate")
    gates = ("reset", "update", "candidate")
    additive = False

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        reset, update = torch.sigmoid(inputs[..., :2, :] + recurrent[..., :2, :]).unbind(-2)
        reset, update = watch("reset", reset), watch("update", update)
        candidate = torch.tanh(torch.addcmul(inputs[..., 2, :], reset, recurrent[..., 2, :]))
        return (self.blend(slots[0], watch("candidate", candidate), update),)

    def blend(self, old: Tensor, new: Tensor, update: Tensor) -> Tensor:
        """What the update gate keeps: here 1 keeps the old state."""
        return torch.lerp(new, old, update)


@dataclass(frozen=True)
class ParaGRU(GRU):
    """The GRU of ParaRNN (Danieli et al. 2025, arXiv 2510.21450): diagonal R, and an update gate of 1 takes the new state.

    With a diagonal R it is the same whether the reset gate acts before or behind the recurrent product.
    """

    def blend(self, old: Tensor, new: Tensor, update: Tensor) -> Tensor:
        return torch.lerp(old, new, update)


@dataclass(frozen=True)
class ParaLSTM(Cell):
    """The LSTM of ParaRNN (arXiv 2510.21450): diagonal R, coupled gates i = 1 - f, and peepholes p_f, p_o onto the cell.

    f = sigmoid(x + r + p_f c_{t-1}),  g = tanh(x + r),  c_t = f c_{t-1} + (1 - f) g
    o = sigmoid(x + r + p_o c_t),      h_t = o tanh(c_t)

    `peephole` [2, head, unit] holds p_f and p_o.
    """

    peephole: Tensor
    drives = ("forget", "output", "candidate")
    gates = ("forget", "output", "candidate")
    slots = ("h", "c")

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        forget_drive, output_drive, candidate_drive = (inputs + recurrent).unbind(-2)
        look_back, look = (per_unit(weight, slots[1].ndim) for weight in self.peephole.to(inputs.dtype))
        f = watch("forget", torch.sigmoid(torch.addcmul(forget_drive, look_back, slots[1])))
        g = watch("candidate", torch.tanh(candidate_drive))
        c = torch.lerp(g, slots[1], f)
        o = watch("output", torch.sigmoid(torch.addcmul(output_drive, look, c)))
        return o * torch.tanh(c), c


@dataclass(frozen=True)
class SLSTM(Cell):
    """The sLSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 8-17): exponential gates kept in range by a stabiliser m.

    m_t = max(log sigmoid(f) + m_{t-1}, i);  i' = exp(i - m_t),  f' = exp(log sigmoid(f) + m_{t-1} - m_t)
    c_t = f' c_{t-1} + i' tanh(z),  n_t = f' n_{t-1} + i',  h_t = sigmoid(o) c_t / n_t

    h does not depend on m, which only scales c and n. Where nothing is written yet (n = 0), m_t = i.
    """

    drives = ("input", "forget", "output", "candidate")
    gates = ("input", "forget", "output", "candidate")
    slots = ("h", "c", "n", "m")

    def update(self, inputs: Tensor, recurrent: Tensor, slots: Slots, watch: Watch = unwatched) -> Slots:
        input_drive, forget_drive, output_drive, candidate_drive = (inputs + recurrent).unbind(-2)
        _, c, n, m = slots
        kept = m + F.logsigmoid(forget_drive)
        m = torch.where(n == 0, input_drive, torch.maximum(kept, input_drive))
        i = watch("input", torch.exp(input_drive - m))
        f = watch("forget", torch.exp((kept - m).clamp(max=0)))  # above 0 only where there is nothing to keep
        o = watch("output", torch.sigmoid(output_drive))
        z = watch("candidate", torch.tanh(candidate_drive))
        c, n = torch.addcmul(f * c, i, z), torch.addcmul(i, f, n)
        return o * c / n, c, n, m


def per_unit(weight: Tensor, n_dims: int) -> Tensor:
    """A weight [head, unit] as [head, 1, ..., unit], to meet tensors [head, ..., unit] of n_dims axes."""
    return weight.reshape(weight.shape[0], *([1] * (n_dims - 2)), weight.shape[1])
