"""Chosen entries of a state after every token, for `HookedModel.trace_state`.

Where a layer's state is a decayed sum of what was written, S_t = diag(decay_t) S_{t-1} + write_t k_t v_t^T, an entry over time is a
decayed sum of products of two numbers per token, and no state is built. What a delta rule writes are its pseudo-values, which the run
itself has found. Any other state is read token by token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint


def written_points(
    form: str, factor_points: Mapping[str, HookPoint], pseudo_value: HookPoint | None
) -> dict[str, HookPoint]:
    """{factor: point} of what a layer of this form writes and how it decays; empty for states that these do not determine."""
    points = {name: point for name, point in factor_points.items() if name != "query"}
    if form == "delta":
        del points["write"]  # it is in the pseudo-values
        return {} if pseudo_value is None else {**points, "value": pseudo_value}
    return points if form == "gated_linear" else {}


def sum_entries(
    factors: Mapping[str, Tensor], entries: Sequence[tuple[int, ...]], mask: Tensor | None, layer: int
) -> Tensor:
    """Entries [batch, pos, entry] as decayed sums of what was written at the tokens that are not padding."""
    from kernels.gated_linear_attention import trace_entries

    value, decay = factors["value"], factors.get("log_decay")
    key = factors["key"].to(value.dtype)
    for entry in entries:
        check_entry(entry, ("head", "state_k", "state_v"), (key.shape[1], key.shape[3], value.shape[3]), layer)
    if mask is not None:  # padding writes nothing and lets no time pass
        real = mask[:, None, :].to(key)
        key = key * real.unsqueeze(-1)
        if decay is not None:
            each = decay[None, :, None] if decay.dim() == 1 else decay
            decay = each * (real.unsqueeze(-1) if each.dim() == 4 else real)
    return trace_entries(key, value, list(entries), log_decay=decay, write=factors.get("write"))


def entry_reader(
    point: HookPoint, entries: Sequence[tuple[int, ...]], layer: int
) -> tuple[list[Tensor], tuple[str, Callable[[Tensor, Any], None]]]:
    """(entries read [batch, entry], one per token; the hook that reads them in the layer's last pass)."""
    read: list[Tensor] = []

    def keep(state: Tensor, hook: Any) -> None:
        for entry in entries:
            check_entry(entry, point.axes[1:], state.shape[1:], layer)
        columns = [torch.tensor([entry[axis] for entry in entries]) for axis in range(state.dim() - 1)]
        chosen: tuple[Any, ...] = (slice(None), *columns)
        read.append(state[chosen])

    last = "" if point.steps == 1 else f"@{point.steps - 1}"
    return read, (f"{point.name}{last}[*]", keep)


def check_entry(entry: Sequence[int], axes: Sequence[str], sizes: Sequence[int], layer: int) -> None:
    """Raise `HookError` unless `entry` is one index into each of the axes."""
    if len(entry) != len(sizes) or not all(0 <= i < size for i, size in zip(entry, sizes, strict=True)):
        raise HookError(f"State entry {tuple(entry)} is outside ({', '.join(axes)}) = {tuple(sizes)} of layer {layer}.")
