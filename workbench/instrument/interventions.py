"""Interventions: small declarative objects that change a run, are written to JSON + safetensors, and drawn from there.

Each names the hook points it changes (`point`: an address, a glob or a `Select`), the part of them (`heads`, `positions`, or
`at` for any axis by name), and carries its numbers in tensor fields. `apply` is pure and branch-free over those tensors, so
compiled models keep one graph for all their values. Positions are absolute: inside `generate` they mean the position in the
whole sequence; negative ones count from the end of the call.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.selection import HookPoints, Select, Selection

KINDS: dict[str, type["Intervention"]] = {}


def _indices(wanted: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if wanted is None else (wanted,) if isinstance(wanted, int) else tuple(int(i) for i in wanted)


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

    edits_in_place_of: ClassVar[str] = "the activation"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        self.where: dict[str, Tensor] = {}
        self.bounds: dict[str, tuple[int, ...]] = {}
        chosen = {"head": self.heads, "pos": self.positions, **(self.at or {})}
        for axis, wanted in chosen.items():
            indices = _indices(wanted)
            if indices is not None:
                if not indices:
                    raise HookError(
                        f"{type(self).__name__}: an empty list of {axis} selects nothing. Expected at least one index."
                    )
                self.bounds[axis] = indices
                self.where[axis] = torch.tensor(indices)

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

    def touches(self, x: Tensor, point: HookPoint) -> bool:
        """Whether the chosen indices occur in `x`. Raises for indices that can never occur (a head number too high)."""
        for axis, indices in self.bounds.items():
            size = x.shape[point.axes.index(axis)]
            start = point.offset if axis in ("pos", "query") else 0
            inside = [start <= i < start + size or -size <= i < 0 for i in indices]
            if axis not in ("pos", "query", "key") and not all(inside):
                bad = [i for i, ok in zip(indices, inside, strict=True) if not ok]
                raise HookError(f"{type(self).__name__} on {point.name!r}: {axis} {bad} is out of range 0..{size - 1}.")
            if not any(inside):
                return False
        return True

    def mask(self, x: Tensor, point: HookPoint) -> Tensor | None:
        """True where the intervention applies, broadcastable to `x`; None for everywhere."""
        mask: Tensor | None = None
        for axis, wanted in self.where.items():
            dim = point.axes.index(axis)
            size = x.shape[dim]
            start = point.offset if axis in ("pos", "query") else 0
            wanted = wanted.to(x.device)
            absolute = torch.where(wanted < 0, wanted + start + size, wanted)
            here = torch.arange(start, start + size, device=x.device)
            hit = (here[:, None] == absolute[None, :]).any(-1)
            hit = hit.view([size if d == dim else 1 for d in range(x.dim())])
            mask = hit if mask is None else mask & hit
        return mask

    def where_chosen(self, x: Tensor, point: HookPoint, new: Tensor) -> Tensor:
        """`new` at the chosen places and `x` elsewhere."""
        mask = self.mask(x, point)
        return new if mask is None else torch.where(mask, new, x)

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
        return KINDS[kind](**{k: _decode(v, tensors or {}) for k, v in record.items() if k != "type"})


def _encode(value: Any, name: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, Tensor):
        if tensors is None:
            return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[name] = value.detach().cpu().contiguous()
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
            return Select(**value["select"])
        if "map" in value:
            return {k: _decode(v, tensors) for k, v in value["map"].items()}
    return value


def save_interventions(interventions: Iterable[Intervention], stem: str | Path) -> tuple[Path, Path]:
    """Write `<stem>.json` and `<stem>.safetensors` (temporary names first, the JSON last, so that a readable JSON is complete)."""
    from safetensors.torch import save_file

    stem = Path(stem)
    tensors: dict[str, Tensor] = {}
    records = [item.to_json(tensors, prefix=f"{number}.") for number, item in enumerate(interventions)]
    data, text = Path(f"{stem}.safetensors"), Path(f"{stem}.json")
    save_file(tensors, f"{data}.tmp")
    Path(f"{data}.tmp").replace(data)
    Path(f"{text}.tmp").write_text(json.dumps({"format": 1, "interventions": records}, indent=1))
    Path(f"{text}.tmp").replace(text)
    return text, data


def load_interventions(stem: str | Path) -> list[Intervention]:
    """Read what `save_interventions` wrote."""
    from safetensors.torch import load_file

    record = json.loads(Path(f"{stem}.json").read_text())
    if record.get("format") != 1:
        raise HookError(f"{stem}.json has format {record.get('format')!r}; expected 1.")
    tensors = load_file(f"{stem}.safetensors")
    return [Intervention.from_json(item, tensors) for item in record["interventions"]]


@dataclass
class Ablate(Intervention):
    """Replace by zero (default), by the mean over batch and positions of this run (`"mean"`), or by a given tensor that broadcasts."""

    value: str | Tensor = "zero"

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The ablated activation."""
        if isinstance(self.value, Tensor):
            new = self.value.to(x).expand_as(x)
        elif self.value == "zero":
            new = torch.zeros_like(x)
        elif self.value == "mean":
            dims = [d for d, axis in enumerate(point.axes) if axis in ("batch", "pos", "query")]
            new = x.mean(dims, keepdim=True).expand_as(x)
        else:
            raise HookError(f"Ablate: value is {self.value!r}; expected 'zero', 'mean' or a tensor.")
        return self.where_chosen(x, point, new)


@dataclass
class Scale(Intervention):
    """Multiply by `factor` (a number or a tensor that broadcasts)."""

    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factor = torch.as_tensor(self.factor)

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The scaled activation."""
        return self.where_chosen(x, point, x * torch.as_tensor(self.factor).to(x))


@dataclass
class Patch(Intervention):
    """Replace by `value`, typically the same activation cached in another run. It must broadcast to the activation."""

    value: Tensor | None = None

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The patched activation."""
        if self.value is None:
            raise HookError(
                f"Patch on {point.name!r} has no value. Expected a tensor, e.g. clean_cache[{point.name!r}]."
            )
        try:
            new = self.value.to(x).expand_as(x)
        except RuntimeError:
            raise HookError(
                f"Patch on {point.name!r}: a value of shape {tuple(self.value.shape)} does not fit the activation, "
                f"{tuple(x.shape)} with axes {' '.join(point.axes)}."
            ) from None
        return self.where_chosen(x, point, new)


@dataclass
class Steer(Intervention):
    """Add `coefficient` times `direction` (a vector along the last axis, or anything that broadcasts)."""

    direction: Tensor | None = None
    coefficient: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coefficient = torch.as_tensor(self.coefficient)
        if self.direction is None:
            raise HookError("Steer has no direction. Expected a tensor along the last axis of the hook point.")

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The steered activation."""
        assert self.direction is not None
        return self.where_chosen(x, point, x + torch.as_tensor(self.coefficient).to(x) * self.direction.to(x))


@dataclass
class Project(Intervention):
    """Remove the span of `directions` [n, width] from the last axis, or keep only that span (`keep=True`)."""

    directions: Tensor | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions is None:
            raise HookError("Project has no directions. Expected a tensor [n, width].")
        rows = torch.atleast_2d(self.directions)
        if rows.shape[0] > rows.shape[1] or int(torch.linalg.matrix_rank(rows.double())) < rows.shape[0]:
            raise HookError(
                f"Project: the {rows.shape[0]} directions of width {rows.shape[1]} are not linearly independent."
            )
        self.basis = torch.linalg.qr(rows.double().T).Q.T.to(rows.dtype)

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The projected activation."""
        basis = self.basis.to(x)
        inside = (x @ basis.T) @ basis
        return self.where_chosen(x, point, inside if self.keep else x - inside)


@dataclass
class EditPattern(Intervention):
    """Set entries of a pattern: those of the chosen heads, `queries` and `keys` get `value`.

    Args:
        point: an address of a pattern; or give `layer` instead.
        renormalise: rescale the edited rows to their former sum (None: only where rows are distributions).
    """

    point: str | Select = ""
    layer: int | Sequence[int] | None = field(default=None, kw_only=True)
    queries: int | Sequence[int] | None = field(default=None, kw_only=True)
    keys: int | Sequence[int] | None = field(default=None, kw_only=True)
    value: float | Tensor = field(default=0.0, kw_only=True)
    renormalise: bool | None = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.point:
            self.point = Select(role="pattern", layer=self.layer)
        super().__post_init__()
        for axis, wanted in {"query": self.queries, "key": self.keys}.items():
            indices = _indices(wanted)
            if indices is not None:
                self.bounds[axis], self.where[axis] = indices, torch.tensor(indices)
        self.value = torch.as_tensor(self.value)

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The edited pattern."""
        edited = self.where_chosen(x, point, torch.as_tensor(self.value).to(x).expand_as(x))
        renormalise = self.renormalise
        if renormalise is None:
            renormalise = point.meta is not None and point.meta.is_distribution
        if renormalise:
            before, after = x.sum(-1, keepdim=True), edited.sum(-1, keepdim=True)
            edited = torch.where(after.abs() > 1e-30, edited * (before / after), edited)
        return edited


@dataclass
class BlockEdge(EditPattern):
    """Cut reading: the chosen heads' `queries` no longer read the `keys`. Softmax rows share the freed mass out (= masking the score)."""

    renormalise: bool | None = field(default=None, kw_only=True)


@dataclass
class EditState(Intervention):
    """Change the state that a recurrent mixer hands on after a token; the change propagates to all later tokens.

    Args:
        layer: layer (or layers) whose state is changed.
        after: position(s): the edit happens once this token has been read and written.
        operation: `"scale"` (0 resets), `"set"`, or `"add"`.
        value: number or tensor that broadcasts to `batch head state_k state_v`.
    """

    point: str | Select = ""
    layer: int | Sequence[int] | None = field(default=None, kw_only=True)
    after: int | Sequence[int] | None = field(default=None, kw_only=True)
    operation: str = field(default="scale", kw_only=True)
    value: float | Tensor = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.point:
            self.point = Select(role="state", layer=self.layer)
        super().__post_init__()
        if self.operation not in ("scale", "set", "add"):
            raise HookError(
                f"EditState: unknown operation {self.operation!r}.{suggestion(self.operation, ('scale', 'set', 'add'))} "
                "Expected scale, set or add."
            )
        self.value = torch.as_tensor(self.value)

    @property
    def after_positions(self) -> tuple[int, ...] | None:
        """Positions to stop at, None for every one."""
        return _indices(self.after)

    def targets(self, points: HookPoints) -> Selection:
        """State points of the layer; an error in words where the model carries no editable state."""
        if isinstance(self.point, Select) and "state" not in points.roles:
            raise UnknownHookPoint(
                "EditState: this model has no recurrent state to edit (softmax attention keeps a cache of keys and values instead; "
                f"edit 'hook_k' and 'hook_v'). Its roles are: {', '.join(points.roles)}."
            )
        return self.point

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The edited state."""
        value = torch.as_tensor(self.value).to(x)
        new = x * value if self.operation == "scale" else x + value if self.operation == "add" else value.expand_as(x)
        return self.where_chosen(x, point, new)

    def in_words(self) -> str:
        """One line for people."""
        return f"{super().in_words()} {self.operation} after {list(self.after_positions) if self.after_positions else 'every token'}"


@dataclass
class FreezeNorm(Intervention):
    """Use the normalisation scales of another run, so that everything between them is linear: `FreezeNorm(values=cache.by_address(...))`.

    Args:
        values: cached scales by hook-point name (every `hook_scale` of the model, or of some layers).
    """

    point: str | Select = ""
    values: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.values:
            raise HookError(
                "FreezeNorm has no values. Expected cached scales by name, e.g. FreezeNorm.from_cache(cache)."
            )

    @classmethod
    def from_cache(cls, cache: Any) -> "FreezeNorm":
        """All `norm_scale` activations of a cache."""
        scales = {name: tensor for name, tensor in cache.items() if cache.point(name).role == "norm_scale"}
        if not scales:
            raise UnknownHookPoint(
                "The cache holds no norm scales. Cache them: run_with_cache(tokens, names=Select(role='norm_scale'))."
            )
        return cls(values=scales)

    def targets(self, points: HookPoints) -> Selection:
        """The names that have a value."""
        assert self.values is not None
        return list(self.values)

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The frozen scale."""
        assert self.values is not None
        return self.values[point.name].to(x).expand_as(x)

    def in_words(self) -> str:
        """One line for people."""
        return f"FreezeNorm of {len(self.values or {})} normalisations"
