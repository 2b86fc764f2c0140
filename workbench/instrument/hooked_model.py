"""`HookedModel`: running a model while reading and editing it.

A model is a `HookedModel` if its modules own `HookPoint`s and it calls `name_hook_points()` at the end of its constructor. Then it has

    model.run_with_cache(tokens, names=..., layers=..., heads=..., positions=...)   ->  (output, ActivationCache)
    model.run_with_hooks(tokens, hooks=[(name, function), Ablate(...)])             ->  output
    with model.hooks([...]): ...                                                    nested, for any number of calls
    handle = model.add_hook(name, function)                                         until handle.remove()
    model.states(tokens, positions)  model.trace_state(tokens, layer, entries)  model.patterns(tokens)

Names are in `naming`, hooks in `attaching`, `run_with_cache` in `caching`; here are patterns and states, which rest on them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.attaching import HookHandle
from workbench.instrument.caching import Caching
from workbench.instrument.errors import UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.naming import Mixer
from workbench.instrument.patterns import Pattern
from workbench.instrument.selection import Select
from workbench.instrument.state_traces import entry_reader, sum_entries, written_points
from workbench.instrument.states import StateReading, absolute_positions


class HookedModel(Caching):
    """Base of every model here. See the module docstring."""

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
