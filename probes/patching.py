"""Activation patching and attribution patching: which activations carry the difference between two prompts?

    grid = activation_patching(model, clean, corrupted, objective, role="resid", by=("pos",))
    grid.normalised()                                  [layer, pos], 0 = nothing restored, 1 = the clean run's value restored
    guess = attribution_patching(model, clean, corrupted, objective, role="resid", by=("pos",))      one gradient instead of a run per cell
    correlation(guess, grid)

A cell is one part of one layer's activation: a position, a head, both, or all of it. *Denoising* runs the corrupted prompt with the
clean value in one cell and asks what is enough; *noising* runs the clean prompt with the corrupted value and asks what is needed
(Zhang & Nanda 2023, "Towards Best Practices of Activation Patching", arXiv 2309.16042; Meng et al. 2022; Vig et al. 2020). Either way a
cell's number is

    (m − m_corrupted) / (m_clean − m_corrupted)        of the means over the batch

so that 1 means restored when denoising, and not needed when noising.

Attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) replaces each run by the first-order guess
m_base + Σ (a_other − a_base) · ∂m/∂a_base: one forward and one backward pass for all cells. It is a guess; compare it with the exact one
on the cells that matter.

Both prompts have equally many tokens, position for position. Any role that both runs have can be patched, states included.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from probes.objectives import Objective, measured
from probes.progress import Report, watched
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.pieces import by_position
from workbench.instrument.selection import Select

DIRECTIONS = ("denoise", "noise")
AXES = ("head", "pos")
HEAD_AXES = ("head", "kv_head", "group")
Layer = int | tuple[int, int]


@dataclass(frozen=True)
class PatchingGrid:
    """The objective with each cell patched. `values` is [layer, *by, batch]: `by` names the axes between, of "head" and "pos".

    Args:
        layers: layer numbers, or (layer, step) where weights are shared over depth. names: the hook points' addresses.
        clean, corrupted: the objective of the two runs, [batch]. method: "patched", or "estimated" for attribution patching.
    """

    role: str
    by: tuple[str, ...]
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    direction: str
    method: str
    values: Tensor
    clean: Tensor
    corrupted: Tensor

    def normalised(self) -> Tensor:
        """(m − m_corrupted) / (m_clean − m_corrupted) of the means over the batch, [layer, *by].

        Raises:
            ValueError: the two runs score alike, so that there is nothing to restore.
        """
        clean, corrupted = self.clean.double().mean(), self.corrupted.double().mean()
        if not abs(clean - corrupted) > 1e-9 * max(1e-3, float(clean.abs()), float(corrupted.abs())):
            raise ValueError(
                f"Clean and corrupted prompts both score {float(clean):.4g}, so there is no difference to restore. Expected prompts on "
                "which the objective differs."
            )
        return (self.values.double().mean(-1) - corrupted) / (clean - corrupted)

    def effects(self) -> Tensor:
        """What patching changed: m minus the unpatched run's, mean over the batch, [layer, *by]."""
        base = self.corrupted if self.direction == "denoise" else self.clean
        return (self.values - base).double().mean(-1)

    def top(self, n: int = 10) -> list[tuple[Layer, tuple[int, ...], float]]:
        """The n cells whose patch changed the objective most: (layer, indices along `by`, change)."""
        effects = self.effects()
        best = effects.abs().flatten().argsort(descending=True)[:n]
        cells = [[int(i) for i in torch.unravel_index(place, effects.shape)] for place in best]
        return [(self.layers[cell[0]], tuple(cell[1:]), float(effects[tuple(cell)])) for cell in cells]

    def to_json(self) -> dict[str, Any]:
        """Means over the batch as plain numbers."""
        return {
            "role": self.role,
            "by": list(self.by),
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "names": list(self.names),
            "direction": self.direction,
            "method": self.method,
            "values": self.values.double().mean(-1).tolist(),
            "clean": float(self.clean.double().mean()),
            "corrupted": float(self.corrupted.double().mean()),
        }

    def __repr__(self) -> str:
        shape = " × ".join(f"{size} {axis}" for axis, size in zip(("layer", *self.by), self.values.shape, strict=False))
        cells = ", ".join(f"{layer}{list(place)} {change:+.3f}" for layer, place, change in self.top(3))
        return (
            f"PatchingGrid({self.method} {self.role}, {shape}, {self.direction}; clean {float(self.clean.mean()):.3f}, "
            f"corrupted {float(self.corrupted.mean()):.3f}; most: {cells})"
        )


def correlation(one: PatchingGrid, other: PatchingGrid) -> float:
    """Pearson correlation of two grids' effects, cell by cell. Raises ValueError for grids of other cells, or without variation."""
    if (one.names, one.by, one.values.shape[:-1]) != (other.names, other.by, other.values.shape[:-1]):
        raise ValueError(
            f"The grids have other cells ({one.role} {list(one.values.shape[:-1])}, {other.role} {list(other.values.shape[:-1])})."
        )
    return pearson(one.effects().flatten(), other.effects().flatten())


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two vectors. Raises ValueError if one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    if not (float(a.norm()) > 0 and float(b.norm()) > 0):
        raise ValueError("All cells are alike, so there is nothing to correlate.")
    return float((a @ b) / (a.norm() * b.norm()))


def activation_patching(
    model: Any,
    clean: Any,
    corrupted: Any,
    objective: Objective,
    *,
    role: str = "resid",
    by: Sequence[str] = ("pos",),
    layers: int | Sequence[int] | None = None,
    direction: str = "denoise",
    mask: Tensor | None = None,
    sequences: int = 64,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> PatchingGrid:
    """Run the model once for every cell, with that cell from the other prompt.

    Args:
        clean, corrupted: ids [batch, pos] or texts, equally long. objective: logits [batch, pos, vocab] -> [batch].
        role: what to patch (`"resid"`, `"z"`, `"mlp_out"`, `"pattern"`, `"state"`, …); of a pattern, `pos` is its rows.
        by: the cells are single heads, single positions, both or (empty) whole layers. layers: restrict to these.
        direction: "denoise" (clean value into the corrupted run) or "noise".
        mask: True at real tokens of both, [batch, pos]. sequences: how many are run at once, several cells side by side (speed only).
        progress: called as (fraction, message). cancel: stops before the next run with MeasurementCancelled.

    Raises:
        ValueError: prompts of unequal length, an unknown direction or axis, or one that the role lacks. UnknownHookPoint: no such role.
    """
    runs = _Runs(model, clean, corrupted, objective, role, tuple(by), layers, direction, mask)
    values = torch.empty(*runs.shape, len(runs.base), dtype=runs.scores["clean"].dtype)
    at_once = max(1, sequences // len(runs.base))
    cells_of_layer = list(product(*(range(size) for size in runs.shape[1:])))
    chunks = [
        (layer, cells_of_layer[start : start + at_once])
        for layer in range(len(runs.addresses))
        for start in range(0, len(cells_of_layer), at_once)
    ]
    with torch.no_grad():
        for layer, cells in watched(chunks, f"patching {role}", progress, cancel):
            for cell, value in zip(cells, runs.patched(layer, cells), strict=True):
                values[(layer, *cell)] = value
    return runs.grid("patched", values)


def attribution_patching(
    model: Any,
    clean: Any,
    corrupted: Any,
    objective: Objective,
    *,
    role: str = "resid",
    by: Sequence[str] = ("pos",),
    layers: int | Sequence[int] | None = None,
    direction: str = "denoise",
    mask: Tensor | None = None,
) -> PatchingGrid:
    """First-order estimate of `activation_patching`, all cells from one gradient at the run that would be patched. Arguments as there."""
    runs = _Runs(model, clean, corrupted, objective, role, tuple(by), layers, direction, mask)
    _, cache = model.run_with_cache(
        runs.base,
        names=list(runs.names),
        mask=mask,
        gradients_of=lambda logits: measured(objective, logits).sum(),
    )
    base = runs.scores[runs.base_name]
    values = []
    for address in runs.addresses:
        change = ((runs.source[address] - cache[address]) * cache.gradients[address]).detach()
        kept = runs.axes_of(address)
        others = [d for d in range(1, change.dim()) if d not in kept]
        summed = change.sum(others, keepdim=True) if others else change
        cells = summed.permute(*kept, 0, *others).flatten(len(kept))  # what was summed has size 1: [*by, batch]
        values.append(base + cells.cpu())
    return runs.grid("estimated", torch.stack(values))


class _Runs:
    """The two runs, their activations of one role, and how a cell of one is put into the other."""

    def __init__(
        self,
        model: Any,
        clean: Any,
        corrupted: Any,
        objective: Objective,
        role: str,
        by: tuple[str, ...],
        layers: int | Sequence[int] | None,
        direction: str,
        mask: Tensor | None,
    ) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(
                f"Unknown direction {direction!r}.{suggestion(direction, DIRECTIONS)} Expected 'denoise' or 'noise'."
            )
        for axis in by:
            if axis not in AXES or by.count(axis) > 1:
                raise ValueError(
                    f"by is {by!r}: {axis!r} is unknown or there twice.{suggestion(axis, AXES)} Expected some of {AXES}."
                )
        tokens = pair(model, clean, corrupted)
        self.model, self.objective, self.mask, self.role, self.by = model, objective, mask, role, by
        self.direction = direction
        self.base_name = "corrupted" if direction == "denoise" else "clean"
        self.base = tokens[self.base_name]
        self.points = points_of(model, role, layers)
        self.names = tuple(point.name for point in self.points)
        self.scores: dict[str, Tensor] = {}
        for name, ids in tokens.items():
            with torch.no_grad():
                if name == self.base_name:
                    logits = model(ids, mask=mask)
                else:
                    logits, cache = model.run_with_cache(ids, names=list(self.names), mask=mask)
                    self.source = dict(cache.items())
                    self.depth = {address: cache.depth(address) for address in cache}
                    self.point = {address: cache.point(address) for address in cache}
                self.scores[name] = measured(objective, logits)[0].cpu()
        self.addresses = sorted(self.source, key=lambda address: _order(self.depth[address]))
        shapes = {
            address: tuple(self.source[address].shape[d] for d in self.axes_of(address)) for address in self.source
        }
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"The layers have {role!r} of different shapes ({shapes}). Choose alike ones with layers=."
            )
        self.shape = (len(self.addresses), *next(iter(shapes.values())))

    def axes_of(self, address: str) -> list[int]:
        """Where the axes of `by` lie in the activation at this address."""
        point = self.point[address]
        axes = ("batch", "pos", *point.axes[1:]) if point.per_position else point.axes
        wanted = {"head": HEAD_AXES, "pos": ("pos", "query")}
        found = []
        for name in self.by:
            axis = next((axes.index(axis) for axis in wanted[name] if axis in axes), None)
            if axis is None:
                raise ValueError(
                    f"by names {name!r}, which {self.role!r} lacks: {point.name!r} has the axes {' '.join(axes)}."
                )
            found.append(axis)
        return found

    def patched(self, layer: int, cells: list[tuple[int, ...]]) -> Tensor:
        """The objective with each of these cells of a layer patched, [cell, batch]."""
        address, copies = self.addresses[layer], len(cells)
        source, axes = self.source[address], self.axes_of(address)

        def paste(x: Tensor, position: int | None) -> Tensor:
            stacked = x.unflatten(0, (copies, -1))
            for copy, cell in zip(stacked, cells, strict=True):
                where: list[Any] = [slice(None)] * source.dim()
                for axis, index in zip(axes, cell, strict=True):
                    where[axis] = index
                if position is None:
                    copy[tuple(where)] = source[tuple(where)]
                elif where[1] in (position, slice(None)):  # a state comes position by position
                    here = (where[0], *where[2:])
                    copy[here] = source[:, position][here]
            return stacked.flatten(0, 1)

        def at(position: int | None) -> Callable[[Tensor, HookPoint], Tensor]:
            return by_position(lambda x, hook: paste(x, position))

        hooks: list[Any] = [(address, at(None))]
        if self.point[address].per_position:
            along = dict(zip(self.by, range(len(self.by)), strict=True)).get("pos")
            wanted = range(source.shape[1]) if along is None else sorted({cell[along] for cell in cells})
            hooks = [(f"{address}[{position}]", at(position)) for position in wanted]
        mask = None if self.mask is None else self.mask.repeat(copies, 1)
        logits = self.model.run_with_hooks(self.base.repeat(copies, 1), mask=mask, hooks=hooks)
        return measured(self.objective, logits, copies)

    def grid(self, method: str, values: Tensor) -> PatchingGrid:
        """The result."""
        layers = tuple(self.depth[address] for address in self.addresses)
        scores = (self.scores["clean"], self.scores["corrupted"])
        return PatchingGrid(self.role, self.by, layers, tuple(self.addresses), self.direction, method, values, *scores)


def pair(model: Any, clean: Any, corrupted: Any) -> dict[str, Tensor]:
    """Both prompts as ids; raises ValueError if they do not stand position for position."""
    tokens = {"clean": model.to_tokens(clean), "corrupted": model.to_tokens(corrupted)}
    if tokens["clean"].shape != tokens["corrupted"].shape:
        raise ValueError(
            f"The clean prompts are {list(tokens['clean'].shape)} tokens [batch, pos], the corrupted ones "
            f"{list(tokens['corrupted'].shape)}. Expected pairs of equal length, position for position."
        )
    return tokens


def points_of(model: Any, role: str, layers: int | Sequence[int] | None = None) -> list[HookPoint]:
    """The main hook point of a role in each layer that has one (or outside the layers). Raises UnknownHookPoint if there is none."""
    found = [selected.point for selected in model.hook_points.resolve(Select(role=role, layer=layers))[0][1]]
    numbers = dict.fromkeys(point.layer_index for point in found)
    mains = {number: [point for point in found if point.layer_index == number] for number in numbers}
    return [next((p for p in points if p.name.endswith(f".hook_{role}")), points[0]) for points in mains.values()]


def _order(depth: Any) -> tuple[int, int]:
    """Sort key of a layer, a (layer, step), or None for outside."""
    return (depth[1], depth[0]) if isinstance(depth, tuple) else (0, -1 if depth is None else depth)
