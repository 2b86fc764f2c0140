"""Edits of BDH's memory, as the workbench's own interventions: each function here returns what `model.hooks([...])` takes.

A synapse is rank 1 in the state: synapse (i → j) with weighted value σ̂ puts σ̂ cen(E_i) into row j. Changing it by δ is therefore adding
δ cen(E_i) to that row, and nothing of size n × n is needed. Reset and fading of whole states are `EditState(layer=…, after=…, value=0.0)`.
Every edit after token t changes later tokens only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH
from models.parts.positions import rotate
from probes.bdh.capture import (
    Synapse,
    capture_writes,
    centred_encoder,
    checked_layer,
    checked_neuron,
    checked_position,
    neurons_per_head,
    require_bdh,
)
from probes.bdh.timescales import neurons_of
from workbench.instrument.errors import suggestion
from workbench.instrument.interventions import Ablate, EditState
from workbench.instrument.selection import Select
from workbench.lab.catalogue import implements

ACTIVITIES = {"x": "neuron", "gate": "gate", "y": "neuron_gated"}


@torch.no_grad()
def synapse_value(
    model: Any, tokens: Any, synapse: Synapse, *, after: int, mask: Tensor | None = None, hooks: Sequence[Any] = ()
) -> Tensor:
    """σ̂ = Σ_{τ≤after} c_τ y_τ[i] k_τ[j], the synapse as it stands in the state, [batch]. It counts what was written, not earlier edits."""
    model = require_bdh(model)
    synapse.check(model)
    tokens = model.to_tokens(tokens)
    stop = checked_position(after, tokens.shape[1], "after") + 1
    writes = capture_writes(model, tokens, synapse.target_layer, sources=[synapse.source_layer], mask=mask, hooks=hooks)
    (a, i), (b, j) = synapse.source, synapse.target
    products = writes.y[synapse.source_layer][:, a, :stop, i] * writes.keys[:, b, :stop, j]
    return (writes.coefficients[synapse.source_layer][:, :stop] * products).sum(1)


@implements("bdh", "intervention", "change_synapse")
def change_synapse(model: Any, synapse: Synapse, change: float | Tensor, *, after: int) -> EditState:
    """Add `change` (a number, or one per sequence [batch]) to σ̂ of a synapse once token `after` is read and written."""
    model = require_bdh(model)
    synapse.check(model)
    (a, i), (b, j) = synapse.source, synapse.target
    amount = torch.as_tensor(change, dtype=model.weights.E.dtype, device=model.device).reshape(-1, 1, 1, 1)
    return EditState(
        layer=synapse.target_layer,
        after=after,
        heads=[b],
        at={"state_k": [j]},
        operation="add",
        value=amount * centred_encoder(model)[a, i],
    )


@implements("bdh", "intervention", "ablate_synapse")
def ablate_synapse(model: Any, tokens: Any, synapse: Synapse, *, after: int, **run: Any) -> EditState:
    """Take out of the state what the tokens up to `after` wrote into a synapse: later tokens find it at 0.

    What those tokens themselves read stays; to remove a synapse from the whole run, use `mute_synapse`. `run` goes to `synapse_value`.
    """
    return clamp_synapse(model, tokens, synapse, 0.0, after=after, **run)


@implements("bdh", "intervention", "clamp_synapse")
def clamp_synapse(
    model: Any, tokens: Any, synapse: Synapse, value: float | Tensor, *, after: int, **run: Any
) -> EditState:
    """Set σ̂ of a synapse to `value` (a number or [batch]) after a token; it is written further from there. Else as `ablate_synapse`."""
    current = synapse_value(model, tokens, synapse, after=after, **run)
    return change_synapse(model, synapse, torch.as_tensor(value).to(current) - current, after=after)


@implements("bdh", "intervention", "copy_synapse")
def copy_synapse(
    model: Any, tokens: Any, synapse: Synapse, *, after: int, source_tokens: Any, source_after: int, **run: Any
) -> EditState:
    """Set σ̂ of a synapse to its value in another text. `source_tokens` is one sequence, or as many as `tokens` has."""
    value = synapse_value(model, source_tokens, synapse, after=source_after)
    return clamp_synapse(model, tokens, synapse, value, after=after, **run)


@implements("bdh", "intervention", "mute_synapse")
def mute_synapse(model: Any, synapse: Synapse) -> list[tuple[str, Any]]:
    """Hooks that make a synapse count for nothing in a whole run, recomputing at each token what it would have contributed.

    At every token t the read a_t loses Σ_{τ<t} q_t[j] k_τ[j] c_τ y_τ[i] cen(E_i); y, scales and keys are those of the muted run itself.
    For runs that read the text in one call; a call that continues a state is a ValueError.
    """
    model = require_bdh(model)
    synapse.check(model)
    (a, i), (b, j) = synapse.source, synapse.target
    source, target = synapse.source_layer, synapse.target_layer
    site = f"blocks.{target}.attn."
    kept: dict[str, Tensor] = {}
    row = centred_encoder(model)[a, i]

    def keep_y(y: Tensor, hook: Any) -> None:
        if hook.offset:
            raise ValueError(
                "mute_synapse needs the text in one call: this call continues a state. Use generate(use_state=False)."
            )
        kept["y"] = y[:, a, :, i]

    def keep_scale(scale: Tensor, hook: Any) -> None:
        kept[hook.name] = scale

    def keep_query(q: Tensor, hook: Any) -> None:
        kept["query"] = q[:, b, :, j]

    def keep_key(k: Tensor, hook: Any) -> None:
        kept["key"] = k[:, b, :, j]

    def correct(read: Tensor, hook: Any) -> Tensor:
        # c_{τ,k→l}: one over the product of exactly these scales
        weight = 1 / torch.stack([kept[name][..., 0] for name in names]).prod(0)
        written = kept["key"] * weight.to(kept["key"]) * kept["y"].to(kept["key"])
        before = written.cumsum(1) - written
        read[:, b] -= ((kept["query"] * before)[..., None] * row.to(read)).to(read)
        return read

    names = [f"blocks.{source}.ln_u.hook_scale", *(f"blocks.{m}.ln_v.hook_scale" for m in range(source, target))]
    return [
        (f"blocks.{source}.hook_y", keep_y),
        *((name, keep_scale) for name in names),
        (site + "hook_rot_q", keep_query),
        (site + "hook_rot_k", keep_key),
        (f"blocks.{target}.hook_a", correct),
    ]


@implements("bdh", "intervention", "freeze_writes")
def freeze_writes(
    model: Any,
    *,
    since: int,
    length: int,
    layer: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
) -> Ablate:
    """From token `since` to token `length` − 1 nothing is written: the state stays as token since − 1 left it, and is still read.

    Args:
        layer, heads: only these; None for all.
    """
    _check(require_bdh(model), layer, heads)
    if not 0 <= since < length:
        raise ValueError(
            f"since is {since} and length {length}; expected 0 ≤ since < length, the number of tokens of the run."
        )
    return Ablate(Select(role="rotated_key", layer=layer), heads=heads, positions=list(range(since, length)))


@implements("bdh", "intervention", "block_reads")
def block_reads(
    model: Any,
    *,
    positions: int | Sequence[int] | None = None,
    layer: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
) -> Ablate:
    """The tokens at `positions` (all of them if None) read nothing from the state; they still write.

    To keep them from reading some tokens only, use `workbench.BlockEdge(layer=…, queries=…, keys=…)`.
    """
    _check(require_bdh(model), layer, heads)
    return Ablate(Select(role="rotated_query", layer=layer), heads=heads, positions=positions)


@implements("bdh", "intervention", "ablate_neurons")
def ablate_neurons(
    model: Any,
    neurons: Sequence[tuple[int, int]],
    *,
    of: str = "x",
    layer: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
) -> list[Ablate]:
    """Silence neurons (head, neuron).

    Args:
        of: `"x"` removes a neuron altogether: it neither reads nor writes nor fires. `"y"` or `"gate"` only keeps it from firing: it
            still holds and finds memories. layer, positions: only there; None for all.
    """
    model = require_bdh(model)
    if of not in ACTIVITIES:
        raise ValueError(
            f"Unknown activity {of!r}.{suggestion(of, ACTIVITIES)} Expected one of {', '.join(ACTIVITIES)}."
        )
    if not neurons:
        raise ValueError("neurons is empty, which silences nothing. Expected (head, neuron) pairs.")
    _check(model, layer, None)
    by_head: dict[int, list[int]] = {}
    for head, neuron in neurons:
        checked_neuron(model, head, neuron, "neurons has")
        by_head.setdefault(head, []).append(neuron)
    point = Select(role=ACTIVITIES[of], layer=layer)
    return [
        Ablate(point, heads=[head], positions=positions, at={"neuron": sorted(set(chosen))})
        for head, chosen in by_head.items()
    ]


@implements("bdh", "intervention", "copy_state")
@torch.no_grad()
def copy_state(
    model: Any,
    source_tokens: Any,
    *,
    source_after: int,
    after: int,
    layer: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    octiles: int | Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    keep_distance: bool = True,
    hooks: Sequence[Any] = (),
) -> list[EditState]:
    """Activation patching for memory: after token `after` of a run, the state is what another text had left after its token `source_after`.

    Args:
        source_tokens: one sequence, or as many as the run that is edited will have.
        layer, heads: only these. octiles: only neurons of these time scales. neurons: only these numbers (of every chosen head).
        keep_distance: turn the copied memories so that they lie as far back from `after` as they lay from `source_after`. False keeps
            the positions that they were written at, which may lie after the reader.
        hooks: of the run over `source_tokens`, which has no padding.

    Returns:
        One `EditState` per layer.
    """
    model = require_bdh(model)
    _check(model, layer, heads)
    if octiles is not None and neurons is not None:
        raise ValueError("Both octiles and neurons are given. Expected one of them.")
    if after < 0:
        raise ValueError(f"after is {after}; expected a position from 0 (the run that it edits is not known here).")
    chosen = list(neurons) if neurons is not None else neurons_of(model, octiles) if octiles is not None else None
    for neuron in chosen or []:
        checked_neuron(model, 0, neuron, "neurons has")
    if chosen is not None and not chosen:
        raise ValueError("neurons is empty, which copies nothing.")
    tokens = model.to_tokens(source_tokens)
    source_after = checked_position(source_after, tokens.shape[1], "source_after")
    states = model.states(tokens, source_after, layers=layer, hooks=hooks)
    edits = []
    for number, state in states.items():
        value = state[:, 0]
        if keep_distance and after != source_after:
            value = turned(model, value, after - source_after)
        at = None if chosen is None else {"state_k": chosen}
        edits.append(EditState(layer=number, after=after, heads=heads, at=at, operation="set", value=value))
    return edits


def turned(model: BDH, state: Tensor, distance: int) -> Tensor:
    """A state [batch, head, neuron, d_model] as if everything in it had been written `distance` tokens later."""
    cosine, sine = model.weights.rotation(torch.tensor([[distance]], device=state.device))
    return rotate(state.mT, cosine.to(state), sine.to(state), interleaved=True).mT


def _check(model: BDH, layer: int | Sequence[int] | None, heads: int | Sequence[int] | None) -> None:
    layers = [] if layer is None else [layer] if isinstance(layer, int) else list(layer)
    for number in layers:
        checked_layer(model, number)
    chosen = [] if heads is None else [heads] if isinstance(heads, int) else list(heads)
    for head in chosen:
        if not 0 <= head < model.config.n_heads:
            raise ValueError(
                f"heads has {head}; expected 0..{model.config.n_heads - 1} (with {neurons_per_head(model)} neurons each)."
            )
