"""`CellCore`: the hooked form of the nonlinear cells, shared by Elman networks, LSTM, GRU, sLSTM and the cells of ParaRNN.

    slots_t = update(x_t, R h_{t−1}, slots_{t−1})           hook_<slot>[t], after token t is read and written; the first slot is h
    gates of step t                                          hook_<gate>_gate[t]; an edit changes this step and all that follow
    the same of all steps                                    hook_<gate>_gates; reports only, and leaves the run in whole pieces
    |∂h_i / ∂x_j| over the units of a head and all drives    hook_pattern: a Jacobian norm, which reports and cannot be edited

A cell is not linear in anything, so no pattern reproduces its output; the Jacobian around the states that the run went through is what
there is. It is exact, but holds for small changes only. Derivatives of hooked edits themselves are left out of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.nonlinear_cells import Cell, CellRun, cell_gates, jacobian_pattern, local_derivatives, run_cell
from models.context import Context
from models.recurrent.linear_core import refuse_continued
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


def slot_names(slots: tuple[str, ...]) -> tuple[str, ...]:
    """What a cell's slots are called in a model's state: by their own names, or `state` if there is only one."""
    return slots if len(slots) > 1 else ("state",)


class CellCore(nn.Module):
    """Holds the hook points of a cell and runs it; has no parameters. Tensors are [batch, head, pos, drive, unit]."""

    transparent_in_names = True  # its hook points are addressed as the mixer's own: blocks.0.mixer.hook_c

    def __init__(self, slots: tuple[str, ...], gates: tuple[str, ...]) -> None:
        super().__init__()
        self.slot_names, self.gates = slot_names(slots), gates
        meta = PatternMeta(
            rows_sum_to="free",
            exact=False,
            effective=True,
            kind="jacobian",
            label="norm over units of ∂h/∂(input drives)",
        )
        self.hook_pattern = HookPoint("pattern", "batch head query key", editable=False, on_demand=True, meta=meta)
        for name in self.slot_names:
            setattr(self, f"hook_{name}", HookPoint("state", "batch head unit", per_position=True))
        for name in gates:
            setattr(self, f"hook_{name}_gate", HookPoint("gate", "batch head unit", per_position=True))
            everywhere = HookPoint("gates", "batch pos head unit", editable=False, on_demand=True)
            setattr(self, f"hook_{name}_gates", everywhere)

    def forward(
        self,
        cell: Cell,
        inputs: Tensor,
        recurrent: Tensor,
        context: Context,
        carried: dict[str, Tensor] | None,
        recurrent_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[CellRun, dict[str, Tensor]]:
        """Run the cell. Padding neither writes nor lets time pass.

        Args:
            inputs: x, [batch, head, pos, drive, unit]. recurrent: R, [head, drive, unit, unit] or, diagonal, [head, drive, unit].
            carried: the slots of an earlier call, [batch, head, unit] each, by `slot_names`.
            options: further ones of `run_cell`.

        Returns:
            the run, and the slots to carry on.
        """
        offset, length = context.offset, inputs.shape[2]
        points = [getattr(self, f"hook_{name}") for name in self.slot_names]
        stops = sorted({t for point in points if point.active for t in point.stops(offset, length)})
        gates = {name: self.gate_point(name) for name in self.gates}
        gate_stops = {name: point.stops(offset, length) for name, point in gates.items() if point.active}
        reports = {name: point for name in self.gates if (point := self.gates_point(name)).active}
        replaced: dict[str, dict[int, Tensor]] = {}

        def on_state(position: int, state: Tensor) -> Tensor:
            parts = zip(points, state.unbind(-1), strict=True)
            return torch.stack([point.at(offset + position, part) for point, part in parts], -1)

        def on_gate(position: int, name: str, gate: Tensor) -> Tensor:
            gate = gates[name].at(offset + position, gate)
            if reports:
                replaced.setdefault(name, {})[position] = gate
            return gate

        state = None if carried is None else torch.stack([carried[name] for name in self.slot_names], -1)
        run = run_cell(
            cell,
            inputs,
            recurrent,
            recurrent_bias=recurrent_bias,
            initial_state=state,
            mask=context.mask,
            stops=stops or None,
            on_state=on_state if stops else None,
            gate_stops=gate_stops or None,
            on_gate=on_gate if gate_stops else None,
            keep_before=self.hook_pattern.active or bool(reports),
            **options,
        )
        if reports:
            assert run.before is not None
            found = cell_gates(cell, inputs, recurrent, run.before, recurrent_bias=recurrent_bias, replaced=replaced)
            for name, point in reports.items():
                point(found[name].transpose(1, 2))
        if self.hook_pattern.active:
            refuse_continued(self.hook_pattern, context)
            assert run.before is not None
            local = local_derivatives(
                cell, inputs, recurrent, run.before, recurrent_bias=recurrent_bias, mask=context.mask
            )
            self.hook_pattern(jacobian_pattern(local))
        slots = dict(zip(self.slot_names, run.state.unbind(-1), strict=True)) if context.keep_state else {}
        return run, slots

    def gate_point(self, name: str) -> HookPoint:
        """The hook point of one gate."""
        return getattr(self, f"hook_{name}_gate")

    def gates_point(self, name: str) -> HookPoint:
        """The hook point that reports one gate of all steps."""
        return getattr(self, f"hook_{name}_gates")

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals, for the mixer's `signal_points`: {name: (point, label, unit)}."""
        names = {name: name if name == "candidate" else f"{name} gate" for name in self.gates}
        return {
            f"{name}_gate": (self.gates_point(name), f"{words}, mean over units", None) for name, words in names.items()
        }


def cell_record(kind: str, core: Any, n_heads: int, units: int) -> dict[str, Any]:
    """The layer record (run manifest) of any mixer with a number per head and unit as its state, whose pattern no factors determine."""
    return {
        "kind": kind,
        "form": "dense",
        "n_heads": n_heads,
        "n_key_heads": n_heads,
        "n_value_heads": n_heads,
        "scale": None,
        "strict": False,
        "alibi_slopes": None,
        "window": None,
        "pattern": core.hook_pattern.meta.as_dict(),
        "state": {"role": "state", "axes": ["head", "unit"], "shape": [n_heads, units]},
        "signals": [],
    }


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """Each group of channels through its own matrix: x [..., group · in], weight [group, in, out] -> [..., group · out]."""
    groups, width, _ = weight.shape
    return torch.einsum("...gi,gio->...go", x.unflatten(-1, (groups, width)), weight).flatten(-2)
