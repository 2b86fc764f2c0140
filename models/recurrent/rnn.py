"""The classic recurrent networks in heads: each head has recurrent weights of its own (FlashRNN, Pöppel et al. 2024, arXiv 2412.07752).

    x_t = W u_t + b        drives of every unit from the whole input        hook_input
    slots_t = update(x_t, R h_{t−1} + b_R, slots_{t−1})                      R block-diagonal: [head, drive, unit, unit]
    out = W_O h                                                              hook_z is h, before W_O

One head is the textbook network. `lstm.py`, `gru.py` and `elman.py` say which cell; this file is what they share.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.nonlinear_cells import Cell
from models.context import Context
from models.recurrent.cells import CellCore, cell_record, slot_names
from workbench.instrument.hook_points import HookPoint


class HeadwiseRNN(nn.Module):
    """The mixer of one layer. [batch, pos, d_model] -> same. Subclasses say their `kind` and give `cell`."""

    kind: str
    cell: Cell

    def __init__(self, cell: Cell, n_heads: int, d_hidden: int | None, d_model: int) -> None:
        super().__init__()
        width = d_hidden or d_model
        if width % n_heads:
            raise ValueError(f"The {width} units of {self.kind} must be a multiple of n_heads ({n_heads}).")
        self.cell, self.n_heads, self.d_head = cell, n_heads, width // n_heads
        drives = len(cell.drives)
        self.input = nn.Linear(d_model, n_heads * drives * self.d_head)
        self.recurrent = nn.Parameter(torch.empty(n_heads, drives, self.d_head, self.d_head))
        self.recurrent_bias = nn.Parameter(torch.zeros(n_heads, drives, self.d_head))
        self.output = nn.Linear(width, d_model, bias=False)
        self.recurrent._own_init = True  # type: ignore[attr-defined]
        self.core = CellCore(cell.slots, cell.gates)
        self.hook_input = HookPoint("drive", "batch pos head drive d_head")
        self.hook_z = HookPoint("z", "batch pos head d_head")

    @property
    def slots(self) -> tuple[str, ...]:
        """What it carries from call to call."""
        return slot_names(self.cell.slots)

    def initialise_own(self) -> None:
        """Recurrent weights and biases uniform within ± 1/√units of a head, as torch's modules; forget gates begin open (bias 1)."""
        bound = self.d_head**-0.5
        with torch.no_grad():
            self.recurrent.uniform_(-bound, bound)
            self.recurrent_bias.uniform_(-bound, bound)
            if "forget" in self.cell.drives:
                self.recurrent_bias[:, self.cell.drives.index("forget")] = 1.0

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries the cell's slots, [batch, head, d_head] each."""
        x = self.hook_input(self.input(u).unflatten(-1, (self.n_heads, len(self.cell.drives), self.d_head)))
        run, slots = self.core(
            self.cell, x.transpose(1, 2), self.recurrent, context, carried, recurrent_bias=self.recurrent_bias
        )
        return self.output(self.hook_z(run.output.transpose(1, 2)).flatten(-2)), slots

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """None: nothing short determines what a nonlinear cell does."""
        return {}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: the gates."""
        return self.core.signals

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return cell_record(self.kind, self.core, self.n_heads, self.d_head)

    def load_torch(self, module: nn.RNNBase) -> None:
        """Take the weights of a one-layer torch.nn.LSTM, GRU or RNN (its gates are put in the cell's order). Needs one head.

        Raises:
            ValueError: more than one head, or sizes that do not fit.
        """
        if self.n_heads != 1:
            raise ValueError(f"torch's recurrent modules have one head; this one has {self.n_heads}.")
        weights: dict[str, Tensor] = dict(module.named_parameters())
        if weights["weight_ih_l0"].shape != self.input.weight.shape or module.num_layers != 1 or module.bidirectional:
            raise ValueError(
                f"Expected one layer, one direction and weight_ih {tuple(self.input.weight.shape)}; got {module} with "
                f"{tuple(weights['weight_ih_l0'].shape)}."
            )
        order = TORCH_ORDER.get(type(module), ("candidate",))
        if set(order) != set(self.cell.drives):
            raise ValueError(f"Expected torch's counterpart of {self.kind}, got {type(module).__name__}.")
        take = torch.tensor([order.index(drive) for drive in self.cell.drives])
        rows = (torch.arange(self.d_head) + take[:, None] * self.d_head).flatten()
        sizes = (len(take), self.d_head)
        with torch.no_grad():
            self.input.weight.copy_(weights["weight_ih_l0"][rows])
            self.input.bias.copy_(weights["bias_ih_l0"][rows])
            self.recurrent.copy_(weights["weight_hh_l0"][rows].unflatten(0, sizes).transpose(1, 2)[None])
            self.recurrent_bias.copy_(weights["bias_hh_l0"][rows].unflatten(0, sizes)[None])


TORCH_ORDER: dict[type, tuple[str, ...]] = {
    nn.LSTM: ("input", "forget", "candidate", "output"),
    nn.GRU: ("reset", "update", "candidate"),
}
