"""Hook points: named places in a forward pass where a tensor can be read and replaced.

A `HookPoint` is a plain slot object, not an `nn.Module`: it holds no parameters, is not in the state dict, and costs two attribute
tests when nobody watches. A module owns its hook points as attributes and calls them inline:

    self.hook_q = HookPoint("query", "batch pos head d_head")
    ...
    q = self.hook_q(q)

Who watches is not written on the point but in the running thread (`ACTIVE.entries`: hook-point number -> entries). A call, or a
`with model.hooks(...)` block, enters a scope and leaves it whatever happens, so hooks of one call are invisible to other calls, to
other threads and after an exception. Permanent hooks are the exception: they sit on the point itself.

Words: an *entry* is one attached thing (a function, an intervention, a store); a *group* is one entry with all hook points that one
written selection resolved to, and must be reached at least once.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workbench.instrument.errors import HookNeverReached
from workbench.instrument.html import table

_uids = itertools.count()
_lock = threading.Lock()
_attached = 0  # open scopes of all threads, and permanent hooks
_anything = False  # whether any of them exists: the one cheap test of a forward pass that nobody watches

Item = int | tuple[int, int | None]
"""A position, or a range (start, stop) of positions; negative numbers count from the end of the call."""


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
        self.permanent: tuple[Entry, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied model gets points of its own, without hooks: hooks on the original must not fire in the copy."""
        declared = {
            "role": self.role,
            "axes": " ".join(self.axes),
            "editable": self.editable,
            "on_demand": self.on_demand,
            "flag": self.flag,
            "gated": self.gated,
            "per_position": self.per_position,
            "meta": self.meta,
        }
        return _same_point, (declared, self.name, self.layer_index, self.steps)

    def __call__(self, x: Tensor) -> Tensor:
        if not _anything:
            return x
        entries = ACTIVE.entries.get(self.uid, ())
        if self.permanent:
            entries = self.permanent + entries
        if ACTIVE.piece is not None:
            return ACTIVE.piece.passed(self, x, entries)
        for entry in entries:
            x = entry.fire(x, self, None)
        return x

    @property
    def active(self) -> bool:
        """Whether somebody watches this point in the running thread, so that it must be computed."""
        return (
            _anything
            and (self.uid in ACTIVE.entries or bool(self.permanent))
            and (ACTIVE.piece is None or not ACTIVE.piece.silent)
        )

    def stops(self, start: int, length: int) -> list[int]:
        """Positions relative to `start`, ascending, at which a per-position point is watched in this call of `length` tokens."""
        ACTIVE.end = start + length
        wanted: set[int] = set()
        for entry in self.permanent + ACTIVE.entries.get(self.uid, ()):
            if entry.step is None or entry.step == ACTIVE.step:
                wanted.update(entry.wanted_positions(start, start + length))
        return sorted(position - start for position in wanted)

    def at(self, position: int, x: Tensor) -> Tensor:
        """Fire a per-position point for the absolute `position`, one of `stops`."""
        for entry in self.permanent + ACTIVE.entries.get(self.uid, ()):
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
        """Absolute position of the first token of this call, or of its piece that is running: 0, or the number of tokens read before."""
        return ACTIVE.offset

    @property
    def rest(self) -> int:
        """Tokens of this call that its later pieces hold: 0 but in models that read a call in pieces (`workbench.instrument.pieces`)."""
        return 0 if ACTIVE.piece is None else ACTIVE.piece.rest

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
        if self.steps > 1:
            notes.append(f"{self.steps} steps")
        if self.permanent:
            notes.append(f"{len(self.permanent)} permanent hook{'s' if len(self.permanent) > 1 else ''}")
        return f"HookPoint({self.name or '(unnamed)'}: {'; '.join(notes)})"

    def _repr_html_(self) -> str:
        facts = self.describe() | {"axes": " ".join(self.axes), "permanent hooks": len(self.permanent)}
        return table(
            repr(self), ("fact", "value"), [(fact, value) for fact, value in facts.items() if value is not None]
        )


def _same_point(declared: dict[str, Any], name: str, layer: int | None, steps: int) -> HookPoint:
    point = HookPoint(**declared)
    point.name, point.layer_index, point.steps = name, layer, steps
    return point


class Entry:
    """One attached thing. Subclasses say what happens to the tensor.

    `step` and `positions` restrict it to one pass over shared weights and to some positions of per-position points
    (None: every one). `reached` and `met` record what the runs of its scope came across. `edits`: it may change the activation;
    `stores`: it keeps the activation that the model goes on with; `joins`: of a call that is read in pieces, it wants the whole.
    """

    edits = True
    stores = False
    joins = False

    def __init__(self, step: int | None = None, positions: tuple[Item, ...] | None = None) -> None:
        self.step = step
        self.positions = positions
        self.reached = False
        self.met: set[Any] = set()

    def fire(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Apply to the tensor if this pass and position are meant."""
        if not self.wants(position):
            return x
        self.reached = True
        return self.apply(x, point, position)

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """What the entry does with the tensor; returns what the model goes on with."""
        raise TypeError(f"{type(self).__name__} does not say what it does")

    def finish(self) -> None:
        """Called when the scope that holds the entry is left without an exception."""

    def wants(self, position: int | None) -> bool:
        """Whether this step, and for a per-position point this absolute position, is meant."""
        if self.step is not None and self.step != ACTIVE.step:
            return False
        if position is None or self.positions is None:
            return True
        matching = [item for item in self.positions if _contains(item, position, ACTIVE.end)]
        self.met.update(matching)
        return bool(matching)

    def wanted_positions(self, start: int, end: int) -> Iterable[int]:
        """The absolute positions in `[start, end)`, a whole call, that this entry wants."""
        if self.positions is None:
            return range(start, end)
        return [p for p in range(start, end) if any(_contains(item, p, end) for item in self.positions)]

    def missing(self) -> list[str]:
        """Parts of the selection that no run came across, in words."""
        absent = [item for item in self.positions or () if item not in self.met]
        return [f"position {written(item)}" for item in absent]


def _contains(item: Item, position: int, end: int) -> bool:
    if isinstance(item, int):
        return position == (item if item >= 0 else end + item)
    start, stop = item
    start = start if start >= 0 else end + start
    stop = end if stop is None else stop if stop >= 0 else end + stop
    return start <= position < stop


def written(item: Item) -> str:
    """`3` or `3:10`, as in an address."""
    return str(item) if isinstance(item, int) else f"{item[0] or ''}:{'' if item[1] is None else item[1]}"


@dataclass(frozen=True)
class Group:
    """An entry with everything that one written selection resolved to; it must be reached at least once."""

    description: str
    entry: Entry
    points: Sequence[HookPoint]

    def check_reached(self) -> None:
        """Raise `HookNeverReached` if the entry never fired, or if some of the chosen positions never occurred."""
        if not self.points:
            return
        advice = "check stop_at_layer / start_at_layer, the step and the positions, or pass strict=False."
        missing = self.entry.missing()
        if not self.entry.reached:
            places = ", ".join(repr(point.name) for point in self.points[:3])
            more = f" and {len(self.points) - 3} more" if len(self.points) > 3 else ""
            where = f" ({', '.join(missing)})" if missing else ""
            raise HookNeverReached(
                f"The hook on {self.description} was attached to {places}{more}, but no run reached it{where}. "
                f"Expected it to fire at least once: {advice}"
            )
        if missing:
            raise HookNeverReached(
                f"The hook on {self.description} was reached, but {', '.join(missing)} never occurred in the run. "
                f"Expected every chosen part to occur: {advice}"
            )


class _Active(threading.local):
    """What the running thread is doing. `entries` are those of all open scopes, by hook-point number.

    The model sets `step` and `offset` while it runs; `end` is the position after the last token of a call, for negative positions;
    `running` are the entries whose functions are being called now; `piece` is the part of a call that is running, where a model reads
    a call in pieces (`workbench.instrument.pieces`), else None.
    """

    def __init__(
        self,
    ) -> None:  # runs once in every thread; torch.compile wants the attributes there from the beginning
        self.entries: Mapping[int, tuple[Entry, ...]] = {}
        self.scopes: tuple[Sequence[Group], ...] = ()
        self.step = 0
        self.offset = 0
        self.end = 0
        self.running: tuple[Entry, ...] = ()
        self.piece: Any = None


ACTIVE = _Active()


@contextmanager
def entered(groups: Sequence[Group], strict: bool = True) -> Iterator[None]:
    """Attach groups for the running thread until the block is left; then verify that each was reached (if `strict`)."""
    scope = list(groups)  # an object of its own, so that it is recognised when it leaves
    entries, scopes = ACTIVE.entries, ACTIVE.scopes
    _count(+1)
    try:
        ACTIVE.entries, ACTIVE.scopes = _merged(entries, scope), (*scopes, scope)
        yield
        for group in groups:
            group.entry.finish()
        if strict:
            for group in groups:
                group.check_reached()
    finally:
        if len(ACTIVE.scopes) == len(scopes) + 1 and ACTIVE.scopes[-1] is scope:
            ACTIVE.entries, ACTIVE.scopes = entries, scopes
        else:  # blocks left in another order than entered (generators, exit stacks): take out this one only
            ACTIVE.scopes = tuple(other for other in ACTIVE.scopes if other is not scope)
            ACTIVE.entries = {}
            for other in ACTIVE.scopes:
                ACTIVE.entries = _merged(ACTIVE.entries, other)
        _count(-1)


def _count(change: int) -> None:
    global _attached, _anything
    with _lock:
        _attached += change
        _anything = _attached > 0


def _merged(entries: Mapping[int, tuple[Entry, ...]], groups: Sequence[Group]) -> dict[int, tuple[Entry, ...]]:
    """Entries by hook point with those of `groups` added.

    Edits run in the order attached, and before entries that only read; those that store come last. A hook on the gradient goes
    upstream of the earlier ones, so that on the way back they too run in the order attached.
    """
    merged = dict(entries)
    for group in groups:
        alone = (group.entry,)
        if not merged:  # the usual case, and a group may hold hundreds of points
            merged = {point.uid: alone for point in group.points}
            continue
        for point in group.points:
            others = merged.get(point.uid)
            if others is None:
                merged[point.uid] = alone
            elif group.entry.stores:
                merged[point.uid] = others + alone
            else:
                edits = tuple(entry for entry in others if entry.edits)
                merged[point.uid] = edits + alone + tuple(entry for entry in others if not entry.edits)
    return merged


def attach_permanently(group: Group) -> None:
    """Add an entry to the points themselves, for every thread."""
    for point in group.points:
        _count(+1)
        with _lock:
            point.permanent = (*point.permanent, group.entry)


def detach_permanently(points: Iterable[HookPoint], entry: Entry | None = None) -> None:
    """Take an entry, or all, off the points again; harmless where it is off already."""
    for point in points:
        with _lock:
            before = point.permanent
            point.permanent = tuple(e for e in before if entry is not None and e is not entry)
        _count(len(point.permanent) - len(before))


@contextmanager
def unhooked(entry: Entry) -> Iterator[None]:
    """While a hook function runs, models that it calls run without the hooks of the call that it belongs to."""
    before = ACTIVE.entries, ACTIVE.scopes, ACTIVE.step, ACTIVE.offset, ACTIVE.end, ACTIVE.running, ACTIVE.piece
    ACTIVE.entries, ACTIVE.scopes, ACTIVE.running, ACTIVE.piece = {}, (), (*ACTIVE.running, entry), None
    try:
        yield
    finally:
        ACTIVE.entries, ACTIVE.scopes, ACTIVE.step, ACTIVE.offset, ACTIVE.end, ACTIVE.running, ACTIVE.piece = before
