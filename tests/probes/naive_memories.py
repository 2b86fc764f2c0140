"""Every kind of recurrent memory as a plain loop over tokens, with an edit of its state on the way: the oracle of the state verbs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.decoder import Decoder

Edit = Callable[[Tensor], Tensor]
LAYER, AFTER, LENGTH = 1, 6, 13


def lively(name: str) -> Decoder:
    """The tiny preset in float64 with larger weights."""
    model = models.build(name).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def factors_of(model: Decoder, ids: Tensor) -> dict[str, Any]:
    """What the tokens of one layer bring, [batch, head, pos, ...], and the constants of the layer."""
    mixer: Any = model.mixers[LAYER]
    record = mixer.describe()
    with torch.no_grad():
        factors: dict[str, Any] = dict(model.state_factors(ids, LAYER))
        for role in ("level", "momentum_decay"):
            points = [p for p in model.hook_points.points.values() if p.role == role and p.layer_index == LAYER]
            if points:
                _, cache = model.run_with_cache(ids, names=points[0].name)
                factors[role] = cache[points[0].name].transpose(1, 2)
    decay = factors.get("log_decay")
    if decay is not None and decay.dim() == 1:
        factors["log_decay"] = decay[None, :, None].expand(*factors["key"].shape[:3])
    return {**factors, "scale": record["scale"], "strict": record["strict"], "mixer": mixer}


def run(family: str, f: dict[str, Any], edit: Edit | None = None, after: int = AFTER) -> tuple[Tensor, list[Tensor]]:
    """Outputs [batch, head, pos, state_v] and the state after every token (before its edit)."""
    loop = {"linear": _linear, "delta": _linear, "level": _level, "memory": _memory}[family]
    return loop(family, f, edit, after)


def _decayed(f: dict[str, Any], state: Tensor, t: int) -> Tensor:
    if f.get("log_decay") is None:
        return state
    factor = f["log_decay"][:, :, t].exp()
    while factor.dim() < state.dim():
        factor = (
            factor.unsqueeze(-1) if factor.dim() == 2 or factor.shape[-1] == state.shape[-2] else factor.unsqueeze(2)
        )
    return factor * state


def _linear(family: str, f: dict[str, Any], edit: Edit | None, after: int) -> tuple[Tensor, list[Tensor]]:
    q, k, v = f["query"], f["key"], f["value"].expand(*f["key"].shape[:3], -1)
    write = f.get("write", torch.ones(k.shape[:3], dtype=k.dtype))
    state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=k.dtype)
    out, states = [], []
    for t in range(k.shape[2]):
        state = _decayed(f, state, t)
        before = state
        value = v[:, :, t]
        if family == "delta":
            value = value - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        state = state + write[:, :, t, None, None] * k[:, :, t, :, None] * value[:, :, None]
        out.append(f["scale"] * torch.einsum("bhkv,bhk->bhv", before if f["strict"] else state, q[:, :, t]))
        states.append(state)
        if edit is not None and t == after:
            state = edit(state)
    return torch.stack(out, 2), states


def _level(family: str, f: dict[str, Any], edit: Edit | None, after: int) -> tuple[Tensor, list[Tensor]]:
    q, k, v, weights = f["query"], f["key"], f["value"], f["level"]
    delta = f["mixer"].describe()["kind"] != "log_linear_mamba2"
    state = torch.zeros(*k.shape[:2], weights.shape[3], k.shape[3], v.shape[3], dtype=k.dtype)
    out, states = [], []
    for t in range(k.shape[2]):
        if t:
            target = min((t & -t).bit_length(), weights.shape[3] - 1)  # one more than the digit that t begins
            merged = torch.zeros_like(state)
            merged[:, :, target] = state[:, :, : target + 1].sum(2)
            merged[:, :, target + 1 :] = state[:, :, target + 1 :]
            state = merged
        state = state * f["log_decay"][:, :, t, None, None, None].exp()
        if delta:
            recalled = torch.einsum("bhlkv,bhk->bhlv", state, k[:, :, t])
            state = state - f["write"][:, :, t, None, None, None] * k[:, :, t, None, :, None] * recalled[:, :, :, None]
        written = f["write"][:, :, t, None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        state = torch.cat([state[:, :, :1] + written[:, :, None], state[:, :, 1:]], 2)
        read = torch.einsum("bhlkv,bhk,bhl->bhv", state, q[:, :, t], weights[:, :, t])
        out.append(f["scale"] * read)
        states.append(state)
        if edit is not None and t == after:
            state = edit(state)
    return torch.stack(out, 2), states


def _memory(family: str, f: dict[str, Any], edit: Edit | None, after: int) -> tuple[Tensor, list[Tensor]]:
    """Gradients by automatic differentiation of the loss of the whole batch at once (its parts do not mix)."""
    q, k, v = f["query"], f["key"], f["value"]
    core = f["mixer"].memory.core
    first = f["mixer"].memory.first
    state = torch.zeros(k.shape[0], k.shape[1], *core.memory.shape, dtype=k.dtype)
    state = state if first is None else state + first.detach()
    momentum = torch.zeros_like(state)
    out, states = [], []

    def answer(packed: Tensor, x: Tensor) -> Tensor:
        if core.memory.depth == 1:
            return torch.einsum("bhkv,bhk->bhv", packed, x)
        w1, w2 = packed[:, :, : k.shape[3]], packed[:, :, k.shape[3] :]
        hidden = F.gelu(torch.einsum("bhkn,bhk->bhn", w1, x))
        y = torch.einsum("bhvn,bhn->bhv", w2, hidden)
        return x + F.layer_norm(y, y.shape[-1:], eps=1e-6)

    for t in range(k.shape[2]):
        if t % core.every == 0:
            anchor = state
        leaf = anchor.clone().requires_grad_()
        loss = 0.5 * (answer(leaf, k[:, :, t]) - v[:, :, t]).square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        momentum = (
            f["momentum_decay"][:, :, t, None, None].exp() * momentum - f["write"][:, :, t, None, None] * gradient
        )
        state = f["log_decay"][:, :, t, None, None].exp() * state + momentum
        out.append(answer(state, q[:, :, t]))
        states.append(state)
        if edit is not None and t == after:
            state = edit(state)
    return torch.stack(out, 2), states


def mlstm(
    model: Decoder, f: dict[str, Tensor], edit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """C and n of LAYER side by side, both divided by exp(m): outputs C q / (max(|n·q|, exp(−m)) + eps), and C after every token."""
    core: Any = model.mixers[LAYER].core  # type: ignore[attr-defined]
    q, k, v = f["q"] * core.scale, f["k"], f["v"]
    c = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=k.dtype)
    n = torch.zeros(*k.shape[:2], k.shape[3], dtype=k.dtype)
    out, states = [], []
    for t in range(k.shape[2]):
        kept, write = f["log_decay"][:, :, t].exp(), f["write"][:, :, t]
        c = kept[..., None, None] * c + write[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        n = kept[..., None] * n + write[..., None] * k[:, :, t]
        match = torch.einsum("bhk,bhk->bh", n, q[:, :, t]).abs()
        denominator = torch.maximum(match, (-f["stabiliser"][:, :, t]).exp()) + core.eps
        out.append(torch.einsum("bhkv,bhk->bhv", c, q[:, :, t]) / denominator[..., None])
        states.append(c)
        if edit is not None and t == AFTER:
            c, n = edit(c, n)
    return torch.stack(out, 2), states
