"""The interventions, and their files. What they share (choosing heads and positions, JSON) is in `intervention.py`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import ACTIVE, HookPoint
from workbench.instrument.intervention import KINDS, Intervention, as_tensor, fitting
from workbench.instrument.selection import HookPoints, Select, Selection, as_indices

__all__ = [
    "KINDS",
    "Ablate",
    "BlockEdge",
    "EditPattern",
    "EditState",
    "FreezeNorm",
    "Intervention",
    "Patch",
    "Project",
    "Scale",
    "Steer",
    "load_interventions",
    "save_interventions",
]


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.value, str) and self.value not in ("zero", "mean"):
            raise HookError(f"Ablate: value is {self.value!r}; expected 'zero', 'mean' or a tensor.")
        if not isinstance(self.value, str):
            self.value = as_tensor(self.value, "Ablate: value")

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The ablated activation."""
        if not isinstance(self.value, str):
            new = fitting(self.value, x, point, self)
        elif self.value == "zero":
            new = torch.zeros_like(x)
        elif ACTIVE.piece is not None:
            raise HookError(
                f"Ablate on {point.name!r}: this model reads the call in pieces, so the mean over its positions is not known yet. "
                "Expected a tensor, e.g. the mean of a cached run, or a call of one segment."
            )
        else:
            dims = [d for d, axis in enumerate(point.axes) if axis in ("batch", "pos", "query")]
            new = x.mean(dims, keepdim=True).expand_as(x)
        return self.where_chosen(x, point, new)


@dataclass
class Scale(Intervention):
    """Multiply by `factor` (a number or a tensor that broadcasts)."""

    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factor = as_tensor(self.factor, "Scale: factor")

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The scaled activation."""
        return self.where_chosen(x, point, x * fitting(self.factor, x, point, self))


@dataclass
class Patch(Intervention):
    """Replace by `value`, typically the same activation cached in another run. It must broadcast to the activation."""

    value: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is None:
            raise HookError(
                f"Patch on {self.point!r} has no value. Expected a tensor, e.g. clean_cache[{self.point!r}]."
            )
        self.value = as_tensor(self.value, "Patch: value")

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The patched activation."""
        assert self.value is not None
        return self.where_chosen(x, point, fitting(self.value, x, point, self))


@dataclass
class Steer(Intervention):
    """Add `coefficient` times `direction` (a vector along the last axis, or anything that broadcasts)."""

    direction: Tensor | None = None
    coefficient: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coefficient = as_tensor(self.coefficient, "Steer: coefficient")
        if self.direction is None:
            raise HookError("Steer has no direction. Expected a tensor along the last axis of the hook point.")
        self.direction = as_tensor(self.direction, "Steer: direction")

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The steered activation."""
        assert isinstance(self.direction, Tensor) and isinstance(self.coefficient, Tensor)
        added = self.coefficient.to(x) * self.direction.to(x)
        return self.where_chosen(x, point, x + fitting(added, x, point, self))


@dataclass
class Project(Intervention):
    """Remove the span of `directions` [n, width] from the last axis, or keep only that span (`keep=True`)."""

    directions: Tensor | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions is None:
            raise HookError("Project has no directions. Expected a tensor [n, width].")
        self.directions = as_tensor(self.directions, "Project: directions")
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
        self.queries = self._choose("query", self.queries)
        self.keys = self._choose("key", self.keys)
        self.value = as_tensor(self.value, f"{type(self).__name__}: value")

    def check(self, point: HookPoint) -> None:
        """Refuse what is no pattern."""
        super().check(point)
        if point.axes[-2:] != ("query", "key"):
            raise HookError(
                f"{type(self).__name__} edits patterns (axes batch head query key); {point.name!r} has axes {' '.join(point.axes)}."
            )

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The edited pattern."""
        edited = self.where_chosen(x, point, fitting(self.value, x, point, self))
        renormalise = self.renormalise
        if renormalise is None:
            renormalise = point.meta is not None and point.meta.is_distribution
        if renormalise:
            before, after = x.sum(-1, keepdim=True), edited.sum(-1, keepdim=True)
            edited = torch.where(after.abs() > 1e-30, edited * (before / after), edited)
        return edited


@dataclass
class BlockEdge(EditPattern):
    """Cut reading: the chosen heads' `queries` no longer read the `keys`. Softmax rows share the freed mass out (= masking the score).

    A row that loses all its sources reads nothing: zeros.
    """

    renormalise: bool | None = field(default=None, kw_only=True)


@dataclass
class EditState(Intervention):
    """Change the state that a recurrent mixer hands on after a token; the change propagates to all later tokens.

    Args:
        layer: layer (or layers) whose state is changed.
        after: position(s): the edit happens once this token has been read and written.
        operation: `"scale"` (0 resets), `"set"`, `"add"`, or `"erase"`: what the state answers to some keys becomes zero.
        value: number or tensor that broadcasts to the state; to erase, keys [..., state_k, n] whose other axes broadcast to the state's.
    """

    OPERATIONS = ("scale", "set", "add", "erase")

    point: str | Select = ""
    layer: int | Sequence[int] | None = field(default=None, kw_only=True)
    after: int | Sequence[int] | None = field(default=None, kw_only=True)
    operation: str = field(default="scale", kw_only=True)
    value: float | Tensor = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.point:
            self.point = Select(role="state", layer=self.layer)
        super().__post_init__()
        if self.operation not in self.OPERATIONS:
            raise HookError(
                f"EditState: unknown operation {self.operation!r}.{suggestion(self.operation, self.OPERATIONS)} "
                f"Expected one of {', '.join(self.OPERATIONS)}."
            )
        if self.after is not None:
            as_indices(self.after, "EditState: after")
        self.value = as_tensor(self.value, "EditState: value")
        if self.operation == "erase":
            self.basis = torch.linalg.qr(torch.atleast_2d(self.value).double()).Q

    @property
    def after_positions(self) -> tuple[int, ...] | None:
        """Positions to stop at, None for every one."""
        return None if self.after is None else as_indices(self.after, "EditState: after")

    def check(self, point: HookPoint) -> None:
        """Refuse what is no state."""
        super().check(point)
        if not point.per_position:
            raise HookError(
                f"EditState edits states after a token; {point.name!r} ({' '.join(point.axes)}) is no state. "
                "Expected e.g. EditState(layer=0, after=5), or another intervention for this hook point."
            )

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
        if self.operation == "erase":
            basis = self.basis.to(x)
            return self.where_chosen(x, point, x - basis @ (basis.mT @ x))
        value = fitting(self.value, x, point, self)
        new = x * value if self.operation == "scale" else x + value if self.operation == "add" else value
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
        value = self.values[point.name] if point.name in self.values else self.values[f"{point.name}@{point.step}"]
        return fitting(value, x, point, self).clone()

    def in_words(self) -> str:
        """One line for people."""
        return f"FreezeNorm of {len(self.values or {})} normalisations"
