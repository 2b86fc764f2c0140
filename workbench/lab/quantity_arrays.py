"""What a trace run keeps of special quantities (`workbench.lab.quantities`): one array [which, row, column] for each hook point.

Columns are tokens. Which of several is shown is chosen like a head: the first axis counts heads, groups or maps. Rows are what is left:
steps, blocks, clusters, types, …; or heads, where nothing else is left; or reading tokens, where columns are the tokens read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.instrument.hook_points import HookPoint
from workbench.lab.pooling import pool
from workbench.lab.quantities import ORDINARY, SIZES
from workbench.lab.run_format import OVERVIEW_SIZE
from workbench.lab.run_writer import RunWriter

LARGEST = 2**22  # cells of one quantity that are looked at; more are not kept
LARGEST_SUM = 2**25  # and of all quantities of a run together
MOST_PARTS = 8  # maps of one point that are kept, where they are not one per head
HEADS = ("head", "kv_head", "group", "map", "kv_map")
TOKENS = ("pos", "query", "key")
WIDTHS = ("d_model", "d_head", "d_value", "d_key", "d_state", "d_mlp", "channel", "unit", "state_k", "state_n")


@dataclass(frozen=True)
class QuantityPlan:
    """The hook points to keep, and those that are too large with the reason."""

    points: tuple[HookPoint, ...]
    left_out: tuple[tuple[HookPoint, str], ...]

    @property
    def addresses(self) -> list[str]:
        """What to cache: every pass, where depth shares weights."""
        return [address for point in self.points for address in _passes(point)]


def _passes(point: HookPoint) -> list[str]:
    return [point.name] if point.steps == 1 else [f"{point.name}@{step}" for step in range(point.steps)]


def plan_quantities(model: Any, layers: Sequence[int], length: int, kept: Iterable[str]) -> QuantityPlan:
    """Which hook points a run of `length` tokens keeps, of these layers and of the model as a whole; not those `kept` as something else."""
    kept, chosen, left_out, total = set(kept), [], [], 0
    for point in model.hook_points.points.values():
        axes = set(point.axes)
        tokens = axes & set(TOKENS)
        # another sequence's tokens are no columns of this text
        special = (
            point.role not in ORDINARY
            and not point.role.startswith("source_")
            and not point.name.startswith("encoder.")
        )
        if not special or point.gated or point.per_position or not tokens or point.name in kept:
            continue
        if point.layer_index is not None and point.layer_index not in layers:
            continue
        heads = 1 if point.layer_index is None else int(model.mixers[point.layer_index].describe()["n_heads"])
        cells = point.steps * heads * length ** len(tokens) * (16 if axes & set(WIDTHS) else 1)
        if len(tokens) == 2 and (cells > LARGEST or total + cells > LARGEST_SUM):
            left_out.append((point, f"Its about {cells:,} numbers for this text are too many to keep."))
            continue
        total += cells
        chosen.append(point)
    return QuantityPlan(tuple(chosen), tuple(left_out))


def add_quantities(run: RunWriter, plan: QuantityPlan, cache: Any, model: Any) -> list[dict[str, Any]]:
    """Store the planned quantities of a run's one sequence; gives the records for its manifest."""
    records = []
    for point in plan.points:
        passes = [cache[address][0] for address in _passes(point) if address in cache]
        if not passes:  # a text too short for the part to be reached
            continue
        values, axes = passes[0], list(point.axes[1:])
        if point.steps > 1:
            values, axes = torch.stack(passes), ["step", *axes]
        n_heads, adjacent = 1, True
        if point.layer_index is not None:
            mixer = model.mixers[point.layer_index]
            record = mixer.describe()
            n_heads, adjacent = int(record["n_heads"]), getattr(mixer, "maps_adjacent", True)
            # what a token cannot see has no value
            if {"query", "key"} <= set(axes) and (record["pattern"] or {}).get("causal") != "none":
                values = _lower(values, axes)
        for part, array in parts_of(values.float(), axes, point.role, n_heads, adjacent):
            if 0 in array.values.shape:
                continue
            name = f"quantity.{point.name}" + (f".{part.split()[-1]}" if part else "")
            run.add_array(name, array.values, axes=array.axes)
            records.append(
                {"point": point.name, "role": point.role, "layer": point.layer_index, "array": name, "axes": list(array.axes),
                 "part": part, "notes": list(array.notes), "why": "",
                 **({"row_shape": list(array.row_shape)} if array.row_shape else {})}
            )  # fmt: skip
    for point, why in plan.left_out:
        records.append({"point": point.name, "role": point.role, "layer": point.layer_index, "array": "", "axes": ["", "", ""],
                        "part": "", "notes": [], "why": why})  # fmt: skip
    return records


def _lower(values: Tensor, axes: list[str]) -> Tensor:
    """nan where the key is later than the query, in maps of a text with itself."""
    query, key = axes.index("query"), axes.index("key")
    if values.shape[query] != values.shape[key]:
        return values
    moved = values.movedim((query, key), (-2, -1))
    later = torch.ones(moved.shape[-2:], dtype=torch.bool, device=values.device).triu(1)
    return moved.float().masked_fill(later, float("nan")).movedim((-2, -1), (query, key))


@dataclass(frozen=True)
class Kept:
    """An array [which, row, column], the names of its axes, and how it was made, in words."""

    values: np.ndarray
    axes: tuple[str, str, str]
    notes: tuple[str, ...]
    row_shape: tuple[int, ...] = ()  # sizes of what the rows count, where it is several things


def parts_of(values: Tensor, axes: list[str], role: str, n_heads: int, adjacent: bool = True) -> list[tuple[str, Kept]]:
    """(name of the part, what is kept) of a tensor with these axes; one part without a name unless heads have several maps, or none.

    adjacent: the maps of a head follow each other; otherwise those of all heads lie one after the other.
    """
    values, axes, notes = _without_widths(values, axes, role)
    if "query" in axes and "key" in axes:
        return _maps(values, axes, notes, n_heads, adjacent)
    token = next(axis for axis in reversed(axes) if axis in TOKENS)
    head = next((axis for axis in axes if axis in HEADS), None)
    others = [axis for axis in axes if axis not in (token, head)]
    if not others:  # rows are heads, or the one number of every token
        others, head = [head] if head is not None else [], None
    order = [axes.index(axis) for axis in (*([head] if head else []), *others, token)]
    moved = values.permute(order)
    size = moved.shape[0] if head else 1
    table = moved.reshape(size, -1, moved.shape[-1])
    sizes = tuple(values.shape[axes.index(axis)] for axis in others) if len(others) > 1 else ()
    return [("", Kept(_finite(table), (head or "one", " × ".join(others) or "one", token), tuple(notes), sizes))]


def _without_widths(values: Tensor, axes: list[str], role: str) -> tuple[Tensor, list[str], list[str]]:
    """Vectors become their size or their mean; axes of one entry go."""
    notes = []
    for axis in [axis for axis in axes if axis in WIDTHS or axis == "one"]:
        place = axes.index(axis)
        if axis == "one":
            values = values.squeeze(place)
        elif role in SIZES:
            values = values.norm(dim=place)
            notes.append(f"L2 norm over {axis}")
        else:
            values = values.mean(place)
            notes.append(f"mean over {axis}")
        axes = [*axes[:place], *axes[place + 1 :]]
    return values, axes, notes


def _maps(values: Tensor, axes: list[str], notes: list[str], n_heads: int, adjacent: bool) -> list[tuple[str, Kept]]:
    """Maps of query and key, pooled as overviews are. Those of heads stay together; several per head, and others, are parts."""
    others = [axis for axis in axes if axis not in ("query", "key")]
    moved = values.permute([axes.index(axis) for axis in (*others, "query", "key")])
    maps, count = moved.reshape(-1, *moved.shape[-2:]), 1
    of_heads = len(others) == 1 and others[0] in HEADS
    if of_heads and len(maps) % n_heads == 0:
        count = len(maps) // n_heads
    if of_heads:
        groups = [
            (f"{others[0]} {i}" if count > 1 else "", "head" if count > 1 else others[0], each)
            for i, each in enumerate(maps_of_heads(maps, count, adjacent))
        ]
    else:
        named = " × ".join(others)
        groups = [(f"{named} {i}" if others else "", "one", each[None]) for i, each in enumerate(maps)]
    found = []
    for part, which, chosen in groups[:MOST_PARTS]:
        exact, words = _finite(chosen), list(notes)
        if max(exact.shape[1:]) > OVERVIEW_SIZE:
            exact = np.stack([pool(each, OVERVIEW_SIZE, OVERVIEW_SIZE, "max") for each in exact])
            words.append("pooled: largest magnitude, sign kept")
        if len(groups) > MOST_PARTS:
            words.append(f"the first {MOST_PARTS} of {len(groups)}")
        found.append((part, Kept(exact.astype(np.float32), (which, "query", "key"), tuple(words))))
    return found


def maps_of_heads(maps: Tensor, count: int, adjacent: bool) -> list[Tensor]:
    """Maps [map, …] of heads that have `count` each, as one tensor [head, …] for each of these.

    adjacent: the maps of a head follow each other; otherwise those of all heads lie one after the other.
    """
    n_heads = len(maps) // count
    return [maps[i::count] if adjacent else maps[i * n_heads : (i + 1) * n_heads] for i in range(count)]


def _finite(values: Tensor) -> np.ndarray:
    """float32, nan where nothing is."""
    array = values.detach().cpu().numpy().astype(np.float32)
    return np.where(np.isfinite(array), array, np.float32(np.nan))
