"""`HookedModel`: running a model while reading and editing it.

A model is a `HookedModel` if its modules own `HookPoint`s and it calls `name_hook_points()` at the end of its constructor. Then it has

    model.run_with_cache(tokens, names=..., layers=..., heads=..., positions=...)   ->  (output, ActivationCache)
    model.run_with_hooks(tokens, hooks=[(name, function), Ablate(...)])             ->  output
    with model.hooks([...]): ...                                                    nested, for any number of calls
    handle = model.add_hook(name, function)                                         until handle.remove()
    model.states(tokens, positions)  model.trace_state(tokens, layer, entries)  model.patterns(tokens)
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workbench.instrument.cache import ActivationCache
from workbench.instrument.caching import by_positions, check_used, gradients_at, one_of, over_time, part_from
from workbench.instrument.entries import (
    CacheEntry,
    FunctionEntry,
    GradientCapture,
    GradientEntry,
    InterventionEntry,
    Kept,
    SelectingCacheEntry,
)
from workbench.instrument.errors import HookError, HookSignatureError, ReadOnlyHookPoint, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import Group, HookPoint, attach_permanently, detach_permanently, entered
from workbench.instrument.html import table
from workbench.instrument.interventions import EditState, Intervention
from workbench.instrument.patterns import Pattern
from workbench.instrument.selection import HookPoints, Select, SelectedPoints, Selection, as_indices
from workbench.instrument.state_traces import entry_reader, sum_entries, written_points
from workbench.instrument.states import StateReading, absolute_positions

HookList = Sequence[Any] | Intervention


class Mixer(Protocol):
    """What a layer's sequence mixer tells about itself, so that patterns and states are read the same way everywhere.

    `factor_points` are the hook points whose tensors determine the pattern and the state: `query`, `key`, `value` and, where they exist,
    `log_decay` and `write`. `constant_factors()` gives those that do not depend on the input, e.g. RetNet's decays [head].
    A mixer whose pattern and state no factors determine says `form = "dense"` and may have none; runs then keep what its `hook_pattern`
    and its hook points of role `state` give. Any mixer may name per-token signals in `signal_points`: {name: (point, label, unit)}.
    `slots` names what the mixer carries from call to call (the slots of `ModelState`).
    """

    factor_points: dict[str, HookPoint]
    slots: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest (docs/architecture.md, section 4)."""
        ...

    def constant_factors(self) -> dict[str, Tensor]:
        """Factors that are the same for every input."""
        ...


class HookHandle:
    """Takes a permanent hook off again."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def remove(self) -> None:
        """Detach; harmless if already detached."""
        for group in self._groups:
            detach_permanently(group.points, group.entry)


class HookedModel(nn.Module):
    """Base of every model here. See the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.switches: dict[str, bool] = {}
        self.hook_points: HookPoints = HookPoints({}, 0, self.switches)

    @property
    def n_layers(self) -> int:
        """Number of layers (blocks)."""
        raise TypeError(f"{type(self).__name__} does not say how many layers it has")

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixer of each layer."""
        raise TypeError(f"{type(self).__name__} does not list its sequence mixers")

    # ------------------------------------------------------------------ names

    def hook_aliases(self) -> dict[str, str]:
        """Other names for hook points (a paper's, another tool's), to their name here."""
        return {}

    def name_hook_points(self) -> None:
        """Give every hook point its name from the module tree and index them. Call once, at the end of the constructor."""
        points: dict[str, HookPoint] = {}
        seen: set[int] = set()
        modules = dict(self.named_modules())
        for path, module in modules.items():
            parts = path.split(".")
            shown = [
                part
                for i, part in enumerate(parts)
                if not getattr(modules[".".join(parts[: i + 1])], "transparent_in_names", False)
            ]
            module_name = ".".join(shown)
            for attribute, value in vars(module).items():
                if isinstance(value, HookPoint):
                    name = f"{module_name}.{attribute}" if module_name else attribute
                    if name in points or value.uid in seen:
                        raise HookError(
                            f"The hook point {name!r} of {type(module).__name__} is there twice. Expected one name for each."
                        )
                    value.name = name
                    layer = re.match(r"blocks\.(\d+)\.", name)
                    value.layer_index = int(layer[1]) if layer else None
                    points[name] = value
                    seen.add(value.uid)
                elif isinstance(value, (list, tuple, dict)) and any(
                    isinstance(item, HookPoint) for item in (value.values() if isinstance(value, dict) else value)
                ):
                    raise HookError(
                        f"{type(module).__name__}.{attribute} holds hook points, which get no name there. Expected each as an attribute."
                    )
        self.hook_points = HookPoints(points, self.n_layers, self.switches, self.hook_aliases())

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name."""
        return dict(self.hook_points.points)

    def _repr_html_(self) -> str:
        """Hook points by role: how many, what axes, and one name to begin with."""
        rows = []
        for role in self.hook_points.roles:
            points = [point for point in self.hook_points.points.values() if point.role == role]
            rows.append((role, len(points), " ".join(points[0].axes), points[0].name))
        summary = repr(self) if type(self).__repr__ is not nn.Module.__repr__ else type(self).__name__
        return table(summary, ("role", "hook points", "axes", "first"), rows)

    def set_switch(self, name: str, on: bool) -> None:
        """Turn an optional group of hook points on or off; raises `UnknownHookPoint` with the nearest switch."""
        if name not in self.switches:
            raise UnknownHookPoint(
                f"This model has no switch {name!r}.{suggestion(name, self.switches)} It has: {', '.join(self.switches)}."
            )
        self.switches[name] = bool(on)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Include `attn.hook_result` (each head's contribution to the residual stream) in "cache everything"."""
        self.set_switch("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Give queries, keys and values their own copies of the block input, per head: `hook_{q,k,v}_input`."""
        self.set_switch("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give each head its own copy of the block input: `hook_attn_in`."""
        self.set_switch("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Include `hook_mlp_in` in "cache everything"."""
        self.set_switch("use_hook_mlp_in", use_hook_mlp_in)

    # --------------------------------------------------------------- attaching

    def _groups(self, hooks: HookList, backward: bool = False) -> list[Group]:
        """Turn what a user wrote into entries at hook points; every mistake is found here, before anything runs."""
        items = [hooks] if isinstance(hooks, Intervention) else list(hooks)
        groups: list[Group] = []
        for item in items:
            if isinstance(item, Intervention):
                if backward:
                    raise HookError(
                        f"{type(item).__name__} changes activations; backward hooks take (name, function) pairs."
                    )
                groups.extend(self._intervention_groups(item))
                continue
            if not (isinstance(item, (tuple, list)) and len(item) == 2):
                raise HookSignatureError(
                    f"Cannot attach {item!r}. Expected an intervention or a pair (hook point, function), e.g. "
                    "('blocks.0.attn.hook_z', lambda z, hook: 0 * z)."
                )
            selection, function = item
            if isinstance(function, Intervention):
                groups.extend(self._intervention_groups(function, selection))
                continue
            kind = GradientEntry if backward else FunctionEntry
            for description, selected in self.hook_points.resolve(selection):
                first = selected[0]
                entry = kind(function, description, step=first.step, positions=first.positions)
                groups.append(Group(description, entry, selected.points))
        return groups

    def _intervention_groups(self, intervention: Intervention, selection: Selection | None = None) -> list[Group]:
        selection = intervention.targets(self.hook_points) if selection is None else selection
        groups = []
        for description, selected in self.hook_points.resolve(selection):
            for s in selected:
                self._check_editable(s.point, type(intervention).__name__)
                intervention.check(s.point)
            step, positions = selected[0].step, selected[0].positions
            if isinstance(intervention, EditState) and intervention.after_positions is not None:
                if positions is not None:
                    raise HookError(
                        f"EditState has both after={intervention.after} and the positions of {description}. Expected one."
                    )
                positions = intervention.after_positions
            part = "".join(f", {axis} {list(i)}" for axis, i in intervention.bounds.items())
            entry = InterventionEntry(intervention, step=step, positions=positions)
            groups.append(Group(f"{description}{part}", entry, selected.points))
        return groups

    def _check_editable(self, point: HookPoint, what: str) -> None:
        if not point.editable:
            others = [
                p.name for p in self.hook_points.points.values() if p.editable and p.layer_index == point.layer_index
            ]
            raise ReadOnlyHookPoint(
                f"{what} cannot edit {point.name!r}: it only reports.{suggestion(point.name, others)} "
                f"Editable hook points of this layer include {', '.join(others[:3])}."
            )

    @contextmanager
    def hooks(
        self,
        hooks: HookList = (),
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: Sequence[Any] = (),
        strict: bool = True,
    ) -> Iterator["HookedModel"]:
        """Attach hooks for every call of this thread inside the `with` block. Blocks nest; outer hooks run first.

        Args:
            hooks, fwd_hooks: interventions and `(selection, function)` pairs; `function(activation, hook)` returns a replacement or None.
            bwd_hooks: `(selection, function)` pairs on the gradient of whatever is backpropagated inside the block.
            strict: with True, a hook that no call in the block reaches is an error when the block ends.

        Raises:
            UnknownHookPoint, HookSignatureError, ReadOnlyHookPoint: on entering. HookReturnError: in a call. HookNeverReached: on leaving.
        """
        groups = self._groups(hooks) + self._groups(fwd_hooks) + self._groups(bwd_hooks, backward=True)
        with entered(groups, strict):
            yield self

    def run_with_hooks(
        self,
        *args: Any,
        hooks: HookList = (),
        fwd_hooks: HookList = (),
        bwd_hooks: Sequence[Any] = (),
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One call with hooks attached; see `hooks`. Other arguments go to the model."""
        with self.hooks(hooks, fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks, strict=strict):
            return self(*args, **kwargs)

    def add_hook(self, selection: Selection, function: Any, *, backward: bool = False) -> HookHandle:
        """Attach for all calls of all threads until `handle.remove()` or `reset_hooks()`."""
        groups = self._groups([(selection, function)], backward)
        for group in groups:
            attach_permanently(group)
        return HookHandle(groups)

    def list_hooks(self) -> dict[str, int]:
        """Permanent hooks attached, by hook-point name."""
        return {name: len(point.permanent) for name, point in self.hook_points.points.items() if point.permanent}

    def reset_hooks(self) -> None:
        """Take off all permanent hooks. Hooks of calls and `with` blocks need no resetting: they leave with them."""
        detach_permanently(self.hook_points.points.values())

    # ------------------------------------------------------------------ caching

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

    # ------------------------------------------------- patterns and states

    def patterns(self, tokens: Any, layers: int | Sequence[int] | None = None, **kwargs: Any) -> dict[Any, Pattern]:
        """The pattern of every layer (or some): softmax attention as formed, other mixers' effective pattern.

        Args:
            tokens: [batch, pos], or text. layers: restrict to these. Further arguments as for `run_with_cache` (`heads`, `hooks`, ...).

        Returns:
            `{layer: Pattern}` with values [batch, head, query, key]; keys are `(layer, step)` where depth shares weights.
        """
        _, cache = self.run_with_cache(tokens, names=Select(role="pattern", layer=layers), **kwargs)
        result: dict[Any, Pattern] = {}
        for address, values in cache.items():
            point = cache.point(address)
            assert point.layer_index is not None
            result[cache.depth(address)] = Pattern(values, point.meta, point.layer_index, address)
        return result

    def states(
        self,
        tokens: Any,
        positions: int | Sequence[int],
        layers: int | Sequence[int] | None = None,
        slot: str = "state",
        **kwargs: Any,
    ) -> StateReading:
        """States after chosen tokens, without storing the others.

        Args:
            tokens: [batch, pos], or text. positions: after which tokens. layers: restrict to these.
            slot: which state, where mixers carry several: the name of its hook point without `hook_`.

        Returns:
            `StateReading`: per layer [batch, position, head, state_k, state_v] (the axes after position are the hook point's), positions
            ascending.
        """
        self._require_state("read")
        tokens = self.to_tokens(tokens)
        wanted = absolute_positions(positions, tokens.shape[1])
        chosen = self.hook_points.resolve(Select(role="state", layer=layers))[0][1]
        slots = {s.point.name.rsplit(".hook_", 1)[-1] for s in chosen}
        if slot not in slots:
            raise UnknownHookPoint(
                f"No layer carries a state {slot!r}.{suggestion(slot, slots)} There are: {', '.join(sorted(slots))}."
            )
        names = [s.point.name for s in chosen if s.point.name.endswith(f".hook_{slot}")]
        _, cache = self.run_with_cache(tokens, names=names, positions=wanted, **kwargs)
        return StateReading(wanted, cache.by_role("state"))

    def trace_state(self, tokens: Any, layer: int, entries: Sequence[tuple[int, ...]], **kwargs: Any) -> Tensor:
        """Chosen entries `(head, i, j)` of one layer's state after every token, exactly.

        In O(tokens x entries) time and memory beside the forward pass. Where a hook watches or edits this layer's state, where the call
        goes on from a state, and for mixers whose state no factors determine, the state is read after every token instead, as the model
        goes on with it: the same memory, more time.

        Args:
            tokens: [batch, pos], or text. entries: indices into the axes of the state. Further arguments as for a call, with `hooks`.

        Returns:
            [batch, pos, entry].
        """
        self._require_state("trace")
        layer = range(self.n_layers)[layer]
        points = self.hook_points.points.values()
        state = main_point(points, "state", layer)
        if state is None:
            raise UnknownHookPoint(f"Layer {layer} carries no recurrent state to trace.")
        mixer = self.mixers[layer]
        pseudo_value = main_point(points, "pseudo_value", layer)
        written = written_points(mixer.describe()["form"], mixer.factor_points, pseudo_value)
        with self.hooks(kwargs.pop("hooks", ()), strict=kwargs.pop("strict", True)):
            watched = any(point.active for point in points if point.role == "state" and point.layer_index == layer)
            if written and not watched and kwargs.get("state") is None:
                return sum_entries(
                    self.factors_at(tokens, layer, written, **kwargs), entries, kwargs.get("mask"), layer
                )
            read, hook = entry_reader(state, entries, layer)
            self.run_with_hooks(tokens, hooks=[hook], **kwargs)
            return torch.stack(read, dim=1)

    def state_factors(self, tokens: Any, layer: int, **kwargs: Any) -> dict[str, Tensor]:
        """The factors of one layer's pattern and state as [batch, head, pos, width] (decays and writes [batch, head, pos] or [head])."""
        layer = range(self.n_layers)[layer]
        return self.factors_at(tokens, layer, self.mixers[layer].factor_points, **kwargs)

    def factors_at(self, tokens: Any, layer: int, points: Mapping[str, HookPoint], **kwargs: Any) -> dict[str, Tensor]:
        """What a run leaves at these points {factor: point} of a layer, as `state_factors` gives it, and its constant factors."""
        mixer = self.mixers[layer]
        _, cache = self.run_with_cache(tokens, names=[point.name for point in points.values()], **kwargs)
        factors = {name: heads_first(cache[point.name], point) for name, point in points.items()}
        heads = mixer.describe()["n_heads"]
        for name in factors.keys() & {"query", "key"}:  # groups shared by several heads
            factors[name] = factors[name].repeat_interleave(heads // factors[name].shape[1], dim=1)
        return {**mixer.constant_factors(), **factors}

    def _require_state(self, verb: str) -> None:
        if "state" not in self.hook_points.roles:
            raise UnknownHookPoint(
                f"There is no recurrent state to {verb}: this model's memory is its cache of keys and values (roles 'key' and 'value')."
            )

    def to_tokens(self, tokens: Any) -> Tensor:
        """[batch, pos] token ids from ids or text. Models with a tokenizer override this to accept text."""
        if not isinstance(tokens, Tensor):
            raise HookError(f"Expected token ids as a tensor [batch, pos], got {type(tokens).__name__}.")
        return tokens if tokens.dim() == 2 else tokens[None]


def main_point(points: Iterable[HookPoint], role: str, layer: int) -> HookPoint | None:
    """The layer's point of a role: the one named `hook_<role>` if there are several, else the first; None if there is none."""
    found = [point for point in points if point.role == role and point.layer_index == layer]
    return next((point for point in found if point.name.endswith(f".hook_{role}")), found[0] if found else None)


def heads_first(x: Tensor, point: HookPoint) -> Tensor:
    """Reorder to [batch, head, pos, ...] (or `source` for `pos`, what cross-attention reads) by the axis names of the hook point."""
    names = list(point.axes)
    head = next((axis for axis in ("head", "kv_head", "group") if axis in names), None)
    order = ["batch", *([head] if head else []), "pos" if "pos" in names else "source"]
    rest = [axis for axis in names if axis not in order]
    x = x.permute([names.index(axis) for axis in [*order, *rest]])
    return x if head else x.unsqueeze(1)


__all__ = ["HookHandle", "HookedModel", "Mixer", "main_point"]
