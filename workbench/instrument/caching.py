"""`run_with_cache`: one call that stores activations, and its parts: which positions to stop at, keeping the cache apart from the caller's
tensors, gradients at cached points."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.attaching import Attaching, HookList
from workbench.instrument.cache import ActivationCache
from workbench.instrument.entries import CacheEntry, GradientCapture, Kept, SelectingCacheEntry
from workbench.instrument.errors import HookError, UnknownHookPoint
from workbench.instrument.hook_points import Group, HookPoint, Item, entered
from workbench.instrument.pieces import joined
from workbench.instrument.selection import Select, SelectedPoints, Selection, as_indices
from workbench.instrument.states import ModelState


class Caching(Attaching):
    """Calls that store activations. The third part of `HookedModel`."""

    def run_with_cache(
        self,
        *args: Any,
        names: Selection | None = None,
        names_filter: Selection | None = None,
        role: str | None = None,
        layers: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        positions: int | slice | Sequence[int] | None = None,
        pos_slice: int | slice | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        hooks: HookList = (),
        gradients_of: Callable[[Any], Tensor] | None = None,
        incl_bwd: bool = False,
        detach: bool = True,
        remove_batch_dim: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """One call that stores activations; selection happens before storing.

        Args:
            names: name, glob, `Select`, predicate or list of these; None for every hook point that costs nothing extra.
            role, layers: keep only hook points of this role / these layers.
            heads, positions: keep only this part of the head axis / of the position (query) axis. For states, the positions to read at.
            dtype, device: convert floating activations / move them when storing.
            hooks: attach these as well; the cache holds what the model went on with after them.
            gradients_of: function of the output giving a scalar; its gradient at every cached point is in `cache.gradients`.
            incl_bwd: short for `gradients_of` the output itself (use with return_type="loss").
            detach: store without the autograd graph.
            strict: with True, a selection of which the run reaches nothing is an error.
            names_filter, pos_slice: TransformerLens's words for names and positions.

        Returns:
            The call's output and an `ActivationCache`.
        """
        names = one_of("names", names, "names_filter", names_filter)
        positions = one_of("positions", positions, "pos_slice", pos_slice)
        chosen = positions if positions is None or isinstance(positions, slice) else as_indices(positions, "positions")
        kept = Kept(None if heads is None else as_indices(heads, "heads"), chosen, dtype, device)
        backward = gradients_of is not None or incl_bwd
        store: dict[str, Tensor] = {}
        trajectories: dict[str, dict[int, Tensor]] = {}
        captured: list[tuple[str, int | None, HookPoint, Tensor]] = []
        groups: list[Group] = []
        for description, selected in self._cache_selection(names, role, layers):
            first = selected[0]
            for part, where in by_positions(selected.points, first.positions, chosen):
                if backward:
                    capture = GradientCapture(captured, first.suffix, step=first.step, positions=where)
                    groups.append(Group(description, capture, part))
                if kept.everything and selected.whole:
                    entry = CacheEntry(store, detach)
                else:
                    entry = SelectingCacheEntry(store, detach, trajectories, kept, first.suffix, first.step, where)
                groups.append(Group(description, entry, part))
        check_used(groups, heads, positions)
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad() if backward else nullcontext():
            with entered([*self._groups(hooks), *groups], strict):
                output = self(*args, **kwargs)
            if backward:  # outside the scope: a metric may run models of its own
                metric = gradients_of(output) if gradients_of is not None else output
                gradients = gradients_at(metric, captured, kept, store, retain_graph=not detach)
        for address, by_position in trajectories.items():
            store[address] = over_time(by_position)
        part_from(store, (args, kwargs, output))
        cache = ActivationCache(store, self.hook_points.points, self.n_layers, gradients, self.hook_points.aliases)
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def _cache_selection(
        self, names: Selection | None, role: str | None, layers: int | Sequence[int] | None
    ) -> list[tuple[str, SelectedPoints]]:
        if names is None and role is None and layers is None:
            return [("every hook point", self.hook_points.default())]
        groups = self.hook_points.resolve(names if names is not None else Select(role=role, layer=layers))
        if names is None or (role is None and layers is None):
            return groups
        keep = {s.point.name for s in self.hook_points.resolve(Select(role=role, layer=layers))[0][1]}
        filtered = [
            (description, SelectedPoints(s for s in selected if s.point.name in keep))
            for description, selected in groups
        ]
        for description, selected in filtered:
            if not selected:
                raise UnknownHookPoint(
                    f"{description} and {Select(role=role, layer=layers)} have no hook point in common."
                )
        return filtered


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
    pieces: dict[str, tuple[HookPoint, list[Tensor]]] = {}
    for (address, position, point, own), gradient in zip(captured, found, strict=True):
        whole = torch.zeros_like(own) if gradient is None else gradient
        if position is None:
            pieces.setdefault(address, (point, []))[1].append(whole)
        elif address in store:
            gradients[address] = kept.of(whole, point)
        else:
            trajectories.setdefault(address, {})[position] = kept.of(whole, point)
    gradients |= {address: kept.of(joined(point, parts, 0.0), point) for address, (point, parts) in pieces.items()}
    return gradients | {address: over_time(by_position) for address, by_position in trajectories.items()}
