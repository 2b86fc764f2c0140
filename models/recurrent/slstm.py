"""The sLSTM block of xLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 8-17, and the published code): exponential gates and feedback.

    c = SiLU(conv(x));   drives of i, f from c, of z, o from x, block-diagonal over heads                       hook_input
    i = exp(ĩ), f = σ(f̃);   c_t = f c_{t−1} + i tanh(z̃),  n_t = f n_{t−1} + i,  h_t = σ(õ) c_t / n_t           hook_{h,c,n,m}[t]
    out = LayerNorm_head(h)

Every drive also gets R h_{t−1}, which only a loop can compute: this is what lets it track states that no linear memory can. The stabiliser
m scales c and n and leaves h alone. The block's MLP is the layer's channel mixer.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.nonlinear_cells import SLSTM as SLSTMCell
from models.context import Context
from models.mixers import register_mixer
from models.parts.short_convolution import causal_convolution
from models.recurrent.cells import CellCore, cell_record
from models.recurrent.mlstm import HeadNorm
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class SLSTMConfig:
    """Args:
    n_heads. d_conv: taps of the convolution before the input and forget gates. recurrent_bound: R begins uniform within ± this (0 as
    published). forget_power: biases of the forget gates begin at 5 − 12 r^power, r from 0 to 1 over a head's units; the published
    exponent grows with depth from 0.3 to 1.6, here it is one number per configuration.
    """

    n_heads: int = 4
    d_conv: int = 4
    recurrent_bound: float = 0.0
    forget_power: float = 0.3
    norm_eps: float = 1e-5
    kind: str = "slstm"


@register_mixer(SLSTMConfig)
class SLSTM(nn.Module):
    """See the module docstring. [batch, pos, d_model] -> same."""

    slots = (*SLSTMCell.slots, "conv")

    def __init__(self, config: SLSTMConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of n_heads ({config.n_heads}).")
        self.config, self.n_heads, self.d_head = config, config.n_heads, d_model // config.n_heads
        drives = len(SLSTMCell.drives)
        self.conv = nn.Parameter(torch.empty(d_model, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(d_model))
        self.W = nn.Parameter(torch.empty(drives, config.n_heads, self.d_head, self.d_head))  # drive, head, in, out
        self.R = nn.Parameter(torch.empty(config.n_heads, drives, self.d_head, self.d_head))  # head, drive, in, out
        self.b = nn.Parameter(torch.zeros(config.n_heads, drives, self.d_head))
        for parameter in (self.conv, self.W, self.R, self.b):
            parameter._own_init = True  # type: ignore[attr-defined]
        self.core = CellCore(SLSTMCell.slots, SLSTMCell.gates)
        self.norm = HeadNorm(config.n_heads, self.d_head, config.norm_eps)
        self.hook_conv = HookPoint("conv", "batch pos channel")
        self.hook_input = HookPoint("drive", "batch pos head drive d_head")
        self.hook_z = HookPoint("z", "batch pos head d_head")

    def initialise_own(self) -> None:
        """See `SLSTMConfig`; W is N(0, 2 / (5 d_model))."""
        config, bound = self.config, self.config.d_conv**-0.5
        with torch.no_grad():
            self.conv.uniform_(-bound, bound)
            self.W.normal_(std=(2 / (5 * self.n_heads * self.d_head)) ** 0.5)
            self.R.uniform_(-config.recurrent_bound, config.recurrent_bound)
            self.b.zero_()
            ramp = torch.linspace(0, 1, self.d_head) ** config.forget_power
            self.b[:, SLSTMCell.drives.index("forget")] = 5 - 12 * ramp

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries h, c, n, m [batch, head, d_head] and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        window = None if carried is None else carried["conv"]
        c, window = causal_convolution(x, self.conv, self.conv_bias, context, window)
        c = self.hook_conv(F.silu(c))
        sources = [c if drive in ("input", "forget") else x for drive in SLSTMCell.drives]
        stacked = torch.stack([part.unflatten(-1, (self.n_heads, self.d_head)) for part in sources], -2)
        drives = self.hook_input(torch.einsum("bphgi,ghio->bphgo", stacked, self.W) + self.b)
        run, slots = self.core(SLSTMCell(), drives.transpose(1, 2), self.R, context, carried)
        out = self.norm(self.hook_z(run.output.transpose(1, 2)))
        return out, {**slots, "conv": window} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """None: nothing short determines what a nonlinear cell does."""
        return {}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: the gates, those of input and forgetting after stabilising."""
        return self.core.signals

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return cell_record("slstm", self.core, self.n_heads, self.d_head)
