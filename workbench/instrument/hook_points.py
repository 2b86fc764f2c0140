"""Hook points: named places in a forward pass where a tensor can be read and replaced.

A `HookPoint` is a plain slot object, not an `nn.Module`: it holds no parameters, is not in the state dict, and costs one attribute test
when nobody watches (`if not self.watched: return x`). A module owns its hook points as attributes and calls them inline:

    self.hook_q = HookPoint("query", "batch pos head d_head")
    ...
    q = self.hook_q(q)

Who watches is not written on the point but in the *scope* of the running thread: a map from hook points to entries (a cache entry, an
intervention, a function). A call, or a `with model.hooks(...)` block, enters a scope and leaves it whatever happens, so hooks of one call
are invisible to other calls, to other threads and after an exception. Permanent hooks are the exception: they sit on the point itself.

Words: an *entry* is one attached thing; its *address* is what the user wrote resolved to one point (`name`, `name@step`, `name[t]`);
a *group* is everything that one written selection resolved to, and must be reached at least once.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from workbench.instrument.errors import HookNeverReached

_uids = itertools.count()
_watch_lock = threading.Lock()


class HookPoint:
    """One named place in a forward pass.

    Args:
        role: what the tensor is, in the shared vocabulary (`"query"`, `"pattern"`, `"resid"`, `"state"`, ...).
        axes: names of the axes in order, separated by blanks, e.g. `"batch head query key"`.
        editable: False for a point that only reports; attaching an edit there is an error.
        on_demand: computed and cached only when asked for by name or role (never by "cache everything"), because it costs extra.
        flag: name of the model switch (`use_attn_result`, ...) that adds the point to "cache everything".
        gated: the point does not exist in the computation while that switch is off.
        meta: what a pattern point's values mean (`PatternMeta`), or None.
        per_position: fired once per position, addressed as `name[t]` (states); `axes` then describe one position's tensor.
    """

    __slots__ = (
        "__weakref__",
        "axes",
        "editable",
        "flag",
        "gated",
        "layer_index",
        "meta",
        "name",
        "on_demand",
        "per_position",
        "permanent",
        "role",
        "steps",
        "uid",
        "watched",
        "watchers",
    )

    def __init__(
        self,
        role: str,
        axes: str,
        *,
        editable: bool = True,
        on_demand: bool = False,
        flag: str | None = None,
        gated: bool = False,
        per_position: bool = False,
        meta: Any = None,
    ) -> None:
        self.role = role
        self.axes = tuple(axes.split())
        self.editable = editable
        self.on_demand = on_demand or flag is not None or per_position
        self.flag = flag
        self.gated = gated
        self.per_position = per_position
        self.meta = meta
        self.name = ""  # given by HookedModel.name_hook_points, from the module tree
        self.layer_index: int | None = None
        self.steps = 1  # how often a run passes here (> 1 where weights are shared over depth)
        self.uid = next(_uids)
        self.watchers = 0
        self.watched = False
        self.permanent: tuple[Entry, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookPoint":
        """A copied model gets points of its own: hooks on the original must not fire in the copy."""
        copy = HookPoint(
            self.role,
            " ".join(self.axes),
            editable=self.editable,
            on_demand=self.on_demand,
            flag=self.flag,
            gated=self.gated,
            per_position=self.per_position,
            meta=self.meta,
        )
        copy.name, copy.layer_index, copy.steps = self.name, self.layer_index, self.steps
        memo[id(self)] = copy
        return copy

    def __call__(self, x: Tensor) -> Tensor:
        if not self.watched:
            return x
        return self._fire(x)

    def _fire(self, x: Tensor) -> Tensor:
        for entry in self.permanent:
            x = entry.fire(x, self, None)
        scope = ACTIVE.scope
        if scope is not None:
            for entry in scope.entries.get(self.uid, ()):
                x = entry.fire(x, self, None)
        return x

    @property
    def active(self) -> bool:
        """Whether somebody watches this point in the running thread, so that it must be computed."""
        if not self.watched:
            return False
        if self.permanent:
            return True
        scope = ACTIVE.scope
        return scope is not None and self.uid in scope.entries

    def stops(self, start: int, length: int) -> list[int]:
        """Positions relative to `start`, ascending, at which a per-position point is watched in this call of `length` tokens."""
        scope = ACTIVE.scope
        entries = self.permanent + (scope.entries.get(self.uid, ()) if scope is not None else ())
        wanted: set[int] = set()
        for entry in entries:
            if entry.step is None or entry.step == ACTIVE.step:
                wanted.update(entry.wanted_positions(start, length))
        return sorted(position - start for position in wanted)

    def at(self, position: int, x: Tensor) -> Tensor:
        """Fire a per-position point for the absolute `position`."""
        scope = ACTIVE.scope
        for entry in self.permanent + (scope.entries.get(self.uid, ()) if scope is not None else ()):
            x = entry.fire(x, self, position)
        return x

    def layer(self) -> int | None:
        """Layer number, or None outside the blocks (a method, as in TransformerLens)."""
        return self.layer_index

    @property
    def step(self) -> int:
        """Which pass over shared weights is running now (0 where depth is not shared)."""
        return ACTIVE.step

    @property
    def offset(self) -> int:
        """Absolute position of this call's first token: 0, or the number of tokens already carried in the state."""
        return ACTIVE.offset

    def describe(self) -> dict[str, Any]:
        """Plain data for manifests and `--json`."""
        return {
            "name": self.name,
            "role": self.role,
            "axes": list(self.axes),
            "layer": self.layer_index,
            "editable": self.editable,
            "on_demand": self.on_demand,
            "flag": self.flag,
            "gated": self.gated,
            "per_position": self.per_position,
            "steps": self.steps,
        }

    def __repr__(self) -> str:
        notes = [self.role, " ".join(self.axes)]
        if not self.editable:
            notes.append("report only")
        if self.flag:
            notes.append(f"needs {self.flag}")
        if self.per_position:
            notes.append("per position")
        return f"HookPoint({self.name or '(unnamed)'}: {'; '.join(notes)})"


class Entry:
    """One attached thing at one hook point. Subclasses say what happens to the tensor.

    `step` and `positions` restrict it to one pass over shared weights and to some positions of a per-position point.
    `positions` is None for every position, or a tuple of ints and `(start, stop)` ranges as written by the user.
    """

    edits = True

    def __init__(self, address: str, step: int | None = None, positions: tuple[Any, ...] | None = None) -> None:
        self.address = address
        self.step = step
        self.positions = positions
        self.reached = False

    def fire(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Apply to the tensor if this pass and position are meant."""
        if self.step is not None and self.step != ACTIVE.step:
            return x
        if position is not None and self.positions is not None and not self.wants(position):
            return x
        if self.touches(x, point):
            self.reached = True
        return self.apply(x, point, position)

    def touches(self, x: Tensor, point: HookPoint) -> bool:
        """Whether this entry concerns any part of `x`; a scope whose entries never touch anything is an error."""
        return True

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """What the entry does with the tensor; returns what the model goes on with."""
        raise TypeError(f"{type(self).__name__} does not say what it does")

    def finish(self) -> None:
        """Called when the scope that holds the entry is left without an exception."""

    def wants(self, position: int) -> bool:
        """Whether an absolute position is among the wanted ones."""
        if self.positions is None:
            return True
        for item in self.positions:
            if (isinstance(item, int) and item == position) or (
                isinstance(item, tuple) and item[0] <= position and (item[1] is None or position < item[1])
            ):
                return True
        return position in self._resolved

    _resolved: frozenset[int] = frozenset()

    def wanted_positions(self, start: int, length: int) -> Iterable[int]:
        """Absolute positions in `[start, start + length)` that this entry wants. Negative ones count from this call's end."""
        stop = start + length
        if self.positions is None:
            return range(start, stop)
        negative = {stop + item for item in self.positions if isinstance(item, int) and item < 0}
        self._resolved = self._resolved | frozenset(negative)
        return [position for position in range(start, stop) if self.wants(position)]


@dataclass
class Group:
    """Everything one written selection resolved to; it must be reached at least once."""

    description: str
    entries: list[Entry]
    points: list[HookPoint]

    def check_reached(self) -> None:
        """Raise `HookNeverReached` if no entry of the group fired."""
        if self.entries and not any(entry.reached for entry in self.entries):
            places = ", ".join(repr(entry.address) for entry in self.entries[:3])
            more = f" and {len(self.entries) - 3} more" if len(self.entries) > 3 else ""
            raise HookNeverReached(
                f"The hook on {self.description} was attached to {places}{more} but the run never reached it. Expected it to fire at "
                "least once: check stop_at_layer / start_at_layer, the step and the positions, or pass strict=False."
            )


@dataclass
class Scope:
    """What is attached in a thread: entries by hook point, on top of the enclosing scope's."""

    entries: dict[int, tuple[Entry, ...]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    strict: bool = True
    called: bool = False
    parent: "Scope | None" = None


class _Active(threading.local):
    """What the running thread is doing. `step` and `offset` are set by the model while it runs."""

    scope: Scope | None = None
    step: int = 0
    offset: int = 0


ACTIVE = _Active()


def watch(points: Iterable[HookPoint], change: int) -> None:
    """Count watchers up or down; `watched` is the cheap flag that the forward pass tests."""
    with _watch_lock:
        for point in points:
            point.watchers += change
            point.watched = point.watchers > 0


@contextmanager
def entered(groups: list[Group], strict: bool = True) -> Iterator[Scope]:
    """Attach groups for the running thread. Cache entries (which do not edit) always run after edits at the same point."""
    parent = ACTIVE.scope
    entries: dict[int, tuple[Entry, ...]] = dict(parent.entries) if parent is not None else {}
    for group in groups:
        for point, entry in zip(group.points, group.entries, strict=True):
            entries[point.uid] = tuple(sorted((*entries.get(point.uid, ()), entry), key=lambda e: not e.edits))
    scope = Scope(entries, groups, strict, parent=parent)
    points = [point for group in groups for point in group.points]
    watch(points, +1)
    ACTIVE.scope = scope
    try:
        yield scope
        if strict and scope.called:
            for group in groups:
                group.check_reached()
        for group in groups:
            for entry in group.entries:
                entry.finish()
    finally:
        ACTIVE.scope = parent
        watch(points, -1)


@contextmanager
def unhooked() -> Iterator[None]:
    """While a hook function runs, models that it calls run without the hooks of the call that it belongs to."""
    scope, step, offset = ACTIVE.scope, ACTIVE.step, ACTIVE.offset
    ACTIVE.scope = None
    try:
        yield
    finally:
        ACTIVE.scope, ACTIVE.step, ACTIVE.offset = scope, step, offset


def count_call() -> None:
    """Tell the enclosing scopes that a forward pass ran inside them."""
    scope = ACTIVE.scope
    while scope is not None:
        scope.called = True
        scope = scope.parent


HookFunction = Callable[..., Tensor | None]
