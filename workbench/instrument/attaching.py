"""Attaching hooks and interventions to a model: for one call, for a `with` block, or until they are taken off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from workbench.instrument.entries import FunctionEntry, GradientEntry, InterventionEntry
from workbench.instrument.errors import HookError, HookSignatureError, ReadOnlyHookPoint, suggestion
from workbench.instrument.hook_points import Group, HookPoint, attach_permanently, detach_permanently, entered
from workbench.instrument.interventions import EditState, Intervention
from workbench.instrument.naming import NamedPoints
from workbench.instrument.selection import Selection

HookList = Sequence[Any] | Intervention


class HookHandle:
    """Takes a permanent hook off again."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def remove(self) -> None:
        """Detach; harmless if already detached."""
        for group in self._groups:
            detach_permanently(group.points, group.entry)


class Attaching(NamedPoints):
    """What is attached to a model's hook points. The second part of `HookedModel`."""

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
    ) -> Iterator[Self]:
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
