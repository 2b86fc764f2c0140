"""Parts of `run_with_cache`: which positions to stop at, keeping the cache apart from the caller's tensors, gradients at cached points."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.entries import Kept
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import Group, HookPoint, Item
from workbench.instrument.states import ModelState


def one_of(ours: str, value: Any, theirs: str, other: Any) -> Any:
    """The value of an argument that has two names; refuses both at once."""
    if value is not None and other is not None:
        raise HookError(f"{ours} and {theirs} mean the same. Expected only one of them.")
    return value if value is not None else other


def by_positions(
    points: list[HookPoint], written: tuple[Item, ...] | None, chosen: tuple[int, ...] | slice | None
) -> list[tuple[list[HookPoint], tuple[Item, ...] | None]]:
    """Split into points that hold all positions in one tensor, and per-position points with the positions to stop at."""
    if written is not None or chosen is None:
        return [(points, written)]
    whole = [point for point in points if not point.per_position]
    stopped = [point for point in points if point.per_position]
    parts: list[tuple[list[HookPoint], tuple[Item, ...] | None]] = [(whole, None)] if whole else []
    if stopped and isinstance(chosen, slice):
        if chosen.step not in (None, 1):
            raise HookError("positions: a slice with a step cannot select states; give the positions as a list.")
        everywhere = chosen.start is None and chosen.stop is None
        parts.append((stopped, None if everywhere else ((chosen.start or 0, chosen.stop),)))
    elif stopped and not isinstance(chosen, slice):
        parts.append((stopped, chosen))
    return parts


def check_used(groups: list[Group], heads: Any, positions: Any) -> None:
    """A `heads` or `positions` argument that concerns none of the selected points would silently do nothing."""
    if heads is None and positions is None:
        return
    points = [point for group in groups for point in group.points]
    if heads is not None and not any("head" in point.axes for point in points):
        raise HookError(
            f"heads={heads!r} concerns none of the selected hook points: none has a 'head' axis ({points[0].name!r}: {points[0].axes})."
        )
    if positions is not None and not any(p.per_position or {"pos", "query"} & set(p.axes) for p in points):
        raise HookError(f"positions={positions!r} concerns none of the selected hook points: none has a position axis.")


def over_time(by_position: dict[int, Tensor]) -> Tensor:
    """States at several positions, ascending: [batch, position, ...]."""
    return torch.stack([by_position[position] for position in sorted(by_position)], dim=1)


def part_from(store: dict[str, Tensor], outside: Any) -> None:
    """Copy stored tensors that share memory with what the caller gave or gets, so that writing into those leaves the cache alone."""
    try:
        theirs = {tensor.data_ptr() for tensor in _tensors(outside)}
        ours = list(map(Tensor.data_ptr, store.values()))
    except RuntimeError:  # tensors without memory of their own (tracing, function transforms)
        return
    if not theirs.isdisjoint(ours):
        for address, memory in zip(list(store), ours, strict=True):
            if memory in theirs:
                store[address] = store[address].clone()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, ModelState):
        yield from _tensors(value.layers)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def gradients_at(
    metric: Any,
    captured: list[tuple[str, int | None, HookPoint, Tensor]],
    kept: Kept,
    store: dict[str, Tensor],
    retain_graph: bool,
) -> dict[str, Tensor]:
    """Gradient of the metric at every captured activation; the same part of it as was stored of the activation."""
    if not isinstance(metric, Tensor) or metric.numel() != 1:
        shape = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
        raise HookError(
            f"Gradients need a scalar; got {shape}. Expected gradients_of to return one number (or return_type='loss')."
        )
    if not metric.requires_grad:
        raise HookError("Gradients were asked for, but the metric does not depend on any cached activation.")
    inputs = [own for _, _, _, own in captured]
    found = torch.autograd.grad(metric, inputs, allow_unused=True, retain_graph=retain_graph)
    gradients: dict[str, Tensor] = {}
    trajectories: dict[str, dict[int, Tensor]] = {}
    for (address, position, point, own), gradient in zip(captured, found, strict=True):
        part = kept.of(torch.zeros_like(own) if gradient is None else gradient, point)
        if position is None or address in store:
            gradients[address] = part
        else:
            trajectories.setdefault(address, {})[position] = part
    return gradients | {address: over_time(by_position) for address, by_position in trajectories.items()}
