"""The stacks of blocks that a trace run keeps: the model's own, which reads the text, and an encoder's, which reads the source.

An encoder-decoder says which mixers its encoder has (`source_mixers`). Its hook points are `encoder.…` and their roles begin with
`source_`; its arrays in a run begin with `encoder.`, so that what is stored of it is a trace of its own (`Run.encoder`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point
from workbench.lab.run_format import ENCODER_PREFIX
from workbench.lab.run_writer import RunWriter

_ENCODER_BLOCK = re.compile(rf"{re.escape(ENCODER_PREFIX)}blocks\.(\d+)\.")
_SOURCE_ROLE = "source_"


@dataclass(frozen=True)
class Stack:
    """Blocks with one sequence mixer each, and the text that they read.

    all_points: every hook point of the model. layers: those that are kept. length: tokens of the text. n_source: tokens of the source that
    cross-attention reads.
    """

    mixers: Sequence[Any]
    all_points: Sequence[HookPoint]
    layers: Sequence[int]
    length: int
    n_source: int = 0
    encoder: bool = False

    @property
    def prefix(self) -> str:
        """What names of arrays in a run begin with."""
        return ENCODER_PREFIX if self.encoder else ""

    @property
    def words(self) -> str:
        """What one of its blocks is called."""
        return "encoder layer" if self.encoder else "layer"

    def layer_of(self, point: HookPoint) -> int | None:
        """The layer of this stack that a point belongs to; None for one outside its blocks."""
        if not self.encoder:
            return point.layer_index
        found = _ENCODER_BLOCK.match(point.name)
        return int(found[1]) if found else None

    def role_of(self, point: HookPoint) -> str:
        """Its role as it is called in a model of its own."""
        return point.role.removeprefix(_SOURCE_ROLE) if self.encoder else point.role

    def points(self, layer: int) -> list[HookPoint]:
        """The hook points of a layer."""
        return [point for point in self.all_points if self.layer_of(point) == layer]

    def main_point(self, role: str, layer: int) -> HookPoint | None:
        """The layer's point of a role, as `workbench.instrument.hooked_model.main_point`."""
        if self.encoder:
            return next((point for point in self.points(layer) if self.role_of(point) == role), None)
        return main_point(self.points(layer), role, layer)

    def columns(self, layer: int) -> int:
        """How many tokens the layer's pattern has as columns."""
        return self.n_source if reads_source(self.mixers[layer]) else self.length

    def stream(self) -> list[HookPoint]:
        """The residual stream before every layer and after the last: depth = n_layers + 1."""
        last = len(self.mixers) - 1
        own = [point for point in self.all_points if not self.encoder or self.layer_of(point) is not None]
        before = [point for point in own if self.role_of(point) == "resid"]
        after = [point for point in own if self.role_of(point) == "resid_post" and self.layer_of(point) == last]
        return [*before, *after]


def stacks_of(model: Any, length: int, layers: Sequence[int], source: Mapping[str, Any]) -> list[Stack]:
    """The stacks that a run of `model` keeps: these `layers` of its own, and its encoder where this run lets it read the source.

    source: what `source_record` gave.
    """
    ids = source.get("ids", ())
    points = list(model.hook_points.points.values())
    stacks = [Stack(model.mixers, points, layers, length, len(ids))]
    if ids and min(ids) >= 0 and hasattr(model, "source_mixers"):
        mixers = model.source_mixers
        stacks.append(Stack(mixers, points, range(len(mixers)), len(ids), encoder=True))
    return stacks


def source_record(model: Any) -> dict[str, Any]:
    """The source that a model is bound to, as a manifest has it; {} for models that read none. Ids that only the encoder saw are −1."""
    if not hasattr(model, "with_source"):
        return {}
    ids, count = model.bound_source()
    if ids is None:
        return {
            "ids": [-1] * count,
            "strings": [str(place) for place in range(count)],
            "tokenizer": "none",
            "text": None,
        }
    if model.tokenizer is None:
        return {"ids": ids, "strings": [str(token) for token in ids], "tokenizer": "none", "text": None}
    text = model.to_string(torch.tensor(ids))
    return {"ids": ids, "strings": model.tokenizer.token_strings(ids), "tokenizer": model.tokenizer.name, "text": text}


def reads_source(mixer: Any) -> bool:
    """Whether the columns of a mixer's pattern are the tokens of a source, not the run's own."""
    return bool(getattr(mixer, "reads_source", False))


class ArraysOf:
    """The writer of a run as one stack sees it: names of arrays get its prefix."""

    def __init__(self, run: RunWriter, stack: Stack) -> None:
        self._run, self._prefix = run, stack.prefix

    def add_array(self, name: str, array: Any, *, axes: Sequence[str], unit: str | None = None) -> None:
        """As `RunWriter.add_array`."""
        self._run.add_array(self._prefix + name, array, axes=axes, unit=unit)
