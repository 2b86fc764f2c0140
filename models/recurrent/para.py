"""ParaRNN (Danieli et al. 2025, arXiv 2510.21450): nonlinear cells without mixing of units over time, solved for all tokens at once.

    x, z = W_in u;   x = SiLU(conv(x));   drives = B x + b                     B block-diagonal over heads       hook_input
    ParaGRU    z, r = σ(x + a h),  n = tanh(x + r a h),  h_t = (1 − z) h + z n                                   hook_state[t]
    ParaLSTM   f = σ(x + a h + p_f c),  c_t = f c + (1 − f) tanh(x + a h),  h_t = σ(x + a h + p_o c_t) tanh c_t  hook_h[t], hook_c[t]
    out = W_out( RMSNorm(h) ⊙ SiLU(z) )

Because the recurrent weights a are one number per unit, Newton's method finds all h_t by a few linear scans; `hook_residual` says how
far each token's state then is from what the cell makes of the one before. With `iterations=None` that is rounding, and every mode gives
the same logits. A fixed number (the paper takes 3) leaves what it leaves; a watched state or gate cuts the text, and the pieces are closer.

The pattern is the norm of a Jacobian. Since units do not mix, each unit also has an exact signed one: `unit_patterns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.nonlinear_cells import Cell, local_derivatives, run_cell, unit_jacobian
from kernels.nonlinear_cells import ParaGRU as ParaGRUCell
from kernels.nonlinear_cells import ParaLSTM as ParaLSTMCell
from models.context import Context
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.parts.short_convolution import causal_convolution
from models.recurrent.cells import CellCore, cell_record, slot_names
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel

CELLS: dict[str, type[Cell]] = {"gru": ParaGRUCell, "lstm": ParaLSTMCell}


@dataclass(frozen=True)
class ParaRNNConfig:
    """Args:
    cell: `"gru"` or `"lstm"`. n_heads: blocks of B. expand: units over d_model. d_conv: taps of the causal convolution.
    iterations: of Newton's method; None: until the residual is rounding. chunk_size: tokens solved at once (None: all).
    slowness: the biases of the gate that keeps the state begin evenly spaced in this range (3 … 6: 95 … 99.8 % kept per token).
    """

    cell: str = "gru"
    n_heads: int = 4
    expand: int = 1
    d_conv: int = 4
    iterations: int | None = None
    chunk_size: int | None = 1024
    slowness: tuple[float, float] = (3.0, 6.0)
    norm_eps: float = 1e-6
    kind: str = "pararnn"


class ParaCore(CellCore):
    """`CellCore` with Newton's method. `mode`: `"parallel"` (all tokens at once), `"chunked"` (`chunk_size` at once) or `"recurrent"`."""

    def __init__(self, slots: tuple[str, ...], gates: tuple[str, ...], iterations: int | None, chunk_size: int | None):
        super().__init__(slots, gates)
        self.mode, self.iterations, self.chunk_size = "chunked", iterations, chunk_size
        self.hook_residual = HookPoint("residual", "batch pos head", editable=False, on_demand=True)

    def options(self) -> dict[str, Any]:
        """How `run_cell` is to run."""
        if self.mode == "recurrent":
            return {"mode": "recurrent"}
        size = self.chunk_size if self.mode == "chunked" else None
        return {"mode": "newton", "iterations": self.iterations, "chunk_size": size}


@register_mixer(ParaRNNConfig)
class ParaRNN(nn.Module):
    """The ParaRNN mixer of one layer. [batch, pos, d_model] -> same."""

    def __init__(self, config: ParaRNNConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.cell not in CELLS:
            raise ValueError(
                f"Unknown cell {config.cell!r}.{suggestion(config.cell, CELLS)} Known: {', '.join(CELLS)}."
            )
        width = config.expand * d_model
        if width % config.n_heads:
            raise ValueError(f"The {width} units (expand·d_model) must be a multiple of n_heads ({config.n_heads}).")
        kind = CELLS[config.cell]
        self.config, self.n_heads, self.d_head, self.drives = (
            config,
            config.n_heads,
            width // config.n_heads,
            kind.drives,
        )
        per_unit = (config.n_heads, len(kind.drives), self.d_head)
        self.input = nn.Linear(d_model, 2 * width, bias=False)
        self.conv = nn.Parameter(torch.empty(width, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.B = nn.Parameter(torch.empty(config.n_heads, self.d_head, len(kind.drives), self.d_head))
        self.b = nn.Parameter(torch.zeros(per_unit))
        self.a = nn.Parameter(torch.empty(per_unit))
        self.peephole = nn.Parameter(torch.empty(2, config.n_heads, self.d_head)) if config.cell == "lstm" else None
        self.output = nn.Linear(width, d_model, bias=False)
        for parameter in (self.conv, self.B, self.b, self.a, self.peephole):
            if parameter is not None:
                parameter._own_init = True  # type: ignore[attr-defined]
        self.core = ParaCore(kind.slots, kind.gates, config.iterations, config.chunk_size)
        self.norm = Norm("rms", width, config.norm_eps, axes="batch pos channel")
        self.slots = (*slot_names(kind.slots), "conv")
        self.hook_conv = HookPoint("conv", "batch pos channel")
        self.hook_input = HookPoint("drive", "batch pos head drive d_head")
        self.hook_z = HookPoint("z", "batch pos head d_head")
        self.hook_gate = HookPoint("gate", "batch pos channel")

    def initialise_own(self) -> None:
        """Convolution and B as torch's linear layers; a and peepholes within ± 1/√units; slow gates."""
        bound, wide = self.d_head**-0.5, self.config.d_conv**-0.5
        with torch.no_grad():
            self.conv.uniform_(-wide, wide)
            for parameter in (self.B, self.a, self.peephole):
                if parameter is not None:
                    parameter.uniform_(-bound, bound)
            slow = "forget" if "forget" in self.drives else "update"
            steps = torch.linspace(*self.config.slowness, self.d_head)
            self.b.zero_()
            self.b[:, self.drives.index(slow)] = steps if slow == "forget" else -steps

    def cell(self) -> Cell:
        """The cell with its weights as they are now."""
        return ParaGRUCell() if self.peephole is None else ParaLSTMCell(self.peephole)

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries the slots [batch, head, d_head] and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        x, z = self.input(u).chunk(2, dim=-1)
        window = None if carried is None else carried["conv"]
        x, window = causal_convolution(x, self.conv, self.conv_bias, context, window)
        x = self.hook_conv(F.silu(x)).unflatten(-1, (self.n_heads, self.d_head))
        drives = self.hook_input(torch.einsum("bphi,higo->bphgo", x, self.B) + self.b)
        watched = self.core.hook_residual.active
        run, slots = self.core(
            self.cell(), drives.transpose(1, 2), self.a, context, carried, keep_residual=watched, **self.core.options()
        )
        if watched:
            self.core.hook_residual(run.residual.transpose(1, 2))
        h = self.norm(self.hook_z(run.output.transpose(1, 2)).flatten(-2))
        return self.output(h * self.hook_gate(F.silu(z))), {**slots, "conv": window} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """None: nothing short determines what a nonlinear cell does."""
        return {}

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals: {name: (point, label, unit)}."""
        return {
            **self.core.signals,
            "gate_mean": (self.hook_gate, "mean gate of the block, SiLU(z)", None),
            "residual": (self.core.hook_residual, "Newton residual", None),
        }

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return cell_record(f"para{self.config.cell}", self.core, self.n_heads, self.d_head)


def unit_patterns(
    model: HookedModel,
    tokens: Any,
    layer: int,
    drive: str,
    units: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    **kwargs: Any,
) -> Tensor:
    """∂h_i / ∂x_j of single units of a ParaRNN layer, signed and exact, [batch, head, unit, query, key].

    Args:
        tokens: [batch, pos], or text. drive: which of the unit's drives is moved, e.g. `"candidate"`. units, queries: those wanted
            (None: all). Further arguments as for `run_with_cache`; hooks that edit a state or gate are not seen here.

    Raises:
        ValueError: the layer is no ParaRNN layer, or a drive, unit or query does not exist.
    """
    mixer = model.mixers[range(model.n_layers)[layer]]
    if not isinstance(mixer, ParaRNN):
        raise ValueError(
            f"Layer {layer} is {type(mixer).__name__}; single units can be taken apart in ParaRNN layers only."
        )
    if drive not in mixer.drives:
        raise ValueError(
            f"No drive {drive!r}.{suggestion(drive, mixer.drives)} This cell has: {', '.join(mixer.drives)}."
        )
    _, cache = model.run_with_cache(tokens, names=mixer.hook_input.name, **kwargs)
    inputs = cache[mixer.hook_input.name].transpose(1, 2)
    with torch.no_grad():
        run = run_cell(mixer.cell(), inputs, mixer.a, keep_before=True, mask=kwargs.get("mask"))
        assert run.before is not None
        local = local_derivatives(mixer.cell(), inputs, mixer.a, run.before, mask=kwargs.get("mask"))
        return unit_jacobian(local, mixer.drives.index(drive), units, queries)
