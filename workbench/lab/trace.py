"""`trace_run`: read one text with a model and keep everything that the dashboard and later scripts ask about, as an immutable run.

What is stored are the *factors* of every layer (queries, keys, values, decays, writes), not patterns or states: `workbench.lab.factors`
evaluates any tile of a pattern, or the state after any token, exactly from them. The memory is O(tokens), never tokens × tokens.
The exception are layers that no factors determine (`form = dense`): those whose mixer says so, and those whose pattern or state an
intervention overwrites. They are stored as they were, pattern and states as far as they fit (`dense_layers`), and what is left out is said.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel, heads_first
from workbench.instrument.interventions import Intervention
from workbench.lab.dense_layers import (
    STORED_ROWS,
    StateSlot,
    add_states,
    last_step,
    not_stored,
    plan_slots,
    spread,
)
from workbench.lab.layer_arrays import add_layer_arrays, log_normaliser
from workbench.lab.predictions import add_predictions
from workbench.lab.quantity_arrays import add_quantities, plan_quantities
from workbench.lab.run_format import ENCODER_PREFIX
from workbench.lab.runs import RunStore
from workbench.lab.score_arrays import LARGEST_SCORES, add_scores, score_points
from workbench.lab.stacks import ArraysOf, Stack, reads_source, source_record, stacks_of

Progress = Callable[[float, str], None]

# Roles whose tensors become one number per head and token, and how: (array name, label for people, reduction over the last axis).
# A mixer names further ones in `signal_points`: {name: (hook point, label, unit)}, reduced by their mean.
SIGNALS = {
    "gate": ("gate_mean", "mean output gate", lambda x: x.mean(-1)),
    "neuron": ("x_active", "share of active neurons x", lambda x: (x != 0).to(torch.float32).mean(-1)),
    "neuron_gated": ("y_active", "share of active neurons y", lambda x: (x != 0).to(torch.float32).mean(-1)),
}
NEURONS = {"neuron": "x", "neuron_gated": "y"}

# Editing one of these overwrites what the factors of a layer determine.
DETERMINED = {role: "pattern" for role in ("pattern", "scores", "mask", "position_bias")} | {"state": "state"}
LARGEST_PATTERN = 2**26  # cells of one layer's pattern that a run stores whole
LARGEST_COMPUTED = 2**28  # cells of one layer's pattern that are computed at all, to be pooled
STORED_STATE_NUMBERS = 2**22  # numbers of one layer's states that a run stores


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
        model: a hooked decoder with `mixers` and, for text, a tokenizer; one that reads a source, bound to it (`with_source`).
        text: text, or token ids [pos] or [1, pos].
        store: where the run goes. title: shown in lists (default: the text's beginning).
        interventions: applied during the run and recorded in it (declarative ones: a function cannot be written down).
        layers: store factors of these layers only (None: all); negative ones count from the last. An encoder's are always kept.
        progress: called as (fraction, message). cancel: when set, nothing is written and `TraceCancelled` is raised.

    Returns:
        The stored `Run`.

    Raises:
        ValueError: more than one sequence, an empty text, a text longer than the model reads, a layer that does not exist, or an edited
            pattern too large to store. HookError: a faulty intervention. TraceCancelled: `cancel` was set.
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
    length = tokens.shape[1]
    chosen = _chosen_layers(layers, model.n_layers)
    source = source_record(model)
    stacks = stacks_of(model, length, chosen, source)
    plans = [(stack, plan) for stack in stacks for plan in _plans(model, stack, tokens, interventions)]
    wanted = [point.name for stack in stacks for point in stack.stream()]
    wanted += [address for _, plan in plans for address in plan.addresses]
    special = plan_quantities(model, chosen, length, {name for _, plan in plans for name in plan.kept_points})
    names = list(dict.fromkeys(wanted + special.addresses))
    step(0.05, "running the model")
    # what interventions do not reach is an error; a special quantity may not occur in so short a text
    with torch.no_grad(), _evaluating(model), model.hooks(list(interventions)):
        logits, cache = model.run_with_cache(tokens, names=names, strict=False, dtype=torch.float32)

    ids = tokens[0].tolist()
    strings = model.tokenizer.token_strings(ids) if model.tokenizer is not None else [str(i) for i in ids]
    shown = (
        text
        if isinstance(text, str)
        else (model.to_string(tokens[0]) if model.tokenizer is not None else " ".join(strings))
    )
    with store.create("trace", title or shown[:60], model=_model_record(model), text=shown, seed=None) as run:
        records: dict[str, list[dict[str, Any]]] = {stack.prefix: [] for stack in stacks}
        for number, (stack, plan) in enumerate(plans):
            step(0.1 + 0.8 * number / len(plans), f"storing {stack.words} {plan.layer}")
            records[stack.prefix].append(_add_layer(ArraysOf(run, stack), plan, cache, stack.length))
        step(0.92, "storing predictions")
        for stack, read in zip(stacks, (tokens[0], torch.tensor(source.get("ids", ()))), strict=False):
            _add_stream(ArraysOf(run, stack), stack, read, cache)
        predicted = add_predictions(run, model, logits[0], tokens[0])
        run.set(
            tokens={
                "ids": ids,
                "strings": strings,
                "tokenizer": model.tokenizer.name if model.tokenizer is not None else "none",
                **({"predicted": predicted} if predicted else {}),
            },
            source=source or None,
            layers=records[""],
            encoder={"layers": records[ENCODER_PREFIX]} if ENCODER_PREFIX in records else None,
            quantities=add_quantities(run, special, cache, model),
            hook_points=[_hook_record(point) for point in model.hook_points.points.values()],
            interventions=[item.to_json() for item in interventions],
            settings={"layers": chosen, **(settings or {})},
            seconds=round(time.monotonic() - started, 3),
        )
        step(1.0, "writing")
    return store.open(run.id)


@contextmanager
def _evaluating(model: HookedModel) -> Iterator[None]:
    """Without dropout, which would make the run one of many."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _chosen_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers))
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise ValueError(f"Layer {layer} is out of range: this model has layers 0..{n_layers - 1}.")
    if not len(layers):
        raise ValueError("The list of layers is empty. Expected at least one layer, or None for all.")
    return sorted({layer % n_layers for layer in layers})


def _plans(model: Any, stack: Stack, tokens: Tensor, interventions: Sequence[Intervention]) -> list["_Plan"]:
    overwritten = _overwritten(model, stack, interventions)
    return [_plan(model, stack, layer, tokens, overwritten.get(layer, set())) for layer in stack.layers]


def _overwritten(model: HookedModel, stack: Stack, interventions: Sequence[Intervention]) -> dict[int, set[str]]:
    """Which layers have their `"pattern"` or `"state"` overwritten in the pass that is stored (the last, where depth shares weights)."""
    found: dict[int, set[str]] = {}
    for item in interventions:
        if not isinstance(item, Intervention):
            raise ValueError(
                f"A run records its interventions, so they must be declarative; got {item!r}. Expected e.g. Ablate, Patch, EditPattern."
            )
        for _, selected in model.hook_points.resolve(item.targets(model.hook_points)):
            for s in selected:
                role, layer = stack.role_of(s.point), stack.layer_of(s.point)
                if role in DETERMINED and layer is not None and s.step in (None, s.point.steps - 1):
                    found.setdefault(layer, set()).add(DETERMINED[role])
    return found


@dataclass(frozen=True)
class _Plan:
    """What is kept of one layer: its factors and signals always; of a dense or overwritten layer the pattern and states as they were.

    `columns`: of its pattern, the tokens of the run or of its source.
    `scores`: of a layer that no factors determine, before the softmax and by term; or `why_no_scores`.
    `kept` of the pattern: `"whole"`, `"rows"` (these `rows`, and the overview), `"none"` (too large), `"absent"` (the mixer has none).
    """

    layer: int
    mixer: Any
    signals: list[HookPoint]
    overwritten: set[str]
    pattern: HookPoint | None = None
    kept: str = "whole"
    rows: tuple[int, ...] | None = None
    slots: Sequence[StateSlot] = ()
    columns: int = 0
    scores: dict[str, HookPoint] = field(default_factory=dict)
    why_no_scores: str = ""

    @property
    def kept_points(self) -> list[str]:
        """Names of the hook points that become factors or signals."""
        named = [point for point, _, _ in _own_signals(self.mixer).values()]
        return [point.name for point in (*self.mixer.factor_points.values(), *self.signals, *named)]

    @property
    def addresses(self) -> list[str]:
        """Everything to cache."""
        named = [point for point, _, _ in _own_signals(self.mixer).values()]
        points = [*self.mixer.factor_points.values(), *self.signals, *named]
        names = [last_step(point) for point in points if not point.per_position]
        return (
            names
            + ([last_step(self.pattern)] if self.pattern is not None else [])
            + [slot.address for slot in self.slots]
            + [last_step(point) for point in self.scores.values()]
        )


def _own_signals(mixer: Any) -> dict[str, tuple[HookPoint, str, str | None]]:
    """{name: (hook point, label, unit)} of the signals that a mixer names."""
    return getattr(mixer, "signal_points", {})


def _plan(model: HookedModel, stack: Stack, layer: int, tokens: Tensor, overwritten: set[str]) -> _Plan:
    length, columns, mixer = stack.length, stack.columns(layer), stack.mixers[layer]
    points = stack.points(layer)
    own = {point.name for point, _, _ in _own_signals(mixer).values()}
    signals = [
        p
        for p in points
        if p.role in SIGNALS and {"head", "pos"} <= set(p.axes) and len(p.axes) == 4 and p.name not in own
    ]
    record = mixer.describe()
    dense = record["form"] in ("dense", None)
    if not (dense or overwritten):
        return _Plan(layer, mixer, signals, overwritten)
    cells = record["n_heads"] * length * columns
    if overwritten and not dense and cells > LARGEST_PATTERN:
        raise ValueError(
            f"The interventions overwrite the {' and '.join(sorted(overwritten))} of layer {layer}, so its pattern must be stored whole: "
            f"{cells} cells, more than {LARGEST_PATTERN}. Expected a shorter text, or `layers` without this one."
        )
    pattern = stack.main_point("pattern", layer) if record["form"] is not None else None
    kept = "whole" if cells <= LARGEST_PATTERN else "rows" if cells <= LARGEST_COMPUTED else "none"
    if pattern is None or kept == "none":
        pattern, kept = None, "none" if pattern is not None else "absent"
    main = stack.main_point("state", layer)
    states = [] if main is None else [main, *(p for p in points if p.role == "state" and p is not main)]
    slots = plan_slots(model, tokens, states, length, STORED_STATE_NUMBERS)
    rows = spread(length, STORED_ROWS) if kept == "rows" else None
    scores, why = score_points(points, stack.role_of, pattern), ""
    if scores and cells > LARGEST_SCORES:
        scores, why = {}, f"their {cells:,} numbers for this text are too many to keep (at most {LARGEST_SCORES:,})"
    return _Plan(layer, mixer, signals, overwritten, pattern, kept, rows, slots, columns, scores, why)


def _add_stream(run: ArraysOf, stack: Stack, ids: Tensor, cache: Any) -> None:
    """The token ids that a stack reads, and the norm of its residual stream."""
    run.add_array("tokens", ids.cpu().numpy().astype(np.int32), axes=("pos",))
    # one step of a model that repeats its blocks: the last pass is what the head reads
    norms = [cache[last_step(point)][0].norm(dim=-1) for point in stack.stream()]
    run.add_array("resid_norm", torch.stack(norms).cpu().numpy(), axes=("depth", "pos"))


def _add_layer(run: ArraysOf, plan: _Plan, cache: Any, length: int) -> dict[str, Any]:
    layer, mixer = plan.layer, plan.mixer
    record: dict[str, Any] = {"layer": layer, **mixer.describe()}
    record["pattern"] = pattern_record(record["pattern"])
    if reads_source(mixer):
        record["n_columns"] = plan.columns
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
        factors[name] = heads_first(cache[last_step(point)], point)[0].float().cpu().numpy()
    if "query" in factors:  # the run format has one query per head; groups that share keys or values stay as they are
        factors["query"] = factors["query"].repeat(record["n_heads"] // factors["query"].shape[0], axis=0)
    if plan.overwritten or record["form"] in ("dense", None):
        _store_as_it_was(record, factors, plan, cache, length)
    elif record["form"] == "softmax":
        factors["log_normaliser"] = log_normaliser(record, factors["query"], factors["key"])
    if plan.scores:
        adjacent = getattr(mixer, "maps_adjacent", True)
        record["scores"] = add_scores(run, layer, plan.scores, cache, record["n_heads"], adjacent)
    elif plan.why_no_scores:
        record["scores"] = {"maps": [], "difference": None, "why": plan.why_no_scores}
    record["signals"] = [*record["signals"], *_add_signals(run, plan, cache, record["n_heads"])]
    add_layer_arrays(run, record, factors, plan.rows, length)
    return record


def _store_as_it_was(
    record: dict[str, Any], factors: dict[str, np.ndarray], plan: _Plan, cache: Any, length: int
) -> None:
    """Turn a layer's record and factors into a dense layer's: the pattern that the model went on with, states where there are some.

    A pattern that its mixer calls exact (output = pattern · values) is that unless the state was overwritten behind its back.
    """
    add_states(record, factors, plan.slots, cache)
    pattern = None if plan.pattern is None else cache[last_step(plan.pattern)][0].float().cpu().numpy()
    if record["form"] is None:
        return
    if pattern is not None:
        sums_to_one = np.abs(pattern.sum(-1, dtype=np.float64) - 1).max() < 1e-4
        meta = record["pattern"]
        meta["signed"] = bool(meta["signed"] or (pattern < 0).any())
        meta["rows_sum_to"] = 1 if meta["rows_sum_to"] == 1 and sums_to_one else None
        meta["exact"] = meta["exact"] and "state" not in plan.overwritten
        factors["pattern"] = pattern
    left_out = not_stored(record, plan.kept, len(plan.rows or ()), length, plan.slots, plan.columns)
    if left_out:
        record["not_stored"] = left_out
    record["form"] = "dense"
    if plan.overwritten:
        record["overwritten"] = sorted(plan.overwritten)


def _add_signals(run: ArraysOf, plan: _Plan, cache: Any, n_heads: int) -> list[dict[str, Any]]:
    signals = []

    def add(name: str, label: str, unit: str | None, values: Tensor) -> None:
        array = f"layer.{plan.layer}.{name}"
        run.add_array(array, values.cpu().numpy(), axes=("head", "pos"))
        signals.append({"name": name, "array": array, "label": label, "unit": unit})

    for point in plan.signals:
        tensor = heads_first(cache[last_step(point)], point)[0]
        name, label, reduce = SIGNALS[point.role]
        add(name, label, None, reduce(tensor))
        if point.role in NEURONS:
            values = tensor.to(torch.float16).cpu().numpy()
            run.add_array(f"layer.{plan.layer}.{NEURONS[point.role]}", values, axes=("head", "pos", "neuron"))
    for name, (point, label, unit) in _own_signals(plan.mixer).items():
        tensor = heads_first(cache[last_step(point)].float(), point)[0]
        mean = tensor.flatten(2).mean(-1) if tensor.dim() > 2 else tensor
        add(
            name, label, unit, mean.repeat_interleave(n_heads // mean.shape[0], dim=0)
        )  # without heads: that of all of them
    return signals


def pattern_record(meta: dict[str, Any]) -> dict[str, Any]:
    """`PatternMeta` as a run manifest spells it."""
    return {
        **meta,
        "columns": f"{meta['columns']}s",
        "rows_sum_to": 1 if meta["rows_sum_to"] == "1" else None,
        "causal": meta["causal"] != "none",
    }


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
