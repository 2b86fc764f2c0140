"""Matched random operations: the same kind, in the same layer, as much of it, but meaning nothing.

What differs depends on what the operation names, the first of these that it has:

directions          a random one of the same length
features, neurons   others of about the same activity on the prompts
synapses            others about as strong and as much read
heads, levels, rows others of the layer
tokens              others of the text; contexts: the same in another layer
none of these       the same in another layer

Where a layer has too few others, another layer stands in; where nothing is left to draw from, there is no control, and `NoTwin` says why.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from probes.interventions.executor import Executor, synapse_of
from probes.interventions.kinds import OF_SYNAPSES, TWO_TEXTS
from probes.interventions.language import InterventionError, Operation, tokens_of
from workbench.instrument.errors import HookError

POOL = 400  # synapses that twins of synapses are drawn from
TRIES = 30  # draws per twin before fewer different ones are accepted
NEAR = 8  # of the units most alike in activity, at least so many can be drawn


class NoTwin(ValueError):
    """There is nothing else of this kind that a control could be drawn from."""


def twins_of(job: Executor, operations: Sequence[Operation], draws: int, seed: int = 0) -> list[tuple[Operation, ...]]:
    """Up to `draws` different baskets of matched random operations; fewer where there are not so many.

    Raises:
        NoTwin: one of the operations has no matched random counterpart in this model and text.
    """
    chance = random.Random(seed)
    synapses = [synapse_of(operation) for operation in operations if operation.kind in OF_SYNAPSES]
    matched: Sequence[Any] = [()] * (draws * TRIES)
    if synapses:
        from probes.bdh.concepts_causal import matched_synapses

        texts = [job.prompts[0]]
        matched = matched_synapses(job.model, synapses, texts, draws, POOL, np.random.default_rng(seed))[0]
    found: dict[tuple[Operation, ...], None] = {}
    for others in matched:
        if len(found) == draws:
            break
        left = iter(others)
        basket = tuple(
            _of_synapse(operation, next(left))
            if operation.kind in OF_SYNAPSES
            else twin_of(job, operation, operations, chance)
            for operation in operations
        )
        found[basket] = None
    return list(found)


def twin_of(job: Executor, operation: Operation, basket: Sequence[Operation], chance: random.Random) -> Operation:
    """One matched random counterpart; units that the basket itself names are never drawn. NoTwin where there is none."""
    if operation.kind in TWO_TEXTS:
        return operation.change(random=chance.randrange(10**6))
    if operation.neurons:
        return operation.change(neurons=_other_neurons(job, operation, chance))
    if operation.kind == "state":  # the text's characters in another order
        letters = list(operation.texts[0])
        chance.shuffle(letters)
        return operation.change(texts=("".join(letters).strip() or operation.texts[0],))
    if operation.units:
        others = _other_units(job, operation, basket, chance)
        if others is not None:
            return operation.change(units=others)
        return _in_another_layer(job, operation, chance)
    if operation.kind in ("forget", "implant"):  # what another token wrote
        used = set(tokens_of(operation.keys, job.shortest, repr(str(operation))))
        return operation.change(keys=tuple(_drawn(chance, range(job.after(operation, 0) + 1), 1, used, operation)))
    if operation.after is not None:
        return operation.change(
            after=_drawn(chance, range(1, job.shortest - 1), 1, {job.after(operation, 0)}, operation)[0]
        )
    for name in ("keys", "at"):
        span = getattr(operation, name)
        if span and operation.kind not in ("separate", "renumber"):
            used = set(tokens_of(span, job.shortest, repr(str(operation))))
            try:
                return operation.change(
                    **{name: tuple(_drawn(chance, _tokens(job, operation), len(used), used, operation))}
                )
            except NoTwin:
                break
    return _in_another_layer(job, operation, chance)


def _tokens(job: Executor, operation: Operation) -> range:
    """Tokens that a control may lie at: for an edge, those that its queries can read; the first and the last say little."""
    if operation.kind == "cut" and operation.queries:
        return range(min(tokens_of(operation.queries, job.shortest, repr(str(operation)))) + 1)
    return range(1, job.shortest - 1) if operation.kind == "block" else range(job.shortest)


def _drawn(chance: random.Random, pool: Sequence[int], count: int, used: set[int], operation: Operation) -> list[int]:
    free = [each for each in pool if each not in used]
    if len(free) < count:
        raise NoTwin(f"{str(operation)!r}: there are {len(free)} others to draw {count} from.")
    return sorted(chance.sample(free, count))


def _other_units(
    job: Executor, operation: Operation, basket: Sequence[Operation], chance: random.Random
) -> tuple[int, ...] | None:
    """Other heads, neurons, levels, rows or features; None where there are too few."""
    used = {
        unit for other in basket if (other.kind == operation.kind or other.place) and _place(other) == _place(operation)
        for unit in other.units
    }  # fmt: skip
    activity = _activity(job, operation)
    if len(activity) - len(used) < len(operation.units):
        return None
    if operation.place != "neuron" and not operation.name:
        return tuple(_drawn(chance, range(len(activity)), len(operation.units), used, operation))
    return tuple(_alike(activity, list(operation.units), used, chance))


def _place(operation: Operation) -> tuple[Any, ...]:
    return operation.place, operation.layer, operation.name


def _alike(activity: np.ndarray, units: Sequence[int], used: set[int], chance: random.Random) -> list[int]:
    """For each unit another of about the same activity, none twice."""
    taken, found = set(used), []
    for unit in units:
        order = np.argsort(np.abs(activity - activity[unit]), kind="stable")
        near = [int(other) for other in order if int(other) not in taken][: max(NEAR, len(order) // 32)]
        found.append(chance.choice(near))
        taken.add(found[-1])
    return found


@torch.no_grad()
def _activity(job: Executor, operation: Operation) -> np.ndarray:
    """Mean magnitude of every unit that stands beside the operation's, over the prompts, [unit]. Only its length counts for heads."""
    if operation.kind in ("levels", "modes"):
        shape = job.model.mixers[job.layer(operation)].describe()["state"]["shape"]
        return np.zeros(shape[1])
    if operation.name:
        dictionary, address, head = job.dictionary(operation)
        sums = []
        for prompt in job.prompts:
            x = job.read(address, prompt)
            rows = x.flatten(2) if head is None else x[:, :, head].flatten(2)
            sums.append(dictionary.encode(rows).double().flatten(0, -2).sum(0))
        return np.asarray(torch.stack(sums).sum(0))
    if operation.kind in ("hold", "write", "freeze-state", "reset", "scale-state", "scale-layer", "patch-state", "cut", "calibrate",
                          "keep", "window", "stream", "star", "separate", "base", "forget", "implant"):  # fmt: skip
        return np.zeros(int(job.model.mixers[job.layer(operation)].describe()["n_heads"]))
    point = job.point(operation)
    key = ("activity", point.name, operation.place)
    if key not in job.memo:
        address = point.name if point.steps == 1 else f"{point.name}@0"
        axes = ("head", point.axes[-1]) if operation.place == "neuron" else ("head", "kv_head", "group")
        kept = [axis for axis in axes if axis in point.axes] or [point.axes[-1]]
        total: Any = 0
        for prompt in job.prompts:
            x = job.read(address, prompt).double().abs()
            total = total + x.sum([d for d, axis in enumerate(point.axes) if axis not in kept])
        job.memo[key] = total.flatten().cpu().numpy()
    return np.asarray(job.memo[key])


def _other_neurons(job: Executor, operation: Operation, chance: random.Random) -> tuple[tuple[int, int], ...]:
    """Neurons of a BDH, each of the same head and about as active, over all layers."""
    if "neurons" not in job.memo:
        found = [
            job.read(f"blocks.{layer}.hook_x", prompt) for layer in range(job.model.n_layers) for prompt in job.prompts
        ]
        job.memo["neurons"] = torch.stack([x[0].double().sum(1) for x in found]).sum(0).cpu().numpy()  # [head, neuron]
    activity, used = job.memo["neurons"], set(operation.neurons)
    twins: list[tuple[int, int]] = []
    for head, neuron in operation.neurons:
        taken = {other for h, other in used if h == head}
        (other,) = _alike(activity[head], [neuron], taken, chance)
        twins.append((head, other))
        used.add(twins[-1])
    return tuple(twins)


def _in_another_layer(job: Executor, operation: Operation, chance: random.Random) -> Operation:
    """The same in another layer that takes it."""
    layers = [layer for layer in range(job.model.n_layers) if layer != operation.layer]
    chance.shuffle(layers)
    if operation.layer is not None:
        for layer in layers:
            moved = operation.change(layer=layer)
            try:
                if operation.units:
                    size = len(_activity(job, moved))
                    moved = moved.change(
                        units=tuple(_drawn(chance, range(size), len(operation.units), set(), operation))
                    )
                with job.model.hooks(job.hooks([moved], 0), strict=False):
                    return moved
            except (InterventionError, HookError, NoTwin):
                continue
    elif operation.place.startswith("blocks."):
        own = operation.place.split(".")
        for layer in layers:
            name = ".".join(["blocks", str(layer), *own[2:]])
            if str(layer) != own[1] and name in job.model.hook_dict:
                return operation.change(place=name)
    raise NoTwin(
        f"{str(operation)!r} has no matched random counterpart: its layer has no others of its kind, and no other layer takes it."
    )


def _of_synapse(operation: Operation, synapse: Any) -> Operation:
    address = (synapse.source_layer, *synapse.source, synapse.target_layer, *synapse.target)
    return operation.change(synapse=tuple(map(int, address)))
