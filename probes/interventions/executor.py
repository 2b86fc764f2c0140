"""What every kind of line does: operations to hooks, for any model. The values that they need are read from the model's own runs.

    job = Executor(model, [model.to_tokens("the cat sat on the mat")])
    model.run_with_hooks(job.prompts[0], hooks=job.hooks(parse("zero head 1.3"), 0))

Each kind has one function under `@makes(kind)` that returns what `run_with_hooks` takes; most of them call the verb of another probe
(`state_tools_edits`, `reading_edits`, `features`, `steering`, `bdh`). Prompts run one at a time, so that they may differ in length.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from probes.ablation import addresses_of
from probes.interventions.language import InterventionError, Operation, Span, tokens_of
from probes.interventions.offers import why_not
from probes.interventions.places import Places, token_axis
from probes.positions import move, rotation_base, stream
from probes.reading_edits import (
    CalibrateSinks,
    KeepTopScores,
    ReadOnly,
    parallel_contexts,
    parallel_positions,
    star,
    streaming,
)
from probes.state_tools import state_point
from probes.state_tools_edits import (
    ablate_levels,
    ablate_modes,
    clamp_gate,
    cut_edges,
    erase_key,
    freeze,
    implant,
    patch_state,
    reset,
    scale_write,
)
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.interventions import Ablate, EditState, Patch, Project, Scale, Steer

Maker = Callable[[Places, Operation, int], list[Any]]
MAKERS: dict[str, Maker] = {}


def makes(*kinds: str) -> Callable[[Maker], Maker]:
    """Register the function that makes the hooks of some kinds."""

    def register(function: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(kinds, function))
        return function

    return register


class Executor(Places):
    """Makes the hooks of operations on some prompts of a model."""

    @torch.no_grad()
    def hooks(self, operations: Sequence[Operation], number: int) -> list[Any]:
        """The hooks of some operations on the prompt with this number, in their order.

        Raises:
            InterventionError: a layer, part, token or text that does not fit, or a kind that needs what the model lacks. HookError: what
                this model's hook points refuse.
        """
        hooks = []
        for operation in operations:
            hooks += MAKERS[operation.kind](self, operation, number)
            reason = why_not(operation.kind, [point.describe() for point in self.model.hook_points.points.values()])
            if reason:
                raise InterventionError(f"{str(operation)!r}: {reason}.")
        return hooks


# ------------------------------------------------------------------------------------------------------------- any place


@makes("zero")
def _zero(job: Places, operation: Operation, number: int) -> list[Any]:
    point = job.point(operation)
    return [Ablate(point.name, **where) for where in job.where(operation, point, number)]


@makes("scale")
def _scale(job: Places, operation: Operation, number: int) -> list[Any]:
    point = job.point(operation)
    return [
        Scale(point.name, factor=float(operation.by or 0.0), **where) for where in job.where(operation, point, number)
    ]


@makes("mean")
def _mean(job: Places, operation: Operation, number: int) -> list[Any]:
    point = job.point(operation)
    axis, texts = token_axis(operation, point), job.other_texts(operation) or job.prompts
    edits: list[Any] = []
    for address in addresses_of(point):
        sums = [job.read(address, text).sum(axis, keepdim=True) for text in texts]
        mean = torch.stack(sums).sum(0) / sum(text.shape[1] for text in texts)
        edits += [Ablate(address, value=mean, **where) for where in job.where(operation, point, number)]
    return edits


@makes("resample", "patch")
def _patch(job: Places, operation: Operation, number: int) -> list[Any]:
    point, length = job.point(operation), job.length(number)
    sources = job.other_texts(operation)
    if not sources:
        sources = [text for other, text in enumerate(job.prompts) if other != number and text.shape[1] >= length]
        if not sources:
            raise InterventionError(
                f"{str(operation)!r}: there is no other prompt of at least {length} tokens to take values from. "
                "Expected several prompts, or from: and a text."
            )
    source = random.Random(f"{job.seed} {number} {operation}").choice(sources)
    if operation.kind == "resample":
        source = source[:, :length]
    edits: list[Any] = []
    for address in addresses_of(point):
        where = job.where(operation, point, number)
        value = job.from_text(operation, point, address, source, number)
        edits += [Patch(address, value=value, **each) for each in where]
    return edits


@makes("steer")
def _steer(job: Places, operation: Operation, number: int) -> list[Any]:
    name, _, vector = job.direction(operation)
    (where,) = job.where(operation, job.point(operation), number)
    return [Steer(name, direction=vector, coefficient=float(operation.by or 0.0), **where)]


@makes("erase")
def _erase(job: Places, operation: Operation, number: int) -> list[Any]:
    name, _, vector = job.direction(operation)
    (where,) = job.where(operation, job.point(operation), number)
    return [Project(name, directions=vector[None], **where)]


@makes("feature")
def _feature(job: Places, operation: Operation, number: int) -> list[Any]:
    from probes.features.interventions import clamp_features

    dictionary, point, head = job.dictionary(operation)
    assert operation.to is not None
    return [clamp_features(dictionary, point, dict.fromkeys(operation.units, operation.to), head=head)]


@makes("feature-add")
def _feature_add(job: Places, operation: Operation, number: int) -> list[Any]:
    from probes.features.interventions import steer_feature

    dictionary, point, head = job.dictionary(operation)
    if head is not None:
        raise InterventionError(
            f"{str(operation)!r}: this dictionary is of one head. Hold its features instead: feature ... to ..."
        )
    return [steer_feature(dictionary, point, unit, float(operation.by or 0.0)) for unit in operation.units]


# --------------------------------------------------------------------------------------------------------------- reading


@makes("cut")
def _cut(job: Places, operation: Operation, number: int) -> list[Any]:
    length, words = job.length(number), repr(str(operation))
    queries = tokens_of(operation.queries, length, words) or None
    keys = tokens_of(operation.keys, length, words)
    return list(cut_edges(job.model, job.layer(operation), queries=queries, keys=keys, heads=job.heads(operation)))


@makes("calibrate")
def _calibrate(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.by is not None
    return [CalibrateSinks(layer=job.layer(operation), heads=job.heads(operation), beta=operation.by)]


@makes("keep")
def _keep(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.count is not None
    return [KeepTopScores(layer=job.layer(operation), heads=job.heads(operation), k=operation.count)]


@makes("window")
def _window(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.count is not None and operation.sinks is not None
    allowed = streaming(job.length(number), operation.sinks, operation.count)
    return [ReadOnly(layer=job.layer(operation), heads=job.heads(operation), allowed=allowed)]


@makes("stream")
def _stream(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.count is not None and operation.sinks is not None
    layer, heads = job.layer(operation), job.heads(operation)
    try:
        return stream(job.model, layer=layer, sinks=operation.sinks, window=operation.count, heads=heads)
    except ValueError as error:
        raise InterventionError(f"{str(operation)!r}: {error}") from None


@makes("star")
def _star(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.count is not None
    try:
        allowed = star(job.length(number), operation.count, job.after(operation, number) + 1)
    except ValueError as error:
        raise InterventionError(f"{str(operation)!r}: {error}") from None
    return [ReadOnly(layer=job.layer(operation), heads=job.heads(operation), allowed=allowed)]


@makes("separate")
def _separate(job: Places, operation: Operation, number: int) -> list[Any]:
    allowed = parallel_contexts(job.length(number), _contexts(job, operation, number))
    return [ReadOnly(layer=job.layer(operation), heads=job.heads(operation), allowed=allowed)]


@makes("renumber")
def _renumber(job: Places, operation: Operation, number: int) -> list[Any]:
    try:
        return move(job.model, parallel_positions(job.length(number), _contexts(job, operation, number))[0])
    except ValueError as error:
        raise InterventionError(f"{str(operation)!r}: {error}") from None


def _contexts(job: Places, operation: Operation, number: int) -> list[tuple[int, int]]:
    """Stretches of tokens [start, stop) that do not overlap, two at least. InterventionError for others."""
    length = job.length(number)
    spans = [
        (tokens[0], tokens[-1] + 1)
        for tokens in (tokens_of((part,), length, repr(str(operation))) for part in operation.keys)
    ]
    if len(spans) < 2 or any(stop > start for (_, stop), (start, _) in pairwise(spans)):
        raise InterventionError(
            f"{str(operation)!r}: expected two contexts or more, one after the other, such as 4:12,12:20."
        )
    return spans


@makes("base")
def _base(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.to is not None
    return rotation_base(job.model, operation.to, layer=job.layer(operation), heads=job.heads(operation))


# ---------------------------------------------------------------------------------------------------------------- states


@makes("freeze-state")
def _freeze_state(job: Places, operation: Operation, number: int) -> list[Any]:
    state_point(job.model, job.layer(operation))
    tokens = tokens_of(operation.at, job.length(number), repr(str(operation)))
    return list(freeze(job.model, job.layer(operation), tokens, heads=job.heads(operation)))


@makes("reset")
def _reset(job: Places, operation: Operation, number: int) -> list[Any]:
    return list(reset(job.model, job.layer(operation), after=job.after(operation, number), heads=job.heads(operation)))


@makes("scale-state", "scale-layer")
def _scale_state(job: Places, operation: Operation, number: int) -> list[Any]:
    if operation.kind == "scale-layer":
        _require_bdh(job, operation)
    point = state_point(job.model, job.layer(operation))
    after = job.after(operation, number)
    return [
        EditState(
            point.name, after=after, operation="scale", value=float(operation.by or 0.0), heads=job.heads(operation)
        )
    ]


@makes("patch-state")
def _patch_state(job: Places, operation: Operation, number: int) -> list[Any]:
    layer, after = job.layer(operation), job.after(operation, number)
    (source,) = job.other_texts(operation)
    if source.shape[1] <= after:
        raise InterventionError(
            f"{str(operation)!r}: the other text has {source.shape[1]} tokens, so no state after token {after}."
        )
    state_point(job.model, layer)
    edits: list[Any] = []
    for point in job.model.hook_points.points.values():
        if point.role == "state" and point.layer_index == layer:
            slot = point.name.rsplit(".hook_", 1)[-1]
            value = job.model.states(source, after, layers=layer, slot=slot)[layer][:, 0]
            edits += patch_state(job.model, layer, value, after=after, slot=slot, heads=job.heads(operation))
    return edits


@makes("forget")
def _forget(job: Places, operation: Operation, number: int) -> list[Any]:
    key = _written(job, operation, operation.keys, "key", number)
    after = job.after(operation, number)
    return list(erase_key(job.model, job.layer(operation), key, after=after, heads=job.heads(operation)))


@makes("implant")
def _implant(job: Places, operation: Operation, number: int) -> list[Any]:
    key = _written(job, operation, operation.keys, "key", number)
    value = _written(job, operation, operation.at, "value", number)
    after = job.after(operation, number)
    return list(implant(job.model, job.layer(operation), key, value, after=after, heads=job.heads(operation)))


def _written(job: Places, operation: Operation, span: Span, factor: str, number: int) -> torch.Tensor:
    """The key or value that one token of the prompt writes into the layer's state, [head, width]."""
    layer, tokens = job.layer(operation), tokens_of(span, job.length(number), repr(str(operation)))
    if len(tokens) != 1:
        raise InterventionError(f"{str(operation)!r}: expected one token as {factor}, got {len(tokens)}.")
    state_point(job.model, layer)
    mixer = job.model.mixers[layer]
    point = mixer.factor_points.get(factor)
    if point is None:
        raise InterventionError(
            f"{str(operation)!r}: the memory of layer {layer} ({mixer.describe()['kind']}) has no {factor} of a token; patch state "
            "exchanges all of it."
        )
    found = heads_first(job.read(point.name, job.prompts[number]), point)[0, :, tokens[0]]
    return found.repeat_interleave(int(mixer.describe()["n_heads"]) // found.shape[0], dim=0)


def _at(job: Places, operation: Operation, number: int) -> dict[str, Any]:
    """Heads and tokens as the state tools take them."""
    tokens = tokens_of(operation.at, job.length(number), repr(str(operation)))
    return {"heads": job.heads(operation), "positions": tokens or None}


@makes("hold")
def _hold(job: Places, operation: Operation, number: int) -> list[Any]:
    assert operation.to is not None
    return list(
        clamp_gate(job.model, job.layer(operation), operation.to, role=operation.place, **_at(job, operation, number))
    )


@makes("write")
def _write(job: Places, operation: Operation, number: int) -> list[Any]:
    state_point(job.model, job.layer(operation))
    return list(scale_write(job.model, job.layer(operation), float(operation.by or 0.0), **_at(job, operation, number)))


@makes("levels", "modes")
def _levels(job: Places, operation: Operation, number: int) -> list[Any]:
    verb: Callable[..., list[Any]] = ablate_levels if operation.kind == "levels" else ablate_modes
    return list(
        verb(job.model, job.layer(operation), list(operation.units), positions=_at(job, operation, number)["positions"])
    )


# ------------------------------------------------------------------------------------------------------- memory of a BDH


def _require_bdh(job: Places, operation: Operation) -> None:
    """InterventionError for other models: their memories have words of their own."""
    from probes.bdh.capture import require_bdh

    try:
        require_bdh(job.model)
    except TypeError as error:
        raise InterventionError(f"{str(operation)!r}: {error}") from None


def synapse_of(operation: Operation) -> Any:
    """The `probes.bdh.Synapse` that an operation names."""
    from probes.bdh import Synapse

    assert operation.synapse is not None
    source_layer, source_head, source, layer, head, target = operation.synapse
    return Synapse(source=(source_head, source), target=(head, target), target_layer=layer, source_layer=source_layer)


@makes("ablate", "clamp", "copy", "mute", "neurons", "freeze", "block", "state")
def _bdh(job: Places, operation: Operation, number: int) -> list[Any]:
    from probes import bdh

    _require_bdh(job, operation)
    model, tokens, kind = job.model, job.prompts[number], operation.kind
    if kind == "neurons":
        return list(bdh.ablate_neurons(model, list(operation.neurons)))
    if kind == "block":
        return [bdh.block_reads(model, positions=tokens_of(operation.at, job.length(number), repr(str(operation))))]
    if kind == "mute":
        return list(bdh.mute_synapse(model, synapse_of(operation)))
    after = job.after(operation, number)
    if kind == "freeze":
        return [bdh.freeze_writes(model, since=after, length=job.length(number))]
    if kind == "state":
        return list(bdh.copy_state(model, operation.texts[0], source_after=-1, after=after, layer=job.layer(operation)))
    if kind == "ablate":
        return [bdh.ablate_synapse(model, tokens, synapse_of(operation), after=after)]
    if kind == "clamp":
        assert operation.to is not None
        return [bdh.clamp_synapse(model, tokens, synapse_of(operation), operation.to, after=after)]
    source = operation.texts[0]
    return [bdh.copy_synapse(model, tokens, synapse_of(operation), after=after, source_tokens=source, source_after=-1)]
