"""Who wrote BDH's state: an exact sum over (source layer, neuron, token) and the token embeddings.

With the norms' scales as they were in the run (`probes.bdh.capture`),

    ρ_l[j] = Σ_τ c_{τ,emb→l} k_τ[j] cen(embedding_τ) + Σ_{k<l} Σ_i σ̂^{(k→l)}[i, j] cen(E_i)
    σ̂^{(k→l)}[i, j] = Σ_τ c_{τ,k→l} y_{τ,k}[i] k_τ[j]

The paper instead calls E σ^{(l−1→l)} the state. `StateAttribution.explained` says how much of the true state that is. Since the parts
need not be orthogonal, a part has a *share* ⟨part, ρ⟩ / ‖ρ‖² (shares sum to 1; one can be negative) and a *cosine*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import (
    EMBEDDING,
    Source,
    Synapse,
    Writes,
    capture_writes,
    checked_position,
    outer,
    require_bdh,
    token_strings,
)
from workbench.lab.catalogue import implements


@dataclass(frozen=True)
class Explained:
    """How well the paper's account of the state fits the true one, per sequence and head: all [batch, head].

    share: direct additive share of layer l − 1. cosine: between ρ and Σ k ⊗ LN(E y_{l−1}), the paper's value. cosine_sigma: between ρ
    and E σ with σ = Σ y_{l−1} kᵀ, no norm at all.
    """

    layer: int
    share: Tensor
    cosine: Tensor
    cosine_sigma: Tensor

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{name} {float(getattr(self, name).mean()):.3f}" for name in ("share", "cosine", "cosine_sigma")
        )
        return f"Explained(layer {self.layer}: {numbers}, mean over sequences and heads)"


@dataclass(frozen=True)
class StateAttribution:
    """The state of one layer after token `at`, as a sum of parts. `state` [batch, head, neuron, d_model] is the model's own.

    `error` is the largest deviation of the sum of all parts from the model's state, relative to the state's largest entry.
    """

    writes: Writes
    at: int
    state: Tensor
    tokens: tuple[tuple[str, ...], ...]
    error: float

    @property
    def layer(self) -> int:
        """Layer of the state."""
        return self.writes.layer

    def part(self, source: Source) -> Tensor:
        """What one source wrote, [batch, head, neuron, d_model]. `source` is "embedding" or a lower layer's number."""
        return self.writes.state(self.at, source)

    def shares(self) -> dict[Source, Tensor]:
        """⟨part, ρ⟩ / ‖ρ‖² of every source, [batch, head]; they sum to 1 up to `error`."""
        total = self.state.square().sum((-1, -2))
        return {source: (self.part(source) * self.state).sum((-1, -2)) / total for source in self.writes.sources}

    def cosines(self) -> dict[Source, Tensor]:
        """cos(part, ρ) of every source, [batch, head]."""
        return {source: cosine(self.part(source), self.state) for source in self.writes.sources}

    def explained(self) -> Explained:
        """Compare with the paper's account. Raises ValueError for layer 0, whose state comes from embeddings alone."""
        if self.layer == 0:
            raise ValueError(
                "Layer 0 has no synapses: its state is written by token embeddings alone. Expected layer 1 or higher."
            )
        below = self.layer - 1
        raw = torch.einsum("bhtn,hnd->btd", self.writes.y[below], self.writes.encoder)
        normal = raw / (raw.var(-1, correction=0, keepdim=True) + self.writes.norm_eps).sqrt()
        keys = self.writes.keys
        return Explained(
            self.layer,
            self.shares()[below],
            cosine(outer(keys, normal, self.at), self.state),
            cosine(outer(keys, raw, self.at), self.state),
        )

    def __repr__(self) -> str:
        shares = ", ".join(f"{source} {float(share.mean()):.3f}" for source, share in self.shares().items())
        return f"StateAttribution(layer {self.layer} after token {self.at}; shares {shares}; reconstruction error {self.error:.1e})"

    def _repr_html_(self) -> str:
        cosines = self.cosines()
        rows = "".join(
            f"<tr><td>{escape(str(source))}</td><td>{float(share.mean()):.3f}</td><td>{float(cosines[source].mean()):.3f}</td></tr>"
            for source, share in self.shares().items()
        )
        return (
            f"<table><caption>Who wrote the state of layer {self.layer} (after token {self.at}, mean over sequences and heads; "
            f"reconstruction error {self.error:.1e})</caption>"
            f"<thead><tr><th>source</th><th>share</th><th>cosine</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of matrices [..., neuron, d_model] -> [...]; 0 where one of them is zero."""
    norms = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    return (a * b).sum((-1, -2)) / norms.clamp(min=torch.finfo(a.dtype).tiny)


@implements(
    "bdh",
    "probe",
    "attribute_state",
    note="exact for the published code, where the paper's Eσ is a part of the state only",
)
@torch.no_grad()
def attribute_state(
    model: Any, tokens: Any, layer: int, *, at: int = -1, mask: Tensor | None = None, hooks: Sequence[Any] = ()
) -> StateAttribution:
    """Decompose the state of a layer after token `at` (a position in the batch's own counting, padding included).

    Raises TypeError for a model that is no BDH, ValueError for a layer or position that does not exist.
    """
    model = require_bdh(model)
    tokens = model.to_tokens(tokens)
    at = checked_position(at, tokens.shape[1])
    writes = capture_writes(model, tokens, layer, mask=mask, hooks=hooks)
    state = model.states(tokens, at, layers=layer, hooks=hooks, mask=mask)[layer][:, 0]
    rebuilt = torch.stack([writes.state(at, source) for source in writes.sources]).sum(0)
    error = float((rebuilt - state).abs().max() / state.abs().max().clamp(min=torch.finfo(state.dtype).tiny))
    return StateAttribution(writes, at, state, tuple(tuple(token_strings(model, row)) for row in tokens), error)


def explained_by_paper(
    model: Any, tokens: Any, *, at: int = -1, mask: Tensor | None = None, hooks: Sequence[Any] = ()
) -> list[Explained]:
    """How much of the state the paper's account holds, for every layer that has synapses (1 … L − 1); one run per layer."""
    layers = range(1, require_bdh(model).n_layers)
    return [attribute_state(model, tokens, layer, at=at, mask=mask, hooks=hooks).explained() for layer in layers]


@dataclass(frozen=True)
class Write:
    """One term of a sum: what `neuron` (head, number) of `source` wrote at a token; neuron is None for an embedding.

    value is the term, share its part of the whole sum.
    """

    source: Source
    neuron: tuple[int, int] | None
    position: int
    token: str
    value: float
    share: float

    def __str__(self) -> str:
        who = (
            f"embedding of “{self.token}”"
            if self.neuron is None
            else f"y{self.source}[{self.neuron[0]}·{self.neuron[1]}] at “{self.token}”"
        )
        return f"{self.share:+.1%} {who} ({self.position}): {self.value:+.4g}"


@dataclass(frozen=True)
class Authors:
    """The largest terms of a sum, what they sum to together (`listed`), and the whole sum (`total`)."""

    what: str
    writes: tuple[Write, ...]
    listed: float
    total: float

    def __repr__(self) -> str:
        return f"Authors of {self.what}: {len(self.writes)} terms hold {self.listed:.4g} of {self.total:.4g}"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(str(write))}</td></tr>" for write in self.writes)
        return f"<table><caption>{escape(repr(self))}</caption><tbody>{rows}</tbody></table>"


@implements("bdh", "probe", "who_wrote")
def who_wrote(
    attribution: StateAttribution,
    head: int,
    *,
    row: int | Tensor | None = None,
    column: int | Tensor | None = None,
    sequence: int = 0,
    k: int = 20,
) -> Authors:
    """The tokens and neurons that wrote a row, a column or an entry of one head's state: the k largest terms of rᵀ ρ c.

    Args:
        row: a neuron's number, or a vector r [neuron]. column: a coordinate of the stream, or a vector c [d_model].
            One of them may be left out: then it is what is found there, as a unit vector, so that the sum is the norm of the row or column.

    Every (source, neuron, token) is one term: c_τ y_τ[i] (r·k_τ) ⟨cen(E_i), c⟩; every token's embedding another.
    Raises ValueError if both are missing or do not fit.
    """
    writes, at = attribution.writes, attribution.at
    batch, heads, neurons, width = attribution.state.shape
    if not 0 <= sequence < batch:
        raise ValueError(f"sequence is {sequence}; the batch has sequences 0..{batch - 1}.")
    if not 0 <= head < heads:
        raise ValueError(f"head is {head}; expected 0..{heads - 1}.")
    if row is None and column is None:
        raise ValueError("Give row (a neuron), column (a coordinate or direction of the stream), or both.")
    state = attribution.state[sequence, head]
    left = None if row is None else _selector(row, neurons, "row", state)
    right = None if column is None else _selector(column, width, "column", state)
    if right is None:
        assert left is not None
        right = _unit(left @ state)
    if left is None:
        left = _unit(state @ right)
    reach = writes.keys[sequence, head, : at + 1] @ left  # r·k_τ, [pos]
    terms: list[tuple[Source, Tensor]] = []
    for source in writes.sources:
        weight = reach * writes.coefficients[source][sequence, : at + 1]
        if source == EMBEDDING:
            terms.append((source, weight * (writes.embedding[sequence, : at + 1] @ right)))
        else:
            y = writes.y[int(source)][sequence, :, : at + 1]
            terms.append((source, y * weight[None, :, None] * (writes.encoder @ right)[:, None, :]))
    name = " ".join(
        f"{label} {value if isinstance(value, int) else 'vector'}"
        for label, value in (("row", row), ("column", column))
        if value is not None
    )
    return _largest(f"{name} of head {head}, layer {attribution.layer}", terms, attribution.tokens[sequence], k)


@implements("bdh", "probe", "who_wrote_synapse")
def who_wrote_synapse(attribution: StateAttribution, synapse: Synapse, *, sequence: int = 0, k: int = 20) -> Authors:
    """The tokens that wrote one synapse: the k largest terms c_τ y_τ[i] k_τ[j] of σ̂.

    Raises ValueError if the attribution is of another layer than the synapse's.
    """
    if synapse.target_layer != attribution.layer:
        raise ValueError(
            f"{synapse} is held by layer {synapse.target_layer}; this attribution is of layer {attribution.layer}."
        )
    writes, stop = attribution.writes, attribution.at + 1
    heads, neurons = writes.encoder.shape[:2]
    for what, (head, neuron) in (("source", synapse.source), ("target", synapse.target)):
        if not (0 <= head < heads and 0 <= neuron < neurons):
            raise ValueError(f"{what} of {synapse} does not exist: heads 0..{heads - 1}, neurons 0..{neurons - 1}.")
    if not 0 <= sequence < writes.keys.shape[0]:
        raise ValueError(f"sequence is {sequence}; the batch has sequences 0..{writes.keys.shape[0] - 1}.")
    (a, i), (b, j) = synapse.source, synapse.target
    y = writes.y[synapse.source_layer][sequence, a, :stop, i]
    terms = writes.coefficients[synapse.source_layer][sequence, :stop] * y * writes.keys[sequence, b, :stop, j]
    spread = torch.zeros(heads, stop, neurons, dtype=terms.dtype)
    spread[a, :, i] = terms
    return _largest(str(synapse), [(synapse.source_layer, spread)], attribution.tokens[sequence], k)


def _selector(chosen: int | Tensor, size: int, what: str, like: Tensor) -> Tensor:
    if isinstance(chosen, Tensor) and chosen.dim():
        if chosen.shape != (size,):
            raise ValueError(
                f"{what} has shape {tuple(chosen.shape)}; expected a number or a vector of shape ({size},)."
            )
        return chosen.to(like)
    if not 0 <= int(chosen) < size:
        raise ValueError(f"{what} is {int(chosen)}; expected 0..{size - 1}.")
    vector = torch.zeros(size, dtype=like.dtype, device=like.device)
    vector[int(chosen)] = 1
    return vector


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def _largest(what: str, terms: Sequence[tuple[Source, Tensor]], tokens: Sequence[str], k: int) -> Authors:
    """terms per source: [pos] for the embedding, [head, pos, neuron] for a layer."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    total = sum(float(values.sum()) for _, values in terms)
    found: list[tuple[float, Source, tuple[int, int] | None, int]] = []
    for source, values in terms:
        flat = values.flatten()
        places = flat.abs().topk(min(k, len(flat))).indices
        for place in places[flat[places] != 0].tolist():
            value = float(flat[place])
            if source == EMBEDDING:
                found.append((value, source, None, place))
            else:
                _, pos, neurons = values.shape
                found.append((value, source, (place // (pos * neurons), place % neurons), place // neurons % pos))
    found.sort(key=lambda term: -abs(term[0]))
    whole = total if total else float("nan")
    kept = tuple(Write(source, neuron, t, tokens[t], value, value / whole) for value, source, neuron, t in found[:k])
    return Authors(what, kept, sum(write.value for write in kept), total)
