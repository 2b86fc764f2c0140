"""Changing recurrent memories: verbs that return ordinary interventions, `model.hooks(erase_key(model, 1, after=8, key=k))`.

Each finds what it needs by the layer's protocols and says in words what a mixer lacks. Interventions are declarative: they are recorded in
runs, written to files, and act in every execution mode; a change of the state after token t reaches later tokens only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.state_tools import slot_point, state_point
from workbench.instrument.errors import HookError, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel, main_point
from workbench.instrument.interventions import Ablate, BlockEdge, EditPattern, EditState, Intervention, Patch, Scale

__all__ = [
    "ablate_levels",
    "ablate_modes",
    "clamp_gate",
    "cut_edges",
    "erase_key",
    "freeze",
    "implant",
    "patch_signal",
    "patch_state",
    "reset",
    "scale_write",
]

Places = int | Sequence[int] | None
NEVER = -1e4  # a log decay that leaves nothing, and is still a number


def patch_signal(
    model: HookedModel, layer: int, role: str, value: Tensor, *, heads: Places = None, positions: Places = None
) -> list[Intervention]:
    """Replace a signal of the layer's mixer (role `key`, `value`, `write`, `decay`, …) by `value`, e.g. from another run."""
    point = _signal(model, layer, role)
    return [Patch(point.name, value=value, heads=heads, positions=positions)]


def scale_write(
    model: HookedModel, layer: int, factor: float, *, heads: Places = None, positions: Places = None
) -> list[Intervention]:
    """Let tokens write `factor` times as strongly into the state (0: not at all).

    Mixers with a write strength of their own (Δ of Mamba, β of the delta rule, RG-LRU's, the step of a memory) have it scaled, Aaren the
    weight e^(score) of the token; others write key ⊗ value, and the value is scaled. Mamba's Δ also sets the decay, which follows it: a
    token that does not write lets nothing fade.
    """
    layer = range(model.n_layers)[layer]
    points = dict(model.mixers[layer].factor_points)
    if _weighs_with_keys(model, layer):
        points["write"] = points["key"]
    elif "write" not in points:  # mixers whose pattern no factors determine name only the value
        role = next((role for role in ("write", "step") if _has(model, layer, role)), None)
        points |= {} if role is None else {"write": _signal(model, layer, role)}
    own = model.mixers[layer].describe()["kind"] == "attention"  # a memory that tokens of its own write
    if own or ("write" not in points and "value" not in points):
        raise HookError(f"Layer {layer} ({_kind(model, layer)}) has neither write strengths nor values to scale.")
    point = _changeable(model, layer, points.get("write") or points["value"])
    return [Scale(point.name, factor=factor, **_where(point, heads, positions))]


def patch_state(
    model: HookedModel, layer: int, value: Tensor, *, after: int, slot: str = "state", heads: Places = None
) -> list[Intervention]:
    """Replace the state after token `after` by `value`, e.g. `model.states(other, after)[layer][:, 0]`."""
    return [EditState(slot_point(model, layer, slot).name, after=after, operation="set", value=value, heads=heads)]


def clamp_gate(
    model: HookedModel, layer: int, value: float, *, role: str = "decay", heads: Places = None, positions: Places = None
) -> list[Intervention]:
    """Hold a gate at one value. For `decay` and `momentum_decay` the value is the factor kept per token, in [0, 1]; 1 forgets nothing."""
    if role in ("decay", "momentum_decay"):
        if not 0 <= value <= 1:
            raise HookError(f"clamp_gate: a decay keeps a share between 0 and 1 of the state; got {value}.")
        value = float(torch.tensor(value, dtype=torch.float64).log().clamp(min=NEVER))
    layer = range(model.n_layers)[layer]
    if role == "decay" and "log_decay" in model.mixers[layer].constant_factors():
        raise HookError(
            f"The decay of layer {layer} ({_kind(model, layer)}) is a constant of the layer, no signal. Expected a mixer that chooses its "
            "decay per token; use EditState(layer=..., operation='scale') to change what is kept."
        )
    point = _signal(model, layer, role)
    return [Patch(point.name, value=torch.tensor(value, dtype=torch.float64), heads=heads, positions=positions)]


def erase_key(
    model: HookedModel, layer: int, key: Tensor, *, after: Places, heads: Places = None
) -> list[Intervention]:
    """Remove from the state after some tokens what it answers to a key, S ← (I − k̂ k̂ᵀ) S, or to several at once (their span).

    key: [state_k], [head, state_k] or [head, n, state_k].
    """
    _require_matrix(model, layer, "erase_key")
    point = state_point(model, layer)
    return [EditState(point.name, after=after, operation="erase", value=_columns(key, point), heads=heads)]


def implant(
    model: HookedModel,
    layer: int,
    key: Tensor,
    value: Tensor,
    *,
    after: Places,
    replace: bool = True,
    heads: Places = None,
) -> list[Intervention]:
    """Store an association in the state after some tokens: the key is then answered with the value.

    key: [state_k] or [head, state_k]. value: [state_v] or [head, state_v].
    replace: first erase what the key recalls, so that the answer is exactly `value`; otherwise k v ᵀ / |k|² is added to it.
    Level states get it at level 0, the youngest.
    """
    _require_matrix(model, layer, "implant")
    point = state_point(model, layer)
    unit = key / key.square().sum(-1, keepdim=True)
    written = unit.unsqueeze(-1) * value.unsqueeze(-2)
    if "level" in point.axes:
        levels = model.mixers[range(model.n_layers)[layer]].describe()["state"]["shape"][1]
        written = torch.nn.functional.pad(written.unsqueeze(-3), (0, 0, 0, 0, 0, levels - 1))
    added = EditState(point.name, after=after, operation="add", value=written, heads=heads)
    return [*(erase_key(model, layer, key, after=after, heads=heads) if replace else ()), added]


def cut_edges(
    model: HookedModel, layer: int, *, queries: Places = None, keys: Places = None, heads: Places = None
) -> list[Intervention]:
    """Let tokens `queries` no longer read tokens `keys`: the output loses α_ij v_j, the state stays. Rows of distributions are rescaled."""
    layer = range(model.n_layers)[layer]
    point = main_point(model.hook_points.points.values(), "pattern", layer)
    if point is None:
        raise HookError(f"Layer {layer} ({_kind(model, layer)}) has no pattern whose edges could be cut.")
    if not point.editable:
        raise HookError(
            f"The pattern of layer {layer} ({_kind(model, layer)}) only reports how strongly outputs move with sources; its entries are no "
            "weights that could be cut. Expected a mixer that is linear in its values; use scale_write(...) to silence a source."
        )
    kind = BlockEdge if point.meta is not None and point.meta.is_distribution else EditPattern
    return [kind(point.name, queries=queries, keys=keys, heads=heads)]


def ablate_levels(
    model: HookedModel, layer: int, levels: int | Sequence[int], *, heads: Places = None, positions: Places = None
) -> list[Intervention]:
    """Let tokens read nothing from some levels of a log-linear layer; the level states stay."""
    point = _signal(model, layer, "level")
    return [Ablate(point.name, at={"level": levels}, heads=heads, positions=positions)]


def ablate_modes(
    model: HookedModel, layer: int, modes: int | Sequence[int], *, heads: Places = None, positions: Places = None
) -> list[Intervention]:
    """Let tokens read nothing from some rows of the state (state_k: the modes of a state-space layer); they are still written."""
    layer = range(model.n_layers)[layer]
    _require_matrix(model, layer, "ablate_modes")
    point = model.mixers[layer].factor_points.get("query")
    if point is None:
        raise HookError(
            f"Layer {layer} ({_kind(model, layer)}) reads its state without queries, so no mode can be left out."
        )
    return [Ablate(point.name, at={point.axes[-1]: modes}, **_where(point, heads, positions))]


def freeze(
    model: HookedModel, layer: int, positions: int | Sequence[int], *, heads: Places = None
) -> list[Intervention]:
    """Let the state pass some tokens unchanged: they write nothing and nothing fades. Momentum, where there is any, is lost."""
    layer = range(model.n_layers)[layer]
    if _has(model, layer, "input_gate") and _has(
        model, layer, "forget_gate"
    ):  # exponential gates, before their stabiliser
        return [
            Patch(_signal(model, layer, role).name, value=torch.tensor(value), heads=heads, positions=positions)
            for role, value in (("input_gate", NEVER), ("forget_gate", -NEVER))
        ]
    interventions = scale_write(model, layer, 0.0, heads=heads, positions=positions)
    # Aaren's decays only change the unit in which both sums are kept; a step of Mamba that is zero lets nothing fade
    if _weighs_with_keys(model, layer) or _has(model, layer, "step"):
        return interventions
    if "log_decay" in model.mixers[layer].factor_points or _has(model, layer, "decay"):
        interventions += clamp_gate(model, layer, 1.0, heads=heads, positions=positions)
    elif "log_decay" in model.mixers[layer].constant_factors():
        raise HookError(
            f"Layer {layer} ({_kind(model, layer)}) fades at a constant rate that no signal stops, so its state cannot be frozen. "
            "Expected a mixer that chooses its decay per token, or one without decay."
        )
    if _has(model, layer, "momentum_decay"):
        interventions += clamp_gate(model, layer, 0.0, role="momentum_decay", heads=heads, positions=positions)
    return interventions


def reset(model: HookedModel, layer: int, *, after: Places, heads: Places = None) -> list[Intervention]:
    """Forget everything after some tokens: every part of the state becomes what it is at the beginning of a text."""
    layer = range(model.n_layers)[layer]
    main = state_point(model, layer)
    first = _first_weights(model, layer)
    slots = [p for p in model.hook_points.points.values() if p.role == "state" and p.layer_index == layer]
    interventions: list[Intervention] = []
    for point in slots:
        if point is main and first is not None:
            interventions.append(EditState(point.name, after=after, operation="set", value=first, heads=heads))
        else:
            interventions.append(EditState(point.name, after=after, operation="scale", value=0.0, heads=heads))
    return interventions


# ------------------------------------------------------------------------------------------------------------- finding


def _kind(model: HookedModel, layer: int) -> str:
    return str(model.mixers[range(model.n_layers)[layer]].describe()["kind"])


def _weighs_with_keys(model: HookedModel, layer: int) -> bool:
    """Whether the key is one number, the token's weight in a sum and in its normaliser."""
    key = model.mixers[layer].factor_points.get("key")
    return key is not None and key.role == "write_feature"


def _has(model: HookedModel, layer: int, role: str) -> bool:
    return any(p.role == role and p.layer_index == layer for p in model.hook_points.points.values())


def _signal(model: HookedModel, layer: int, role: str) -> HookPoint:
    """The hook point of a signal: the factor that the memory is given, where several have the role."""
    layer = range(model.n_layers)[layer]
    factors = model.mixers[layer].factor_points
    name = {"decay": "log_decay"}.get(role, role)
    if name in factors:
        return _changeable(model, layer, factors[name])
    found = [p for p in model.hook_points.points.values() if p.role == role and p.layer_index == layer]
    if not found:
        roles = sorted({p.role for p in model.hook_points.points.values() if p.layer_index == layer} | set(factors))
        raise HookError(
            f"Layer {layer} ({_kind(model, layer)}) has no signal of role {role!r}.{suggestion(role, roles)} It has: {', '.join(roles)}."
        )
    return _changeable(model, layer, found[0])


def _changeable(model: HookedModel, layer: int, point: HookPoint) -> HookPoint:
    """The point, if it can be edited."""
    if not point.editable:
        raise HookError(
            f"{point.name!r} of layer {layer} ({_kind(model, layer)}) only reports: it follows from what the memory itself brought about. "
            "Expected a signal that can be edited; edit the states, or what the memory reads (points of role 'memory_input')."
        )
    return point


def _where(point: HookPoint, heads: Places, positions: Places) -> dict[str, Any]:
    """Heads and positions of a point; groups shared by several heads cannot be chosen by head."""
    chosen = {"heads": heads, "positions": positions}
    if heads is not None and "head" not in point.axes:
        raise HookError(
            f"{point.name!r} is shared by several heads (axes {' '.join(point.axes)}), so it cannot be changed for heads {heads} alone."
        )
    return {name: value for name, value in chosen.items() if value is not None}


def _first_weights(model: HookedModel, layer: int) -> Tensor | None:
    """What a memory's weights are before the first token; None for zeros."""
    memory: Any = getattr(model.mixers[layer], "memory", None)
    first = getattr(memory, "first", None)
    return None if first is None else first.detach()


def _require_matrix(model: HookedModel, layer: int, verb: str) -> None:
    """Refuse memories whose state does not answer a key by a product."""
    layer = range(model.n_layers)[layer]
    state_point(model, layer)
    mixer = model.mixers[layer]
    missing = [name for name in ("key", "value") if name not in mixer.factor_points]
    if missing or _first_weights(model, layer) is not None:
        why = (
            f"has no {' and no '.join(missing)}"
            if missing
            else "is a network, whose answers are no product of key and state"
        )
        raise HookError(
            f"{verb}: the memory of layer {layer} ({_kind(model, layer)}) {why}. Expected a matrix state; use patch_state(...) with a "
            "state of your own."
        )


def _columns(key: Tensor, point: HookPoint) -> Tensor:
    """Keys as columns, with an axis for every other axis of the state between head and state_k."""
    if key.dim() not in (1, 2, 3):
        raise HookError(f"key: expected [state_k], [head, state_k] or [head, n, state_k]; got {tuple(key.shape)}.")
    columns = key.unsqueeze(-1) if key.dim() < 3 else key.mT
    if key.dim() > 1:
        for _ in range(len(point.axes) - 4):
            columns = columns.unsqueeze(1)
    return columns
