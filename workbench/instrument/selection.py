"""Selecting hook points: by name, glob, role, layer, predicate. A selection that matches nothing is an error with the nearest name.

Address grammar: `name`, `name@step`, `name[positions]`, `name@step[positions]`, where `name` may be a glob (`blocks.*.attn.hook_z`),
`step` counts passes over shared weights, and `positions` is `12`, `-1`, `3:10`, `4,8,-1` or `*` (per-position points only).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from operator import index
from typing import Any, NamedTuple

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint, Item, written

_ADDRESS = re.compile(r"^(?P<name>[^@\[\]]*?)(?:@(?P<step>-?\d+))?(?:\[(?P<positions>[^\]]*)\])?$")


@dataclass(frozen=True)
class Select:
    """Hook points by what they are rather than by name, so that one probe runs on every architecture.

    Args:
        role: e.g. `"pattern"`, `"resid"`, `"state"`.
        layer: one layer, several, or None for all. Negative layers count from the last.
        name: additionally, a glob on the name.
    """

    role: str | None = None
    layer: int | Sequence[int] | None = None
    name: str | None = None

    def __str__(self) -> str:
        parts = [f"{key}={value!r}" for key, value in vars(self).items() if value is not None]
        return f"Select({', '.join(parts)})"


Selection = str | HookPoint | Select | Callable[[str], bool] | Sequence[Any]


class Selected(NamedTuple):
    """One resolved address. All that one selection resolves to share the step and the positions."""

    point: HookPoint
    step: int | None = None
    positions: tuple[Item, ...] | None = None

    @property
    def suffix(self) -> str:
        """`[positions]` as the user would write it, or nothing."""
        return "" if self.positions is None else f"[{','.join(written(item) for item in self.positions)}]"

    @property
    def address(self) -> str:
        """`name`, `name@step`, `name[positions]`, as the user would write it."""
        return f"{self.point.name}{'' if self.step is None else f'@{self.step}'}{self.suffix}"


class SelectedPoints(list[Selected]):
    """Everything that one selection resolved to."""

    @cached_property
    def points(self) -> list[HookPoint]:
        """The hook points."""
        return [selected.point for selected in self]

    @cached_property
    def whole(self) -> bool:
        """Whether a run passes each once, with all positions in one tensor."""
        return all(s.step is None and s.point.steps == 1 and not s.point.per_position for s in self)


class HookPoints:
    """The hook points of one model by name, and the resolver of selections over them."""

    def __init__(
        self,
        points: Mapping[str, HookPoint],
        n_layers: int,
        switches: Mapping[str, bool],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.points, self.n_layers, self.switches, self.aliases = points, n_layers, switches, aliases or {}
        self._defaults: dict[tuple[bool, ...], SelectedPoints] = {}

    @property
    def roles(self) -> list[str]:
        """Roles that occur in this model."""
        return sorted({point.role for point in self.points.values()})

    def default(self) -> SelectedPoints:
        """What "cache everything" means: all points but those computed on demand, unless their switch is on."""
        self._require_points()
        switched = tuple(self.switches.values())
        if switched not in self._defaults:
            self._defaults[switched] = SelectedPoints(
                Selected(point)
                for point in self.points.values()
                if not point.on_demand or (point.flag is not None and self.switches.get(point.flag, False))
            )
        return self._defaults[switched]

    def resolve(self, selection: Selection) -> list[tuple[str, SelectedPoints]]:
        """Resolve what a user wrote into described groups, each with at least one hook point.

        A list resolves item by item, and every item must match: one bad name in a list is an error.
        """
        self._require_points()
        if isinstance(selection, (list, tuple, set, frozenset)):
            if not selection:
                raise UnknownHookPoint(
                    "An empty list selects no hook point. Expected at least one name, glob, role or predicate."
                )
            return [group for item in selection for group in self.resolve(item)]
        if isinstance(selection, HookPoint):
            if self.points.get(selection.name) is not selection:
                raise UnknownHookPoint(f"{selection!r} belongs to another model. Expected a hook point of this one.")
            return [(repr(selection.name), SelectedPoints([self._available(selection)]))]
        if isinstance(selection, Select):
            return [(str(selection), SelectedPoints(self._by_kind(selection)))]
        if isinstance(selection, str):
            return [(repr(selection), SelectedPoints(self._by_address(selection)))]
        if callable(selection):
            matches = [Selected(p) for name, p in self.points.items() if selection(name) and not self._switched_off(p)]
            name = getattr(selection, "__name__", "predicate")
            if not matches:
                raise UnknownHookPoint(
                    f"The predicate {name!r} matches none of the {len(self.points)} hook points. "
                    f"Expected a function of the hook name, e.g. lambda name: name.endswith('hook_resid_post'); names look like "
                    f"{next(iter(self.points))!r}."
                )
            return [(f"the predicate {name!r}", SelectedPoints(matches))]
        raise UnknownHookPoint(
            f"Cannot select hook points by {type(selection).__name__}. Expected a name, a glob, Select(role=..., layer=...), "
            "a predicate on names, or a list of these."
        )

    def _require_points(self) -> None:
        if not self.points:
            raise UnknownHookPoint(
                "This model has no hook points. Expected HookPoint attributes, and name_hook_points() at the end of the constructor."
            )

    def _switched_off(self, point: HookPoint) -> bool:
        return point.gated and point.flag is not None and not self.switches.get(point.flag, False)

    def _available(
        self, point: HookPoint, step: int | None = None, positions: tuple[Item, ...] | None = None
    ) -> Selected:
        if self._switched_off(point):
            raise UnknownHookPoint(
                f"{point.name!r} does not exist while {point.flag} is off. Switch it on first: model.set_{point.flag}(True)."
            )
        if step is not None and point.steps == 1:
            raise UnknownHookPoint(
                f"{point.name!r} has no steps: its weights are not shared over depth, a run passes it once. "
                f"Expected the bare name {point.name!r}."
            )
        if step is not None and not 0 <= step < point.steps:
            raise UnknownHookPoint(f"{point.name!r} has steps 0..{point.steps - 1}, not {step}.")
        if positions is not None and not point.per_position:
            raise UnknownHookPoint(
                f"{point.name!r} holds all positions in one tensor (axes {' '.join(point.axes)}); [positions] is for per-position points. "
                "Expected the bare name; use positions=... to select when caching or intervening."
            )
        return Selected(point, step, positions)

    def _by_kind(self, selection: Select) -> list[Selected]:
        if selection.role is None and selection.layer is None and selection.name is None:
            raise UnknownHookPoint("Select() is empty. Expected a role, a layer or a name glob.")
        if selection.role is not None and selection.role not in self.roles:
            raise UnknownHookPoint(
                f"Unknown role {selection.role!r} on this model.{suggestion(selection.role, self.roles)} "
                f"Its roles are: {', '.join(self.roles)}."
            )
        layers = self._layers(selection.layer)
        matches_glob = None if selection.name is None else _glob(selection.name)
        unasked = selection.role is None and selection.name is None  # a layer alone does not ask for what costs extra
        matches = [
            Selected(point)
            for name, point in self.points.items()
            if (selection.role is None or point.role == selection.role)
            and (layers is None or point.layer_index in layers)
            and (matches_glob is None or matches_glob(name))
            and not (point.on_demand and unasked and not self.switches.get(point.flag or "", False))
            and not self._switched_off(point)
        ]
        if not matches:
            for point in self.points.values():  # matched, but switched off: say which switch
                if self._switched_off(point) and point.role == selection.role:
                    self._available(point)
            raise UnknownHookPoint(f"{selection} matches no hook point. Roles of this model: {', '.join(self.roles)}.")
        return matches

    def _layers(self, layer: int | Sequence[int] | None) -> set[int] | None:
        if layer is None:
            return None
        layers = [layer] if isinstance(layer, int) else list(layer)
        if not layers:
            raise UnknownHookPoint(f"An empty list of layers selects nothing. Expected some of 0..{self.n_layers - 1}.")
        for number in layers:
            if not -self.n_layers <= number < self.n_layers:
                raise UnknownHookPoint(f"Layer {number} is out of range: this model has layers 0..{self.n_layers - 1}.")
        return {number % self.n_layers for number in layers}

    def _by_address(self, address: str) -> list[Selected]:
        parsed = _ADDRESS.match(address)
        if parsed is None:
            raise UnknownHookPoint(
                f"{address!r} is not a hook address. Expected name, name@step or name[positions], e.g. 'blocks.0.attn.hook_pattern'."
            )
        name = self.aliases.get(parsed["name"], parsed["name"])
        step = int(parsed["step"]) if parsed["step"] is not None else None
        positions = parse_positions(parsed["positions"], address) if parsed["positions"] is not None else None
        if name in self.points:
            return [self._available(self.points[name], step, positions)]
        if any(character in name for character in "*?"):
            return self._by_glob(name, step, positions)
        layer = re.match(r"blocks\.(-?\d+)\.", name)
        if layer and not 0 <= int(layer[1]) < self.n_layers:
            raise UnknownHookPoint(
                f"{name!r}: layer {layer[1]} is out of range; this model has layers 0..{self.n_layers - 1}."
                f"{suggestion(name, self.points)}"
            )
        raise UnknownHookPoint(f"Unknown hook point {name!r}.{suggestion(name, [*self.points, *self.aliases])}")

    def _by_glob(self, glob: str, step: int | None, positions: tuple[Item, ...] | None) -> list[Selected]:
        matches_glob = _glob(glob)
        matches = [point for name, point in self.points.items() if matches_glob(name)]
        matches += [
            self.points[name] for alias, name in self.aliases.items() if matches_glob(alias) and not matches_glob(name)
        ]
        usable = [point for point in matches if not self._switched_off(point)]
        if step is not None:
            usable = [point for point in usable if point.steps > 1]
        if positions is not None:
            usable = [point for point in usable if point.per_position]
        if usable:
            return [self._available(point, step, positions) for point in usable]
        if matches:  # it matched points that cannot be meant: say why, for the first of them
            self._available(matches[0], step, positions)
        raise UnknownHookPoint(
            f"The glob {glob!r} matches none of the {len(self.points)} hook points.{suggestion(glob.replace('*', '0'), self.points)}"
        )


def _glob(pattern: str) -> Callable[[str], Any]:
    return re.compile(translate(pattern)).match


def parse_positions(text: str, address: str) -> tuple[Item, ...] | None:
    """`"4,8,-1"` to `(4, 8, -1)`, `"3:10"` to `((3, 10),)`, `"*"` to None (every position)."""
    if text.strip() in ("*", ":"):
        return None
    items: list[Item] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", part)
        if bounds and "-" not in bounds.groups():
            items.append((int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None))
        elif re.fullmatch(r"\s*-?\d+\s*", part):
            items.append(int(part))
        else:
            raise UnknownHookPoint(
                f"Cannot read the positions in {address!r}. Expected e.g. [12], [-1], [3:10], [4,8] or [*]."
            )
    return tuple(items)


def as_indices(wanted: Any, what: str) -> tuple[int, ...]:
    """Numbers along an axis as a tuple: from one number, a list, a range, a tensor.

    Raises:
        HookError: an empty list, or something that is not a number (True and False are refused: this is no mask).
    """
    try:
        items = [wanted] if not hasattr(wanted, "__iter__") or getattr(wanted, "ndim", 1) == 0 else list(wanted)
        if any(isinstance(item, bool) or "bool" in str(getattr(item, "dtype", "")) for item in items):
            raise TypeError
        numbers = tuple(index(item) for item in items)
    except TypeError:
        raise HookError(f"{what} is {wanted!r}. Expected a number or a list of numbers.") from None
    if not numbers:
        raise HookError(f"{what} is empty, which selects nothing. Expected at least one number.")
    return numbers
