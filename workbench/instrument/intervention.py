"""`Intervention`: the base of small declarative objects that change a run, are written to JSON + safetensors, and drawn from there.

Each names the hook points it changes (`point`: an address, a glob or a `Select`), the part of them (`heads`, `positions`, or
`at` for any axis by name), and carries its numbers in tensor fields. `apply` is pure and branch-free over those tensors, so
compiled models keep one graph for all their values. Positions are absolute: inside `generate` they mean the position in the
whole sequence; negative ones count from the end of the call. A tensor field that covers a call which the model reads in pieces is cut
likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, suggestion
from workbench.instrument.hook_points import ACTIVE, HookPoint
from workbench.instrument.selection import HookPoints, Select, Selection, as_indices

KINDS: dict[str, type["Intervention"]] = {}

SEQUENCE = ("pos", "query", "key")  # axes that count tokens, absolutely: an index beyond this call may occur in another


@dataclass
class Intervention:
    """Base of all interventions.

    Args:
        point: what to change: an address, a glob, or `Select(role=..., layer=...)`.
        heads: only these heads. positions: only these positions. at: further axes by name, e.g. `{"neuron": [3, 17]}`.
    """

    point: str | Select
    heads: int | Sequence[int] | None = field(default=None, kw_only=True)
    positions: int | Sequence[int] | None = field(default=None, kw_only=True)
    at: Mapping[str, int | Sequence[int]] | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        self.where: dict[str, Tensor] = {}
        self.bounds: dict[str, tuple[int, ...]] = {}
        self.heads = self._choose("head", self.heads)
        self.positions = self._choose("pos", self.positions)
        self.at = None if self.at is None else {axis: self._choose(axis, wanted) for axis, wanted in self.at.items()}

    def _choose(self, axis: str, wanted: Any) -> Any:
        """Note the chosen indices of an axis; returns them as plain data (a number or a list)."""
        if wanted is None:
            return None
        indices = as_indices(wanted, f"{type(self).__name__}: the choice of {axis}")
        if axis in self.bounds:
            raise HookError(
                f"{type(self).__name__} chooses {axis} twice: {list(self.bounds[axis])} and {list(indices)}."
            )
        self.bounds[axis] = indices
        self.where[axis] = torch.tensor(indices)
        return wanted if isinstance(wanted, int) else list(indices)

    def targets(self, points: HookPoints) -> Selection:
        """The selection of hook points to attach to."""
        return self.point

    def check(self, point: HookPoint) -> None:
        """Raise if the intervention cannot be attached to this hook point."""
        for axis in self.where:
            if axis not in point.axes:
                raise HookError(
                    f"{type(self).__name__} on {point.name!r} selects by {axis!r}, but its axes are {' '.join(point.axes)}."
                    f"{suggestion(axis, point.axes)}"
                )

    def chosen_in(self, shape: tuple[int, ...], point: HookPoint, offset: int) -> set[tuple[str, int]] | None:
        """The chosen (axis, index) that occur in an activation of this shape whose first token is at `offset`; None if it holds none.

        Raises:
            HookError: an index that can never occur, such as a head number too high.
        """
        found: set[tuple[str, int]] = set()
        empty = False
        for axis, indices in self.bounds.items():
            size = shape[point.axes.index(axis)]
            first, rest = offset if axis in ("pos", "query") else 0, point.rest if axis in SEQUENCE else 0
            inside = [i for i in indices if first <= (i if i >= 0 else i + first + size + rest) < first + size]
            if axis not in SEQUENCE and len(inside) < len(indices):
                bad = [i for i in indices if i not in inside]
                raise HookError(f"{type(self).__name__} on {point.name!r}: {axis} {bad} is out of range 0..{size - 1}.")
            empty = empty or not inside
            found.update((axis, i) for i in inside)
        return None if empty else found

    def mask(self, x: Tensor, point: HookPoint) -> Tensor | None:
        """True where the intervention applies, broadcastable to `x`; None for everywhere."""
        mask: Tensor | None = None
        for axis, wanted in self.where.items():
            dim = point.axes.index(axis)
            size = x.shape[dim]
            start = point.offset if axis in ("pos", "query") else 0
            end = start + size + (point.rest if axis in SEQUENCE else 0)
            wanted = wanted.to(x.device)
            absolute = torch.where(wanted < 0, wanted + end, wanted)
            here = torch.arange(start, start + size, device=x.device)
            hit = (here[:, None] == absolute[None, :]).any(-1)
            hit = hit.view([size if d == dim else 1 for d in range(x.dim())])
            mask = hit if mask is None else mask & hit
        return mask

    def where_chosen(self, x: Tensor, point: HookPoint, new: Tensor) -> Tensor:
        """`new` at the chosen places and `x` elsewhere. Never a view of `new`, which may belong to somebody."""
        mask = self.mask(x, point)
        return new.expand_as(x).clone() if mask is None else torch.where(mask, new, x)

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The changed activation: same shape, dtype and device."""
        raise TypeError(f"{type(self).__name__} does not say what it does")

    def in_words(self) -> str:
        """One line for people."""
        part = "".join(f", {axis} {list(indices)}" for axis, indices in self.bounds.items())
        return f"{type(self).__name__} {self.point}{part}"

    def to_json(self, tensors: dict[str, Tensor] | None = None, prefix: str = "") -> dict[str, Any]:
        """Plain data; tensor fields go into `tensors` under `prefix + field` and are replaced by a reference."""
        record: dict[str, Any] = {"type": type(self).__name__}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            record[item.name] = _encode(value, f"{prefix}{item.name}", tensors)
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> "Intervention":
        """Rebuild from `to_json`'s data."""
        kind = record.get("type")
        if kind not in KINDS:
            raise HookError(
                f"Unknown intervention type {kind!r}.{suggestion(str(kind), KINDS)} Known: {', '.join(sorted(KINDS))}."
            )
        known = {item.name for item in fields(KINDS[kind])}
        unknown = set(record) - known - {"type"}
        if unknown:
            name = sorted(unknown)[0]
            raise HookError(
                f"{kind} has no field {name!r}.{suggestion(name, known)} Its fields are: {', '.join(sorted(known))}."
            )
        values = {k: _decode(v, tensors or {}) for k, v in record.items() if k != "type"}
        try:
            return KINDS[kind](**values)
        except TypeError as error:  # a field without a default is missing
            raise HookError(f"This record of {kind} is not complete: {error}.") from None


def _encode(value: Any, name: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, Tensor):
        if tensors is None:
            return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[name] = value.detach().cpu().contiguous().clone()  # two fields may share one tensor; files do not
        return {"stored": name}
    if isinstance(value, Select):
        return {"select": {k: v for k, v in vars(value).items() if v is not None}}
    if isinstance(value, Mapping):
        return {"map": {k: _encode(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple, range)):
        return [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if isinstance(value, Mapping):
        if "stored" in value:
            if value["stored"] not in tensors:
                raise HookError(
                    f"The tensor {value['stored']!r} of this intervention is missing.{suggestion(value['stored'], tensors)}"
                )
            return tensors[value["stored"]]
        if "tensor" in value:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        if "select" in value:
            unknown = set(value["select"]) - {item.name for item in fields(Select)}
            if unknown:
                raise HookError(f"Select has no field {sorted(unknown)[0]!r}. Expected role, layer or name.")
            return Select(**value["select"])
        if "map" in value:
            return {k: _decode(v, tensors) for k, v in value["map"].items()}
    return value


def as_tensor(value: Any, what: str) -> Tensor:
    """A number or list of numbers in full precision, an array or a tensor as it is; converted only where it is applied.

    Raises:
        HookError: something else; the message begins with `what`.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value) if hasattr(value, "dtype") else torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise HookError(f"{what} is {type(value).__name__}. Expected a tensor or a number.") from None


def fitting(value: Any, x: Tensor, point: HookPoint, intervention: Intervention) -> Tensor:
    """A tensor field in the activation's dtype, device and shape; raises `HookError` if it does not broadcast to it."""
    assert isinstance(value, Tensor)
    try:
        return (value if ACTIVE.piece is None else ACTIVE.piece.part_of(value, x, point)).to(x).expand_as(x)
    except RuntimeError:
        raise HookError(
            f"{type(intervention).__name__} on {point.name!r}: a value of shape {tuple(value.shape)} does not fit the activation, "
            f"{tuple(x.shape)} with axes {' '.join(point.axes)}."
        ) from None
