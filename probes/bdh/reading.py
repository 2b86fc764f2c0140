"""What a token reads: from a logit back to (layer, head, past token), and from one score back to the neuron pairs that match.

a_t = Σ_{τ<t} S_{tτ} v_τ with S_{tτ} = q_t·k_τ, so with g = ∂logit/∂a_t the product S_{tτ} ⟨v_τ, g⟩ is what reading token τ contributes. The
gradient is taken with every norm's scale as it was in the run. Then it is exact for the last layer: its contributions sum to the part of
the logit that the last layer's u adds, because the gate is homogeneous in a. Below the last layer it is first-order: the gates above are
taken as linear at the run's own point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh.capture import (
    checked_layer,
    checked_neuron,
    checked_position,
    require_bdh,
    token_strings,
)
from workbench.instrument.interventions import FreezeNorm
from workbench.lab.catalogue import implements


@dataclass(frozen=True)
class Reading:
    """What token `at` reads with at one layer: rotated query [batch, head, neuron], a [batch, head, d_model] and ∂logit/∂a, same shape."""

    layer: int
    at: int
    query: Tensor
    a: Tensor
    gradient: Tensor


def reading_gradient(
    model: Any, tokens: Any, layer: int, at: int, logit: int | Tensor, *, hooks: Sequence[Any] = ()
) -> Reading:
    """The reading of one layer by token `at`, and how the logit depends on it with frozen norm scales.

    Args:
        logit: a token id, or a direction over the vocabulary [vocab] (e.g. +1 and −1 for a logit difference).
    """
    model = require_bdh(model)
    checked_layer(model, layer)
    tokens = model.to_tokens(tokens)
    at = checked_position(at, tokens.shape[1])
    a, gradients = _gradients(model, tokens, at, logit, [layer], hooks)
    name = f"blocks.{layer}.attn.hook_rot_q"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=name, positions=at, hooks=hooks)
    return Reading(layer, at, cache[name][:, :, 0], a[layer], gradients[layer])


def _gradients(
    model: BDH, tokens: Tensor, at: int, logit: int | Tensor, layers: Sequence[int], hooks: Sequence[Any]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """a_at and ∂logit/∂a_at by layer, each [batch, head, d_model]."""
    direction = _direction(model, logit)
    with torch.no_grad():
        _, scales = model.run_with_cache(tokens, role="norm_scale", hooks=hooks)
    names = [f"blocks.{layer}.hook_a" for layer in layers]
    frozen = [*hooks, FreezeNorm.from_cache(scales)]
    _, cache = model.run_with_cache(
        tokens,
        names=names,
        positions=at,
        hooks=frozen,
        gradients_of=lambda logits: (logits[:, at] @ direction.to(logits)).sum(),
    )
    values = {layer: cache[name][:, :, 0] for layer, name in zip(layers, names, strict=True)}
    return values, {layer: cache.gradients[name][:, :, 0] for layer, name in zip(layers, names, strict=True)}


def _direction(model: BDH, logit: int | Tensor) -> Tensor:
    """A direction over the vocabulary, [vocab]. Raises ValueError for a token or a shape that does not exist."""
    size = model.vocab_size
    if isinstance(logit, Tensor) and logit.dim():
        if logit.shape != (size,):
            raise ValueError(
                f"logit has shape {tuple(logit.shape)}; expected a token id or a direction of shape ({size},)."
            )
        return logit
    if not 0 <= int(logit) < size:
        raise ValueError(f"logit is {int(logit)}; expected a token id 0..{size - 1}.")
    direction = torch.zeros(size, dtype=torch.float64)
    direction[int(logit)] = 1
    return direction


@dataclass(frozen=True)
class ReadCircuit:
    """What token `at` reads from each earlier token, per layer and head: all [batch, layer, head, pos] for positions 0 … at − 1.

    scores = S_{tτ} (signed), worth = ⟨v_τ, ∂logit/∂a⟩, contributions = their product.
    """

    at: int
    tokens: tuple[tuple[str, ...], ...]
    scores: Tensor
    worth: Tensor

    @property
    def contributions(self) -> Tensor:
        """[batch, layer, head, pos]."""
        return self.scores * self.worth

    def top(self, k: int = 10, sequence: int = 0) -> list[tuple[int, int, int, float]]:
        """The largest contributions by absolute value: (layer, head, past token, contribution)."""
        flat = self.contributions[sequence].flatten()
        _, heads, past = self.contributions.shape[1:]
        chosen = flat.abs().topk(min(k, len(flat))).indices.tolist()
        return [(i // (heads * past), i // past % heads, i % past, float(flat[i])) for i in chosen]

    def __repr__(self) -> str:
        return f"ReadCircuit(reading token {self.at}; batch layer head pos = {tuple(self.scores.shape)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{layer}</td><td>{head}</td><td>{past} “{escape(self.tokens[0][past])}”</td><td>{value:.4g}</td></tr>"
            for layer, head, past, value in self.top()
        )
        return (
            f"<table><caption>What token {self.at} “{escape(self.tokens[0][self.at])}” reads (first sequence)</caption>"
            f"<thead><tr><th>layer</th><th>head</th><th>past token</th><th>contribution</th></tr></thead><tbody>{rows}</tbody></table>"
        )


@implements("bdh", "probe", "read_circuit")
def read_circuit(
    model: Any, tokens: Any, *, logit: int | Tensor, at: int = -1, hooks: Sequence[Any] = ()
) -> ReadCircuit:
    """Contributions of every (layer, head, past token) to a logit of token `at` through its own reading. Memory: O(layers · heads · pos).

    Position 0 reads nothing: at = 0 is a ValueError.
    """
    model = require_bdh(model)
    tokens = model.to_tokens(tokens)
    at = checked_position(at, tokens.shape[1])
    if at == 0:
        raise ValueError("at is 0: the first token reads nothing. Expected a later token.")
    layers = list(range(model.n_layers))
    _, gradients = _gradients(model, tokens, at, logit, layers, hooks)
    queries: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    worth: dict[int, Tensor] = {}

    def keep_query(q: Tensor, hook: Any) -> None:
        queries[hook.layer()] = q[:, :, at]

    def keep_scores(k: Tensor, hook: Any) -> None:  # queries are rotated before keys
        scores[hook.layer()] = torch.einsum("bhn,bhtn->bht", queries[hook.layer()], k[:, :, :at])

    def keep_worth(v: Tensor, hook: Any) -> None:
        gradient = gradients[hook.layer()]
        worth[hook.layer()] = torch.einsum("btd,bhd->bht", v[:, :at].to(gradient), gradient)

    points = (("hook_rot_q", keep_query), ("hook_rot_k", keep_scores), ("hook_value", keep_worth))
    own = [(f"blocks.*.attn.{point}", function) for point, function in points]
    with torch.no_grad():
        model.run_with_hooks(tokens, hooks=[*hooks, *own], return_type=None)
    strings = tuple(tuple(token_strings(model, row)) for row in tokens)
    stacked = [torch.stack([found[layer] for layer in layers], 1) for found in (scores, worth)]
    return ReadCircuit(at, strings, *stacked)


@dataclass(frozen=True)
class MatchingPairs:
    """S_{tτ} of one head as a sum over rotary pairs (2p, 2p + 1), largest first; `score` is the whole sum, `pairs` [k] the pairs kept.

    contribution = same + cross, each [k]. same: the pair's neurons fired alike at both tokens, times cos ω(t − τ). cross: one
    neuron at t against the other at τ, times sin ω(t − τ): what rotation alone makes of a match. x_now and x_past are [k, 2].
    """

    layer: int
    head: int
    at: int
    past: int
    score: float
    pairs: Tensor
    contribution: Tensor
    same: Tensor
    cross: Tensor
    x_now: Tensor
    x_past: Tensor

    def __repr__(self) -> str:
        return (
            f"MatchingPairs(layer {self.layer}, head {self.head}: token {self.at} reads {self.past} with {self.score:.4g}; "
            f"{len(self.pairs)} pairs hold {float(self.contribution.sum()):.4g})"
        )


@implements("bdh", "probe", "matching_pairs")
@torch.no_grad()
def matching_pairs(
    model: Any,
    tokens: Any,
    layer: int,
    head: int,
    *,
    past: int,
    at: int = -1,
    k: int = 20,
    hooks: Sequence[Any] = (),
) -> MatchingPairs:
    """Which neuron pairs make token `at` read token `past` (of one sequence). `k` at least the number of pairs gives all of S."""
    model = require_bdh(model)
    checked_layer(model, layer)
    checked_neuron(model, head, 0, "head of")
    tokens = model.to_tokens(tokens)
    if tokens.shape[0] != 1:
        raise ValueError(f"Expected one sequence of tokens, got a batch of {tokens.shape[0]}.")
    at, past = checked_position(at, tokens.shape[1]), checked_position(past, tokens.shape[1], "past")
    if past >= at:
        raise ValueError(f"past is {past} and at is {at}: a token reads earlier tokens only. Expected past < at.")
    site = f"blocks.{layer}.attn."
    _, cache = model.run_with_cache(
        tokens, names=[site + "hook_q", site + "hook_k"], heads=head, positions=[past, at], hooks=hooks
    )
    now = cache[site + "hook_q"][0, 0, 1].double().unflatten(0, (-1, 2))
    then = cache[site + "hook_k"][0, 0, 0].double().unflatten(0, (-1, 2))
    cosine, sine = (
        table[0, 0].double() for table in model.weights.rotation(torch.tensor([[past, at]], device=tokens.device))
    )
    # the angle between the two tokens from the model's own float32 phases, so that the pairs sum to the model's score
    turned = cosine[1] * cosine[0] + sine[1] * sine[0], sine[1] * cosine[0] - cosine[1] * sine[0]
    same = (now * then).sum(-1) * turned[0]
    cross = (now[:, 0] * then[:, 1] - now[:, 1] * then[:, 0]) * turned[1]
    total = same + cross
    kept = total.abs().topk(min(k, len(total))).indices
    return MatchingPairs(
        layer, head, at, past, float(total.sum()), kept, total[kept], same[kept], cross[kept], now[kept], then[kept]
    )
