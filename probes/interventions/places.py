"""Where an operation applies and what it reads: parts and hook points of a model, activations of other texts, directions, dictionaries."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from probes.ablation import unit_place, unit_sizes
from probes.interventions.kinds import PARTS
from probes.interventions.language import InterventionError, Operation, tokens_of
from probes.patching import HEAD_AXES
from probes.steering import Direction, mean_difference
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point

Dictionaries = Callable[[str], tuple[Any, str, int | None]]  # name -> (dictionary, hook point, head)


class Places:
    """Finds places of operations in a model, and reads the values that they need on some prompts, each once.

    Args:
        prompts: texts, or ids [1, pos]. dictionaries: where features come from: by name, or a function of the name that gives
            (dictionary, hook point, head). seed: of the prompts that `resample` takes values from.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Any],
        *,
        dictionaries: Dictionaries | Mapping[str, tuple[Any, str, int | None]] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.seed = model, seed
        self.prompts: list[Tensor] = [model.to_tokens(prompt) for prompt in prompts]
        if not self.prompts or any(each.shape[0] != 1 for each in self.prompts):
            raise InterventionError("Expected at least one prompt, each a text or ids [1, pos].")
        short = [number for number, each in enumerate(self.prompts) if each.shape[1] < 2]
        if short:
            raise InterventionError(f"Prompt {short[0]} has fewer than two tokens, so nothing is predicted in it.")
        self._dictionaries = dictionaries
        self.memo: dict[Any, Any] = {}

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(each.shape[1] for each in self.prompts)

    def length(self, number: int) -> int:
        """Tokens of a prompt."""
        return int(self.prompts[number].shape[1])

    # ---- places

    def layer(self, operation: Operation) -> int:
        """The operation's layer."""
        layer, count = operation.layer, self.model.n_layers
        if layer is None or not 0 <= layer < count:
            raise InterventionError(
                f"{str(operation)!r}: there is no layer {layer}; this model has layers 0 to {count - 1}."
            )
        return layer

    def point(self, operation: Operation) -> HookPoint:
        """The hook point of the operation's place."""
        if operation.layer is None:
            ((_, selected),) = self.model.hook_points.resolve(operation.place)
            return selected[0].point
        layer, points = self.layer(operation), list(self.model.hook_points.points.values())
        for role in PARTS.get(operation.place, (operation.place,)):
            found = main_point(points, role, layer) or next(
                (p for p in points if p.role == role and p.layer_index == layer), None
            )
            if found is not None:
                return found
        there = {p.role for p in points if p.layer_index == layer}
        roles = sorted(there | {part for part, names in PARTS.items() if there.intersection(names)})
        raise InterventionError(
            f"{str(operation)!r}: layer {layer} has no {operation.place!r}.{suggestion(operation.place, roles)} It has: {', '.join(roles)}."
        )

    def where(self, operation: Operation, point: HookPoint, number: int) -> list[dict[str, Any]]:
        """The chosen units and tokens of a point, as keyword arguments of interventions: one set for each head of BDH neurons."""
        if point.per_position:
            raise InterventionError(
                f"{str(operation)!r}: a state stands after tokens. Write reset, scale state or patch state, with after and a token."
            )
        tokens: dict[str, Any] = {}
        if operation.at:
            tokens["positions"] = tokens_of(operation.at, self.length(number), repr(str(operation)))
        if not operation.units:
            return [tokens]
        axis = next((axis for axis in HEAD_AXES if axis in point.axes), None)
        if operation.place == "neuron":
            sizes = unit_sizes(self.model, "neuron", self.layer(operation))
            if max(operation.units) >= (count := prod(sizes.values())):
                raise InterventionError(
                    f"{str(operation)!r}: there is no neuron {max(operation.units)}; there are {count}."
                )
            found: dict[int, list[int]] = {}
            for unit in operation.units:
                at = unit_place(sizes, unit)["at"]
                found.setdefault(at.get("head", [-1])[0], []).append(at[point.axes[-1]][0])
            heads = [{} if head < 0 else {"head": [head]} for head in found]
            return [
                {**tokens, "at": {**head, point.axes[-1]: inner}}
                for head, inner in zip(heads, found.values(), strict=True)
            ]
        return [{**tokens, "at": {axis or point.axes[-1]: list(operation.units)}}]

    def heads(self, operation: Operation) -> list[int] | None:
        """The operation's heads, None for all."""
        return list(operation.units) or None

    # ---- values

    def read(self, address: str, tokens: Tensor) -> Tensor:
        """The activation at an address in the model's own run on some tokens, read once."""
        key = (address, tuple(tokens[0].tolist()))
        if key not in self.memo:
            self.memo[key] = self.model.run_with_cache(tokens, names=address)[1][address]
        return self.memo[key]

    def other_texts(self, operation: Operation) -> list[Tensor]:
        """The operation's texts as ids."""
        return [self.model.to_tokens(text) for text in operation.texts]

    def from_text(self, operation: Operation, point: HookPoint, address: str, source: Tensor, number: int) -> Tensor:
        """The activation of another text, as long as the prompt: positions that are not chosen may lack there."""
        axis, length, given = token_axis(operation, point), self.length(number), source.shape[1]
        needed = max(tokens_of(operation.at, length, repr(str(operation))) or [length - 1]) + 1
        if given < needed or (not operation.at and given != length):
            raise InterventionError(
                f"{str(operation)!r}: the prompt has {length} tokens and the other text {given}. Expected equally many, or tokens "
                "(at ...) that both have."
            )
        value = self.read(address, source).narrow(axis, 0, min(given, length))
        missing = list(value.shape)
        missing[axis] = length - value.shape[axis]
        return torch.cat([value, value.new_zeros(missing)], axis)

    def direction(self, operation: Operation) -> tuple[str, Direction, Tensor]:
        """(hook point, direction between the two texts' means, the vector to use: its own, or a random one of its length)."""
        point = self.point(operation)
        if operation.units:
            raise InterventionError(
                f"{str(operation)!r}: a direction is added to a whole activation. Name no heads or neurons."
            )
        key = (point.name, operation.texts)
        if key not in self.memo:
            one, other = operation.texts
            self.memo[key] = mean_difference(self.model, [one], [other], point.name, position=None)
        found: Direction = self.memo[key]
        vector = found.vector if operation.random is None else found.random(1, seed=operation.random)[0]
        return point.name, found, vector

    def dictionary(self, operation: Operation) -> tuple[Any, str, int | None]:
        """(dictionary, hook point, head) of the operation's features."""
        source = self._dictionaries
        if source is None:
            raise InterventionError(f"{str(operation)!r}: no dictionary of features was given.")
        if callable(source):
            return source(operation.name)
        if operation.name not in source:
            raise InterventionError(
                f"{str(operation)!r}: there is no dictionary {operation.name!r}.{suggestion(operation.name, source)} "
                f"Known: {', '.join(source)}."
            )
        return source[operation.name]

    def after(self, operation: Operation, number: int) -> int:
        """The token after which a state is changed, counted from 0."""
        assert operation.after is not None
        return operation.after % self.length(number)


def token_axis(operation: Operation, point: HookPoint) -> int:
    """Which axis of a point counts tokens. InterventionError where none does."""
    for axis in ("pos", "query"):
        if axis in point.axes:
            return point.axes.index(axis)
    raise InterventionError(f"{str(operation)!r}: {point.name!r} has no axis of tokens ({' '.join(point.axes)}).")
