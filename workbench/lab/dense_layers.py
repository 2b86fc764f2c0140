"""What a trace run keeps of a layer that no factors determine: its pattern and its states as they were, as far as they fit.

Such a layer is one whose mixer says `form = "dense"` (it is not linear in its values, or its pattern has no short factors), or one whose
pattern or state an intervention overwrote. Its pattern is kept whole, or, of a longer text, pooled and at some rows; its states are kept
after some tokens. What is left out is written down in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.instrument.hook_points import HookPoint

STORED_ROWS = 64  # rows of a pattern that are kept when the whole of it is not
HEAD_AXES = ("head", "kv_head", "group")


def last_step(point: HookPoint) -> str:
    """The point's address in the pass that a run stores: the last, where depth shares weights."""
    return point.name if point.steps == 1 else f"{point.name}@{point.steps - 1}"


@dataclass(frozen=True)
class StateSlot:
    """One thing that a layer carries from token to token, and the tokens after which it is kept."""

    point: HookPoint
    positions: tuple[int, ...]

    @property
    def name(self) -> str:
        """`state` for the point `….hook_state`."""
        return self.point.name.rsplit(".", 1)[-1].removeprefix("hook_")

    @property
    def address(self) -> str:
        """What to cache."""
        return f"{last_step(self.point)}[{','.join(map(str, self.positions))}]"

    def read(self, cache: Any) -> Tensor:
        """Of the run's one sequence: [head or 1, stored, ...]; heads come first, a state without heads has one."""
        states = cache[self.address][0]
        axes = list(self.point.axes[1:])
        if states.dim() == len(axes):  # a single position is cached without its axis
            states = states[None]
        head = next((axis for axis in HEAD_AXES if axis in axes), None)
        return states[None] if head is None else states.movedim(1 + axes.index(head), 0)

    def axes(self) -> list[str]:
        """Names of what `read` returns, without the positions."""
        axes = list(self.point.axes[1:])
        head = next((axis for axis in HEAD_AXES if axis in axes), None)
        return [head or "head", *(axis for axis in axes if axis != head)]


def plan_slots(model: Any, tokens: Tensor, points: Sequence[HookPoint], length: int, budget: int) -> list[StateSlot]:
    """Where to keep the states of a layer: after the last token and others, evenly spaced, so that all slots fit `budget` numbers.

    How large a slot is, a run of one token tells.
    """
    if not points:
        return []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:, :1], names=[f"{last_step(point)}[0]" for point in points])
    numbers = sum(cache[f"{last_step(point)}[0]"].numel() for point in points)
    positions = spread(length, max(1, budget // max(1, numbers)))
    return [StateSlot(point, positions) for point in points]


def spread(length: int, count: int) -> tuple[int, ...]:
    """At most `count` positions of `length`, evenly spaced from the last one back, ascending."""
    return tuple(np.unique(np.linspace(length - 1, 0, min(length, count)).round().astype(int)).tolist())


def add_states(record: dict[str, Any], arrays: dict[str, np.ndarray], slots: Sequence[StateSlot], cache: Any) -> None:
    """Put the kept states among the layer's arrays: the first slot as `states`, others as `states.<name>`; all in `record["states"]`."""
    described = []
    for number, slot in enumerate(slots):
        states = slot.read(cache).float().cpu().numpy()
        shape = [states.shape[0], *states.shape[2:]]
        name = "states" if number == 0 else f"states.{slot.name}"
        described.append(
            {"name": slot.name, "array": f"layer.{record['layer']}.{name}", "axes": slot.axes(), "shape": shape}
        )
        if states.ndim > 4:  # [head, stored, …]: further axes join the rows, the last stays
            states = states.reshape(*states.shape[:2], -1, states.shape[-1])
        arrays[name] = states
        arrays["state_positions"] = np.array(slot.positions, dtype=np.int32)
    if described:
        first = described[0]
        record["state"] = {"role": "state", "axes": first["axes"], "shape": first["shape"]}
        record["states"] = described


def not_stored(
    record: dict[str, Any], kept: str, rows: int, length: int, slots: Sequence[StateSlot], columns: int
) -> list[str]:
    """What a run leaves out of this layer, sentence by sentence. `kept` of its pattern: `"whole"`, `"rows"`, `"none"` or `"absent"`."""
    cells = f"{record['n_heads']} × {length} × {columns}"
    words = {
        "whole": [],
        "rows": [f"The pattern is stored pooled, and exactly at {rows} of its {length} rows."],
        "none": [f"The pattern of {cells} cells is too large to compute whole: none of it is stored."],
        "absent": ["This mixer forms no pattern."],
    }[kept]
    if slots and len(slots[0].positions) < length:
        words.append(f"States are stored after {len(slots[0].positions)} of {length} tokens.")
    return words
