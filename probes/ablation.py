"""Taking heads or neurons away: how much worse a model predicts without each, and whether a set matters more than a random one of its size.

    effects = ablation_effects(model, tokens, "head", method="mean", reference=other_tokens)
    effects.best(5)                                   [(layer, head, Δ), ...]
    effects.interval(1, 3)                            bootstrap over sequences
    ablate_set(model, tokens, "head", [(1, 0), (1, 3)], controls=20)      and what random sets of the same layers do

What is put in a unit's place decides what is measured. `"zero"` leaves the norm behind it a value it has never seen; `"mean"` takes out
what the unit tells about this text, and keeps what it always says (mean over the reference texts at each position); `"resample"` puts in
what it said at the same position of another reference text, so that everything stays as usual in size. They disagree, and none is the
right one.

Heads are taken at hook points of role `z`; neurons at `mlp_post`, or at `neuron_gated` (BDH's y), where neuron h·N + j is neuron j of
head h.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from threading import Event
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.intervals import Interval, mean_interval
from probes.progress import Report, T, watched
from workbench.instrument.errors import UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point
from workbench.instrument.interventions import Ablate, Intervention, Patch

METHODS = ("zero", "mean", "resample")
KINDS = {
    "head": ("z",),
    "neuron": ("mlp_post", "neuron_gated"),
}  # kind of unit: roles it is found by, the first that a layer has
Unit = tuple[int, int]  # (layer, head), or (layer, neuron)
Metric = Callable[[Tensor, Tensor], Tensor]  # logits [batch, pos, vocab], tokens [batch, pos] -> [batch]


@dataclass(frozen=True)
class AblationEffects:
    """Result of `ablation_effects`. Δ is the metric without a unit minus with it; for the loss, in nats per token.

    Args:
        kind, method: of units, and what took their place. units: (layer, number). clean: [sequence]. ablated: [unit, sequence].
        weights: how many tokens each sequence's number is a mean of, [sequence].
    """

    kind: str
    method: str
    units: tuple[Unit, ...]
    clean: NDArray[np.float64]
    ablated: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def deltas(self) -> NDArray[np.float64]:
        """Δ of each unit, [unit]."""
        return np.asarray(np.average(self.ablated - self.clean, axis=1, weights=self.weights))

    def interval(self, layer: int, number: int, level: float = 0.95, seed: int = 0) -> Interval:
        """Bootstrap interval of one unit's Δ over sequences."""
        if (layer, number) not in self.units:
            raise KeyError(
                f"{self.kind} {layer}.{number} was not measured. Measured: {len(self.units)}, among them {self.units[:4]}."
            )
        row = self.ablated[self.units.index((layer, number))]
        return mean_interval(row - self.clean, weights=self.weights, level=level, seed=seed)

    def best(self, n: int = 5) -> list[tuple[int, int, float]]:
        """The n units that are missed most, as (layer, number, Δ)."""
        order = np.argsort(-self.deltas, kind="stable")[:n]
        return [(*self.units[i], float(self.deltas[i])) for i in order]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        intervals = [self.interval(*unit) for unit in self.units]
        rows = [
            {"layer": layer, "number": number, "delta": float(delta), "interval": [found.low, found.high]}
            for (layer, number), delta, found in zip(self.units, self.deltas, intervals, strict=True)
        ]
        clean = float(np.average(self.clean, weights=self.weights))
        return {"kind": self.kind, "method": self.method, "clean": clean, "units": rows}

    def __repr__(self) -> str:
        best = ", ".join(f"{layer}.{number} {delta:+.3f}" for layer, number, delta in self.best(4))
        return f"AblationEffects({len(self.units)} {self.kind}s, {self.method}; missed most: {best})"


@dataclass(frozen=True)
class SetAblation:
    """Result of `ablate_set`.

    Args:
        units: the set. delta, interval: Δ without all of it, with a bootstrap interval over sequences.
        controls: Δ without each random set, [control]. p: (1 + controls at least as large as delta) / (1 + controls).
    """

    kind: str
    method: str
    units: tuple[Unit, ...]
    delta: float
    interval: Interval
    controls: NDArray[np.float64]

    @property
    def p(self) -> float:
        """Share of sets, this one among them, that are missed at least as much."""
        return float((1 + (self.controls >= self.delta).sum()) / (1 + len(self.controls)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": self.kind, "method": self.method, "units": [list(unit) for unit in self.units], "delta": self.delta,
            "interval": [self.interval.low, self.interval.high], "controls": self.controls.tolist(), "p": self.p,
        }  # fmt: skip

    def __repr__(self) -> str:
        low, high = (self.controls.min(), self.controls.max()) if len(self.controls) else (np.nan, np.nan)
        return (
            f"SetAblation({len(self.units)} {self.kind}s, {self.method}: Δ {self.delta:+.4f} {self.interval}; "
            f"{len(self.controls)} random sets {low:+.4f} to {high:+.4f}, p = {self.p:.3g})"
        )


def units_of(model: Any, kind: str, layers: int | Sequence[int] | None = None) -> list[Unit]:
    """All units of a kind in some layers (None: in every layer that has any).

    Raises:
        ValueError: an unknown kind. UnknownHookPoint: a layer that was asked for, or a whole model, without such units.
    """
    wanted = list(range(model.n_layers)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    found: list[Unit] = []
    for layer in wanted:
        if not -model.n_layers <= layer < model.n_layers:
            raise ValueError(f"Layer {layer} is out of range: this model has layers 0..{model.n_layers - 1}.")
        layer %= model.n_layers
        if layers is None and unit_point_or_none(model, kind, layer) is None:
            continue
        found += [(layer, number) for number in range(prod(unit_sizes(model, kind, layer).values()))]
    if not found:
        raise UnknownHookPoint(f"No layer of this model has a hook point for {kind}s (roles {', '.join(KINDS[kind])}).")
    return found


class AblationOptions(TypedDict, total=False):
    """What `ablation_effects` and `ablate_set` share.

    method: what takes a unit's place (`"zero"`, the `"mean"` of the reference texts at that position, or a `"resample"`d one of them).
    reference: texts of the same length that means and samples come from (None: the texts themselves). metric: what to compare, one number
    per sequence (None: the loss). mask: True at real tokens (`"zero"` only: padded texts have no common positions to average at).
    batch_size: texts read at once. seed: of samples and controls. hooks: on all runs. progress, cancel: as everywhere.
    """

    method: str
    reference: Any
    metric: Metric | None
    mask: Tensor | None
    batch_size: int
    seed: int
    hooks: Sequence[Any]
    progress: Report | None
    cancel: Event | None


def ablation_effects(
    model: Any, tokens: Any, kind: str = "head", units: Sequence[Unit] | None = None, **options: Unpack[AblationOptions]
) -> AblationEffects:
    """Δ of every unit of a kind (or some), one at a time.

    Args:
        tokens: [sequence, pos], or text. options: see `AblationOptions`; the method is `"zero"` unless told otherwise.

    Raises:
        ValueError: an unknown kind or method, a reference of another length, a mask with another method than zero. TypeError: an unknown
        option. MeasurementCancelled: `cancel` was set.
    """
    job = _Job(model, tokens, kind, options)
    chosen = units_of(model, kind) if units is None else [job.checked(unit) for unit in units]
    clean = job.measure(())
    rows = [job.measure((unit,)) for unit in job.watched(chosen, f"without each {kind}")]
    return AblationEffects(kind, job.method, tuple(chosen), clean, np.stack(rows), job.weights)


def ablate_set(
    model: Any, tokens: Any, kind: str, units: Sequence[Unit], *, controls: int = 20, **options: Unpack[AblationOptions]
) -> SetAblation:
    """Δ without all of a set, beside Δ without random sets of as many units of the same layers, none of them in the set.

    Arguments as for `ablation_effects`. Raises ValueError where a layer has too few other units to draw a control from.
    """
    job = _Job(model, tokens, kind, options)
    chosen = tuple(dict.fromkeys(job.checked(unit) for unit in units))
    if not chosen:
        raise ValueError(f"The set of {kind}s is empty. Expected at least one (layer, number).")
    others: dict[int, list[Unit]] = {}
    for layer in dict.fromkeys(layer for layer, _ in chosen):
        others[layer] = [unit for unit in units_of(model, kind, layer) if unit not in chosen]
        taken = sum(unit[0] == layer for unit in chosen)
        if controls and len(others[layer]) < taken:
            raise ValueError(
                f"Layer {layer} has {len(others[layer])} {kind}s outside the set, too few for a control of {taken}. "
                "Expected a smaller set, or controls=0."
            )
    rng = np.random.default_rng(job.seed)
    clean, without, drawn = job.measure(()), job.measure(chosen), []
    for _ in job.watched(range(controls), "random sets"):
        control: list[Unit] = []
        for layer, pool in others.items():
            count = sum(unit[0] == layer for unit in chosen)
            control += [pool[i] for i in rng.choice(len(pool), count, replace=False)]
        drawn.append(np.average(job.measure(control) - clean, weights=job.weights))
    difference = without - clean
    interval = mean_interval(difference, weights=job.weights, seed=job.seed)
    return SetAblation(
        kind, job.method, chosen, float(np.average(difference, weights=job.weights)), interval, np.asarray(drawn)
    )


class _Job:
    """Runs the model without some units, sequence by sequence; what replaces them is read once for each layer."""

    def __init__(self, model: Any, tokens: Any, kind: str, options: AblationOptions) -> None:
        _check_kind(kind)
        known = AblationOptions.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(
                    f"Unknown option {name!r}.{suggestion(name, known)} Expected one of {', '.join(known)}."
                )
        method, reference, mask = options.get("method", "zero"), options.get("reference"), options.get("mask")
        metric, seed = options.get("metric"), options.get("seed", 0)
        if method not in METHODS:
            raise ValueError(
                f"Unknown method {method!r}.{suggestion(method, METHODS)} Expected one of {', '.join(METHODS)}."
            )
        self.model, self.kind, self.method, self.metric = model, kind, method, metric
        self.tokens: Tensor = model.to_tokens(tokens)
        self.reference: Tensor = self.tokens if reference is None else model.to_tokens(reference)
        self.mask, self.batch_size, self.hooks = mask, options.get("batch_size", 16), list(options.get("hooks", ()))
        self.seed, self.progress, self.cancel = seed, options.get("progress"), options.get("cancel")
        if method != "zero" and mask is not None:
            raise ValueError(
                f"method={method!r} compares positions across texts, which padding shifts. Expected method='zero', or texts of one length."
            )
        if method != "zero" and self.reference.shape[1] != self.tokens.shape[1]:
            raise ValueError(
                f"The reference texts have {self.reference.shape[1]} tokens and the texts {self.tokens.shape[1]}. Expected one length."
            )
        if mask is not None and mask.shape != self.tokens.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(self.tokens.shape)}.")
        if metric is None:
            real = torch.ones_like(self.tokens, dtype=torch.bool) if mask is None else mask.bool()
            self.targets = real[:, 1:] & real[:, :-1]
            self.weights = self.targets.sum(1).double().cpu().numpy()
        else:
            self.weights = np.ones(len(self.tokens))
        self.samples = np.random.default_rng(seed).integers(0, len(self.reference), len(self.tokens))
        if reference is None and method == "resample" and len(self.tokens) > 1:  # never its own text
            shift = np.random.default_rng(seed).integers(1, len(self.tokens), len(self.tokens))
            self.samples = (np.arange(len(self.tokens)) + shift) % len(self.tokens)
        self.stored: dict[str, Tensor] = {}
        self.sizes: dict[int, dict[str, int]] = {}

    def watched(self, items: Sequence[T], what: str) -> Iterator[T]:
        """The items one by one, with progress and cancelling."""
        return watched(items, what, self.progress, self.cancel)

    def checked(self, unit: Unit) -> Unit:
        layer, number = unit
        if not -self.model.n_layers <= layer < self.model.n_layers:
            raise ValueError(f"Layer {layer} is out of range: this model has layers 0..{self.model.n_layers - 1}.")
        count = prod(self._sizes(layer % self.model.n_layers).values())
        if not 0 <= number < count:
            raise ValueError(f"There is no {self.kind} {number} in layer {layer}: it has 0..{count - 1}.")
        return layer % self.model.n_layers, number

    def measure(self, units: Sequence[Unit]) -> NDArray[np.float64]:
        """The metric of each sequence without the units, [sequence]."""
        found = []
        for start in range(0, len(self.tokens), self.batch_size):
            rows = slice(start, start + self.batch_size)
            tokens = self.tokens[rows]
            padding = {} if self.mask is None else {"mask": self.mask[rows]}
            edits = [edit for unit in units for edit in self._edits(unit, rows)]
            with torch.no_grad():
                if self.metric is not None:
                    logits = self.model.run_with_hooks(tokens, hooks=[*self.hooks, *edits], **padding)
                    found.append(self._checked_metric(self.metric(logits, tokens), len(tokens)))
                    continue
                loss = self.model.run_with_hooks(
                    tokens, hooks=[*self.hooks, *edits], return_type="loss", loss_per_token=True, **padding
                ).double()
                targets = self.targets[rows]
                found.append(((loss * targets).sum(1) / targets.sum(1).clamp(min=1)).cpu())
        return torch.cat(found).numpy()

    @staticmethod
    def _checked_metric(values: Any, count: int) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != (count,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"The metric gave {shape}; expected one number for each of {count} sequences, [batch].")
        return values.double().cpu()

    def _edits(self, unit: Unit, rows: slice) -> list[Intervention]:
        layer, number = unit
        point = unit_point(self.model, self.kind, layer)
        where = unit_place(self._sizes(layer), number)
        if self.method == "zero":
            return [Ablate(point.name, **where)]
        edits: list[Intervention] = []
        for address in addresses_of(point):
            values = self._values(address, point)
            if self.method == "mean":
                edits.append(Ablate(address, value=values.mean(0, keepdim=True), **where))
            else:
                edits.append(Patch(address, value=values[torch.from_numpy(self.samples[rows])], **where))
        return edits

    def _sizes(self, layer: int) -> dict[str, int]:
        if layer not in self.sizes:
            self.sizes[layer] = unit_sizes(self.model, self.kind, layer)
        return self.sizes[layer]

    def _values(self, address: str, point: HookPoint) -> Tensor:
        """The activations of all reference texts at one address, [sequence, ...], read once."""
        if address not in self.stored:
            parts = []
            for start in range(0, len(self.reference), self.batch_size):
                some = self.reference[start : start + self.batch_size]
                with torch.no_grad():
                    _, cache = self.model.run_with_cache(some, names=address, hooks=self.hooks)
                parts.append(cache[address])
            self.stored[address] = torch.cat(parts)
        return self.stored[address]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of unit {kind!r}.{suggestion(kind, KINDS)} Expected one of {', '.join(KINDS)}.")


def unit_point_or_none(model: Any, kind: str, layer: int) -> HookPoint | None:
    """The same, or None."""
    _check_kind(kind)
    points = list(model.hook_points.points.values())
    found = (main_point(points, role, layer) for role in KINDS[kind])
    point = next((point for point in found if point is not None), None)
    return None if point is not None and kind == "head" and "head" not in point.axes else point


def unit_point(model: Any, kind: str, layer: int) -> HookPoint:
    """The hook point of a layer that the units of a kind are taken at. UnknownHookPoint where the layer has none."""
    point = unit_point_or_none(model, kind, layer)
    if point is None:
        roles = sorted({p.role for p in model.hook_points.points.values() if p.layer_index == layer})
        raise UnknownHookPoint(
            f"Layer {layer} has no {kind}s to take away (no hook point of role {' or '.join(KINDS[kind])} with such an axis). "
            f"Its roles: {', '.join(roles)}."
        )
    return point


def unit_sizes(model: Any, kind: str, layer: int) -> dict[str, int]:
    """The sizes of the unit's axes, in order, as its hook point shows them on a short text: their product is the number of units."""
    point = unit_point(model, kind, layer)
    address = addresses_of(point)[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.zeros(1, 2, dtype=torch.long, device=model.device), names=address)
    shape = dict(zip(point.axes, cache[address].shape, strict=True))
    wanted = ("head",) if kind == "head" else ("head", point.axes[-1])
    return {axis: int(shape[axis]) for axis in wanted if axis in shape}


def unit_place(sizes: dict[str, int], number: int) -> dict[str, Any]:
    """The part of an activation that is one unit."""
    at = dict(zip(sizes, np.unravel_index(number, tuple(sizes.values())), strict=True))
    return {"at": {axis: [int(index)] for axis, index in at.items()}}


def addresses_of(point: HookPoint) -> list[str]:
    """One address per pass, where depth shares weights."""
    return [point.name] if point.steps == 1 else [f"{point.name}@{step}" for step in range(point.steps)]
