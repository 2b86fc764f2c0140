"""BDH a second time, one token after the other in float64, where every write can be seen and changed: the oracle of the BDH probes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH, BDHConfig

EXACT = 1e-10
# No axis has the size of another: 3 layers, 2 heads, 6 neurons each, width 5, 37 symbols.
CONFIG = BDHConfig(n_layers=3, d_model=5, n_heads=2, n_neurons=12, vocab_size=37, dropout=0.0, init_std=0.7, seed=3)
LENGTH = 9


def tiny_model(**changes: Any) -> BDH:
    return BDH(BDHConfig(**{**vars(CONFIG), **changes})).double().eval()


def tiny_tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 37, (batch, length), generator=torch.Generator().manual_seed(seed))


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@dataclass
class Naive:
    """logits [pos, vocab]; x, y, key, gate per (layer, pos) [head, neuron]; state per (layer, pos) [head, neuron, d_model];
    scale per (layer, pos): {source: coefficient of what it wrote into that layer's value}."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    x: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    y: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gate: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    key: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    state: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    scale: dict[tuple[int, int], dict[Any, Tensor]] = field(default_factory=dict)


def turn(x: Tensor, t: int, frequencies: Tensor) -> Tensor:
    """Turn pairs (2k, 2k + 1) of x [..., neuron] by the phase of token t."""
    cycles = (torch.tensor(float(t)) * frequencies[::2]) % 1
    angle = cycles * (2 * math.pi)
    cosine, sine = angle.cos(), angle.sin()
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cosine - x[..., 1::2] * sine
    out[..., 1::2] = x[..., 1::2] * cosine + x[..., 0::2] * sine
    return out


def spread(x: Tensor) -> Tensor:
    return (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def same(layer: int, t: int, value: Tensor) -> Tensor:
    return value


Edit = Callable[[int, int, Tensor], Tensor]
Write = Callable[[int, int, Tensor, "Naive"], Tensor]


@torch.no_grad()
def naive(
    model: BDH,
    tokens: Tensor,
    *,
    on_x: Edit = same,
    on_y: Edit = same,
    on_query: Edit = same,
    on_key: Edit = same,
    on_write: Write = lambda layer, t, write, run: write,
    after: Edit = same,
) -> Naive:
    """Run one sequence of tokens [pos]. `on_write` sees the rank-1 write [head, neuron, d_model], `after` the state after the write."""
    weights, run = model.weights, Naive()
    heads, neurons, width = weights.E.shape
    states = [torch.zeros(heads, neurons, width, dtype=torch.float64) for _ in range(model.n_layers)]
    logits = []
    for t, token in enumerate(tokens.tolist()):
        embedded = model.W_E[token]
        v = centred(embedded) / spread(embedded)
        scale: dict[Any, Tensor] = {"embedding": 1 / spread(embedded)}
        for layer in range(model.n_layers):
            x = on_x(layer, t, (v @ weights.D_x).clamp(min=0))
            turned = turn(x, t, weights.frequencies)
            query, key = on_query(layer, t, turned), on_key(layer, t, turned)
            a = torch.einsum("hn,hnd->hd", query, states[layer])
            run.x[layer, t], run.key[layer, t], run.scale[layer, t] = x, key, dict(scale)
            write = on_write(layer, t, key[:, :, None] * v, run)
            states[layer] = after(layer, t, states[layer] + write)
            run.state[layer, t] = states[layer]
            gate = torch.einsum("hd,hdn->hn", centred(a) / spread(a), weights.D_y).clamp(min=0)
            y = on_y(layer, t, x * gate)
            run.y[layer, t], run.gate[layer, t] = y, gate
            u = torch.einsum("hn,hnd->d", y, weights.E)
            total = v + centred(u) / spread(u)
            scale[layer] = 1 / spread(u)
            scale = {source: c / spread(total) for source, c in scale.items()}
            v = centred(total) / spread(total)
        logits.append(v @ model.W_U)
    run.logits = torch.stack(logits)
    return run
