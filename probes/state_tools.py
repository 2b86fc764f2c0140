"""Looking into recurrent memories of every kind: what they still know, how much room they use, and what each token did to them.

Every function takes a hooked model and asks the layer's mixer through the instrument's protocols (`factor_points`, `signal_points`, hook
points of role `state`), so linear attention, state-space, delta-rule, log-linear and test-time memories are measured by the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel, heads_first, main_point

__all__ = [
    "Retention",
    "Spectrum",
    "keys_and_values",
    "recall",
    "retention_matrix",
    "state_point",
    "state_spectrum",
    "token_table",
]

# Roles whose tensors say what a token did to the memory: (name in the table, or none for the hook point's; what is shown of it).
TOKEN_ROLES: dict[str, tuple[str, Any]] = {
    "decay": ("kept", lambda x: x.exp()),
    "momentum_decay": ("momentum kept", lambda x: x.exp()),
    "write": ("write", lambda x: x),
    "step": ("step", lambda x: x),
    "input_gate": ("input gate", lambda x: x),
    "forget_gate": ("forget gate", lambda x: x),
    "gate": ("gate", lambda x: x),
    "gates": ("", lambda x: x),
    "key_score": ("score", lambda x: x),
    "threshold": ("threshold", lambda x: x),
    "surprise": ("surprise", lambda x: x),
    "memory_loss": ("memory loss", lambda x: x),
}


@dataclass(frozen=True)
class Retention:
    """How well the state after token t answers the key of token j with its value; nan for j > t, which is not written yet.

    cosine, relative_error: [batch, head, t, j], the cosine of M_t(k_j) and v_j, and |M_t(k_j) − v_j| / |v_j|. The cosine does not depend
    on how a memory scales its keys, so it can be compared across architectures.
    """

    cosine: Tensor
    relative_error: Tensor
    layer: int

    def by_age(self) -> Tensor:
        """Mean cosine over everything that was written n tokens ago, [batch, head, n]: the memory's forgetting curve."""
        length = self.cosine.shape[-1]
        curves = [self.cosine.diagonal(-age, -2, -1).mean(-1) for age in range(length)]
        return torch.stack(curves, -1)


def retention_matrix(model: HookedModel, tokens: Any, layer: int, **kwargs: Any) -> Retention:
    """The retention matrix of one layer, in one run and without storing states.

    Args:
        tokens: [batch, pos] without padding, or text. layer: negative counts from the last. kwargs: as for `run_with_cache` (`hooks`, ...).

    Raises:
        UnknownHookPoint: the layer has no recurrent state. HookError: its memory has no keys and values that it could be asked for.
    """
    layer = range(model.n_layers)[layer]
    point = state_point(model, layer)
    tokens = model.to_tokens(tokens)
    keys, values = keys_and_values(model, tokens, layer, **kwargs)
    cosines: list[Tensor] = []
    errors: list[Tensor] = []

    def measure(state: Tensor, hook: HookPoint) -> None:
        with torch.no_grad():
            answer = recall(model, layer, state, keys.to(state))
            truth = values.to(state)
            unwritten = torch.arange(keys.shape[2], device=keys.device) > len(cosines)
            size = truth.norm(dim=-1).clamp(min=torch.finfo(state.dtype).tiny)
            cosine = torch.cosine_similarity(answer, truth, dim=-1)
            cosines.append(cosine.masked_fill(unwritten, torch.nan))
            errors.append(((answer - truth).norm(dim=-1) / size).masked_fill(unwritten, torch.nan))

    hooks = [*kwargs.pop("hooks", ()), (f"{_last_pass(point)}[*]", measure)]
    model.run_with_hooks(tokens, hooks=hooks, **kwargs)
    return Retention(torch.stack(cosines, 2), torch.stack(errors, 2), layer)


def recall(model: HookedModel, layer: int, state: Tensor, keys: Tensor) -> Tensor:
    """What a state [batch, head, ..., state_k, state_v] answers to keys [batch, head, n, state_k]: [batch, head, n, state_v].

    A matrix state answers Sᵀk, level states their sum; a mixer whose memory is a network, or lies otherwise, says so itself (`recall`).
    """
    mixer: Any = model.mixers[layer]
    if hasattr(mixer, "recall"):
        return mixer.recall(state, keys)
    if state.dim() > 4:
        state = state.flatten(2, -3).sum(2)
    if state.dim() != 4 or state.shape[2] != keys.shape[3]:
        raise HookError(
            f"Layer {layer} ({mixer.describe()['kind']}): a state {tuple(state.shape)} cannot be asked for keys {tuple(keys.shape)}."
        )
    return keys @ state


@dataclass(frozen=True)
class Spectrum:
    """Singular values of states after some tokens, descending, [batch, position, head, ..., n], and how many of them count.

    A state that all heads share has no head axis.
    """

    singular_values: Tensor
    positions: tuple[int, ...]

    @property
    def effective_rank(self) -> Tensor:
        """exp of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 for an empty state.

        [batch, position, head, ...].
        """
        total = self.singular_values.sum(-1, keepdim=True)
        share = self.singular_values / total.clamp(min=torch.finfo(total.dtype).tiny)
        rank = torch.special.entr(share).sum(-1).exp()
        return torch.where(total[..., 0] > 0, rank, torch.zeros_like(rank))

    @property
    def stable_rank(self) -> Tensor:
        """Σσ² / max σ²: how many directions carry the state's energy; 0 for an empty state. [batch, position, head, ...]."""
        squares = self.singular_values.square()
        top = squares[..., 0]
        return squares.sum(-1) / torch.where(top > 0, top, torch.ones_like(top))


def state_spectrum(
    model: HookedModel, tokens: Any, layer: int, positions: int | Sequence[int], slot: str = "state", **kwargs: Any
) -> Spectrum:
    """Singular values of the state after chosen tokens, over its last two axes. Arguments as for `model.states`."""
    layer = range(model.n_layers)[layer]
    reading = model.states(tokens, positions, layers=layer, slot=slot, **kwargs)
    states, point = reading[layer], slot_point(model, layer, slot)
    if len([axis for axis in point.axes if axis not in ("batch", "head")]) < 2:
        raise HookError(f"The state {slot!r} of layer {layer} is no matrix: {' '.join(point.axes)}.")
    precise = states if states.dtype == torch.float64 else states.float()
    return Spectrum(torch.linalg.svdvals(precise), reading.positions)


def token_table(model: HookedModel, tokens: Any, layer: int, **kwargs: Any) -> dict[str, Tensor]:
    """What every token did to one layer's memory: {name: [batch, head, pos]}.

    A signal or state that all heads share has one head. Columns, where the mixer has them: `kept` (the factor by which the state decays),
    `write`, `gate`, `surprise`, `level 0` … (weights with which levels are read), and others of `TOKEN_ROLES`; several channels per head
    are averaged. `state norm` is always there.
    """
    layer = range(model.n_layers)[layer]
    points = [p for p in model.hook_points.points.values() if p.layer_index == layer and not p.per_position]
    shown = [p for p in points if p.role in TOKEN_ROLES or p.role == "level"]
    point = state_point(model, layer)
    norms: list[Tensor] = []

    def norm(state: Tensor, hook: HookPoint) -> None:
        by_head = state.detach() if "head" in point.axes else state.detach().unsqueeze(1)
        norms.append(by_head.flatten(2).norm(dim=-1))

    hooks = [*kwargs.pop("hooks", ()), (f"{_last_pass(point)}[*]", norm)]
    names = [_last_pass(p) for p in shown] or [f"blocks.{layer}.hook_resid_post"]
    _, cache = model.run_with_cache(tokens, names=names, hooks=hooks, **kwargs)
    table = {}
    for p in shown:
        x = heads_first(cache[_last_pass(p)], p)
        if p.role == "level":
            table.update({f"level {number}": x[..., number] for number in range(x.shape[-1])})
            continue
        name, shape = TOKEN_ROLES[p.role]
        x = shape(x)
        table[name if name and name not in table else p.name.rsplit("hook_", 1)[-1]] = (
            x.flatten(3).mean(-1) if x.dim() > 3 else x
        )
    table["state norm"] = torch.stack(norms, -1)
    return table


def state_point(model: HookedModel, layer: int) -> HookPoint:
    """The hook point of a layer's state. Raises `UnknownHookPoint` in words where the layer has none."""
    number = range(model.n_layers)[layer]
    point = main_point(model.hook_points.points.values(), "state", number)
    if point is None:
        with_state = sorted(
            {
                p.layer_index
                for p in model.hook_points.points.values()
                if p.role == "state" and p.layer_index is not None
            }
        )
        where = f"Layers with a state: {with_state}." if with_state else "No layer of this model has one."
        raise UnknownHookPoint(
            f"Layer {number} ({model.mixers[number].describe()['kind']}) carries no recurrent state. {where}"
        )
    return point


def slot_point(model: HookedModel, layer: int, slot: str) -> HookPoint:
    """The hook point of one of the things that a layer carries. Raises `HookError` with those that there are."""
    layer = range(model.n_layers)[layer]
    state_point(model, layer)
    slots = {
        p.name.rsplit(".hook_", 1)[-1]: p
        for p in model.hook_points.points.values()
        if p.role == "state" and p.layer_index == layer
    }
    if slot not in slots:
        kind = model.mixers[layer].describe()["kind"]
        raise HookError(
            f"Layer {layer} ({kind}) has no state {slot!r}.{suggestion(slot, slots)} It has: {', '.join(slots)}."
        )
    return slots[slot]


def keys_and_values(model: HookedModel, tokens: Any, layer: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The keys under which a layer's memory stores values, and the values: [batch, head, pos, width] each.

    Groups are expanded to heads; channels without heads are split among them. A mixer whose keys and values are no factors of its runs
    names them in `memory_points`. Raises HookError where nothing is stored under keys.
    """
    layer = range(model.n_layers)[layer]
    mixer: Any = model.mixers[layer]
    points = getattr(mixer, "memory_points", mixer.factor_points)
    if not {"key", "value"} <= set(points):
        raise HookError(
            f"Layer {layer} ({mixer.describe()['kind']}) does not store values under keys, so its memory cannot be asked for a key. "
            "Expected a layer with key and value factors."
        )
    heads = mixer.describe()["n_heads"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=[_last_pass(points[name]) for name in ("key", "value")], **kwargs)

    def by_head(point: HookPoint) -> Tensor:
        x = heads_first(cache[_last_pass(point)], point)
        if "channel" in point.axes:
            return x[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    return by_head(points["key"]), by_head(points["value"])


def _last_pass(point: HookPoint) -> str:
    """The address of the last pass, where depth shares weights."""
    return point.name if point.steps == 1 else f"{point.name}@{point.steps - 1}"
