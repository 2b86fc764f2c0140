"""`trace_run`: read one text with a model and keep everything that the dashboard and later scripts ask about, as an immutable run.

What is stored are the *factors* of every layer (queries, keys, values, decays, writes), not patterns or states: `workbench.lab.factors`
evaluates any tile of a pattern, or the state after any token, exactly from them. The memory is O(tokens), never tokens × tokens.
"""

import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel, heads_first
from workbench.instrument.interventions import Intervention
from workbench.lab.layer_arrays import add_layer_arrays, log_normaliser
from workbench.lab.run_writer import RunWriter
from workbench.lab.runs import RunStore

Progress = Callable[[float, str], None]

# Roles whose tensors become one number per head and token, and how: (array name, label for people, reduction over the last axis).
SIGNALS = {
    "gate": ("gate_mean", "mean output gate", lambda x: x.mean(-1)),
    "neuron": ("x_active", "share of active neurons x", lambda x: (x != 0).to(torch.float32).mean(-1)),
    "neuron_gated": ("y_active", "share of active neurons y", lambda x: (x != 0).to(torch.float32).mean(-1)),
}
NEURONS = {"neuron": "x", "neuron_gated": "y"}


class TraceCancelled(RuntimeError):
    """The trace was cancelled; nothing was stored."""


def trace_run(
    model: Any,
    text: str | Tensor,
    store: RunStore,
    *,
    title: str | None = None,
    interventions: Sequence[Intervention] = (),
    layers: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
    cancel: Event | None = None,
) -> Any:
    """Run `model` on one text and write a trace run (docs/architecture.md, section 4).

    Args:
        model: a hooked decoder with `mixers` and, for text, a tokenizer. text: text, or token ids [pos] or [1, pos].
        store: where the run goes. title: shown in lists (default: the text's beginning).
        interventions: applied during the run and recorded in it. layers: store factors of these layers only (None: all).
        progress: called as (fraction, message). cancel: when set, nothing is written and `TraceCancelled` is raised.

    Returns:
        The stored `Run`.

    Raises:
        ValueError: more than one sequence, an empty text, or a text longer than the model reads. HookError: a faulty intervention.
    """
    started = time.monotonic()

    def step(fraction: float, message: str) -> None:
        if cancel is not None and cancel.is_set():
            raise TraceCancelled("The trace was cancelled; nothing was stored.")
        if progress is not None:
            progress(fraction, message)

    step(0.0, "reading the text")
    if isinstance(text, str) and not text:
        raise ValueError("The text is empty. Expected at least one token.")
    tokens = model.to_tokens(text)
    if tokens.shape[0] != 1:
        raise ValueError(f"A trace holds one sequence; got a batch of {tokens.shape[0]}.")
    chosen = (
        list(range(model.n_layers)) if layers is None else sorted({range(model.n_layers)[layer] for layer in layers})
    )
    mixers = {layer: model.mixers[layer] for layer in chosen}
    kept = {layer: _points_of_layer(model, layer) for layer in chosen}
    stream = _stream_points(model)
    names = list(dict.fromkeys([p.name for p in stream] + [p.name for points in kept.values() for p in points]))
    step(0.05, "running the model")
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=names, hooks=list(interventions), dtype=torch.float32)

    ids = tokens[0].tolist()
    strings = model.tokenizer.token_strings(ids) if model.tokenizer is not None else [str(i) for i in ids]
    shown = (
        text
        if isinstance(text, str)
        else (model.to_string(tokens[0]) if model.tokenizer is not None else " ".join(strings))
    )
    with store.create("trace", title or shown[:60], model=_model_record(model), text=shown, seed=None) as run:
        records = []
        for number, layer in enumerate(chosen):
            step(0.1 + 0.8 * number / len(chosen), f"storing layer {layer}")
            records.append(_add_layer(run, layer, mixers[layer], kept[layer], cache, tokens.shape[1]))
        step(0.92, "storing predictions")
        _add_predictions(run, logits[0].float(), tokens[0])
        # one step of a model that repeats its blocks: the last pass is what the head reads
        norms = [cache[_last_step(cache, point)][0].norm(dim=-1) for point in stream]
        run.add_array("resid_norm", torch.stack(norms).cpu().numpy(), axes=("depth", "pos"))
        run.set(
            tokens={
                "ids": ids,
                "strings": strings,
                "tokenizer": type(model.tokenizer).__name__ if model.tokenizer else "none",
            },
            layers=records,
            hook_points=[_hook_record(point) for point in model.hook_points.points.values()],
            interventions=[item.to_json() for item in interventions],
            settings={"layers": chosen, **(settings or {})},
            seconds=round(time.monotonic() - started, 3),
        )
        step(1.0, "writing")
    return store.open(run.id)


def _points_of_layer(model: HookedModel, layer: int) -> list[HookPoint]:
    """The factor points of a layer's mixer, its signals and (BDH) its neurons."""
    points = list(model.mixers[layer].factor_points.values())
    for point in model.hook_points.points.values():
        if (
            point.layer_index == layer
            and point.role in SIGNALS
            and {"head", "pos"} <= set(point.axes)
            and len(point.axes) == 4
        ):
            points.append(point)
    return points


def _stream_points(model: HookedModel) -> list[HookPoint]:
    """The residual stream before every layer and after the last: depth = n_layers + 1."""
    points = model.hook_points.points.values()
    before = [p for p in points if p.role == "resid"]
    after = [p for p in points if p.role == "resid_post" and p.layer_index == model.n_layers - 1]
    return [*before, *after]


def _last_step(cache: Any, point: HookPoint) -> str:
    return point.name if point.steps == 1 else f"{point.name}@{point.steps - 1}"


def _add_layer(
    run: RunWriter, layer: int, mixer: Any, points: list[HookPoint], cache: Any, length: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"layer": layer, **mixer.describe()}
    record["pattern"] = pattern_record(record["pattern"])
    if record["form"] == "softmax":
        width = mixer.d_head
        record["state"] = {
            "role": "cache",
            "axes": ["head", "pos", "d_head"],
            "shape": [record["n_key_heads"], length, width],
        }
    factors: dict[str, np.ndarray] = {}
    for name, value in mixer.constant_factors().items():  # e.g. decays [head]: the same for every token
        factors[name] = value.detach().float().cpu().numpy()[:, None].repeat(length, axis=1)
    for name, point in mixer.factor_points.items():
        factors[name] = heads_first(cache[_last_step(cache, point)], point)[0].cpu().numpy()
    # the run format has one query per head; groups that share keys or values stay as they are
    factors["query"] = factors["query"].repeat(record["n_heads"] // factors["query"].shape[0], axis=0)
    if record["form"] == "softmax":
        factors["log_normaliser"] = log_normaliser(record, factors["query"], factors["key"])
    signals = list(record["signals"])
    for point in points:
        if point.role not in SIGNALS:
            continue
        tensor = heads_first(cache[_last_step(cache, point)], point)[0]
        name, label, reduce = SIGNALS[point.role]
        run.add_array(f"layer.{layer}.{name}", reduce(tensor).cpu().numpy(), axes=("head", "pos"))
        signals.append({"name": name, "array": f"layer.{layer}.{name}", "label": label, "unit": None})
        if point.role in NEURONS:
            values = tensor.to(torch.float16).cpu().numpy()
            run.add_array(f"layer.{layer}.{NEURONS[point.role]}", values, axes=("head", "pos", "neuron"))
    record["signals"] = signals
    add_layer_arrays(run, record, factors)
    return record


def pattern_record(meta: dict[str, Any]) -> dict[str, Any]:
    """`PatternMeta` as a run manifest spells it."""
    return {
        **meta,
        "columns": f"{meta['columns']}s",
        "rows_sum_to": 1 if meta["rows_sum_to"] == "1" else None,
        "causal": meta["causal"] != "none",
    }


def _add_predictions(run: RunWriter, logits: Tensor, tokens: Tensor) -> None:
    log_probs = logits.log_softmax(-1)
    loss = np.full(len(tokens), np.nan, dtype=np.float32)
    loss[1:] = -log_probs[:-1].gather(1, tokens[1:, None])[:, 0].cpu().numpy()
    best = log_probs.topk(min(10, log_probs.shape[-1]), dim=-1)
    run.add_array("tokens", tokens.cpu().numpy().astype(np.int32), axes=("pos",))
    run.add_array("loss", loss, axes=("pos",), unit="nats")
    run.add_array("next.log_probs", best.values.cpu().numpy(), axes=("pos", "rank"), unit="nats")
    run.add_array("next.ids", best.indices.cpu().numpy().astype(np.int32), axes=("pos", "rank"))


def _hook_record(point: HookPoint) -> dict[str, Any]:
    return {"name": point.name, "role": point.role, "axes": list(point.axes), "editable": point.editable}


def _model_record(model: Any) -> dict[str, Any]:
    """What a manifest says of the model; `model.about()` supplies what only its registry knows."""
    about: dict[str, Any] = model.about() if hasattr(model, "about") else {}
    return {
        "name": getattr(model, "name", type(model).__name__),
        "architecture": getattr(model, "architecture", "unknown"),
        **about,
    }
