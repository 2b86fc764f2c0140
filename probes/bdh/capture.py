"""What the tokens of a run write into BDH's states: addresses of synapses, and the factors of one layer's writes.

    v_{τ,l} = c_{τ,emb→l} cen(embedding_τ) + Σ_{k<l} c_{τ,k→l} cen(E y_{τ,k}),     cen(z) = z − mean(z)
    c_{τ,emb→l} = 1 / (s_emb Π_{m<l} s_v,m),     c_{τ,k→l} = 1 / (s_u,k Π_{k≤m<l} s_v,m)

with s the scales that the layer norms divided by at token τ. This is exact for the published code, whose attention value is the residual
stream v. (The paper writes the value as LN(E y_{l−1}) instead; then only k = l − 1 would occur.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH

EMBEDDING = "embedding"
Source = str | int
"""Where a written vector comes from: `"embedding"`, or the number of the layer whose y wrote it."""


def require_bdh(model: Any, variants: bool = False) -> BDH:
    """The model itself. `variants`: the measurement also holds for the paper's residual and for a state that fades.

    Raises TypeError in words for anything but a BDH, ValueError for one that drops neurons out at random and for an unexpected variant.
    """
    if not isinstance(model, BDH):
        raise TypeError(
            f"Synapses are defined for BDH (models.build('bdh')); got {type(model).__name__}. "
            "For other recurrent models use model.trace_state and model.states."
        )
    if model.training and model.config.dropout:
        raise ValueError("The model is in training mode and drops out neurons at random. Call model.eval() first.")
    config = model.config
    if not variants and (config.residual != "stream" or config.decay):
        raise ValueError(
            f"residual={config.residual!r}, decay={config.decay}: what a state is made of is worked out for the published model, "
            "residual='stream' without decay, and would be wrong here. Sparsity, time scales, states and patterns can be measured."
        )
    return model


def neurons_per_head(model: BDH) -> int:
    """N = n / h."""
    return model.config.n_neurons // model.config.n_heads


def checked_position(at: int, length: int, what: str = "at") -> int:
    """A position from 0 or from the end, as one from 0. Raises ValueError outside the sequence."""
    if not -length <= at < length:
        raise ValueError(
            f"{what} is {at}; this sequence has positions 0..{length - 1} (negative ones count from the end)."
        )
    return at % length


def checked_layer(model: BDH, layer: int, what: str = "layer", first: int = 0) -> int:
    """Raises ValueError unless `first` ≤ layer < L."""
    if not first <= layer < model.n_layers:
        raise ValueError(f"{what} is {layer}; expected {first}..{model.n_layers - 1}.")
    return layer


def checked_neuron(model: BDH, head: int, neuron: int, what: str) -> None:
    """Raises ValueError unless (head, neuron) exists."""
    heads, neurons = model.config.n_heads, neurons_per_head(model)
    if not (0 <= head < heads and 0 <= neuron < neurons):
        raise ValueError(
            f"{what} (head, neuron) is {(head, neuron)}; this model has heads 0..{heads - 1} with neurons 0..{neurons - 1} each."
        )


@dataclass(frozen=True)
class Synapse:
    """From a neuron's gated activity y at one layer to a neuron's activity x at a later one.

    Args:
        source, target: (head, neuron). target_layer: layer whose state holds the synapse.
        source_layer: layer of y; left at -1 it is target_layer − 1, the paper's choice.

    Raises ValueError unless 0 ≤ source_layer < target_layer: a state holds what lower layers wrote.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    target_layer: int
    source_layer: int = -1

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            place = tuple(getattr(self, name))
            if len(place) != 2:
                raise ValueError(f"{name} of a synapse is {place}; expected (head, neuron).")
            object.__setattr__(self, name, place)
        if self.source_layer == -1:
            object.__setattr__(self, "source_layer", self.target_layer - 1)
        if not 0 <= self.source_layer < self.target_layer:
            raise ValueError(
                f"A synapse leads from y of a lower layer to x of a higher one; got {self.source_layer} → {self.target_layer}. "
                "Layer 0 has none: its values are token embeddings."
            )

    def __str__(self) -> str:
        return f"y{self.source_layer}[{self.source[0]}·{self.source[1]}] → x{self.target_layer}[{self.target[0]}·{self.target[1]}]"

    def check(self, model: BDH) -> None:
        """Raises ValueError unless both neurons and the layer exist in the model."""
        checked_layer(model, self.target_layer, f"target_layer of {self}", first=1)
        checked_neuron(model, *self.source, f"source of {self}")
        checked_neuron(model, *self.target, f"target of {self}")


def centred(x: Tensor) -> Tensor:
    """x minus its mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def centred_encoder(model: BDH) -> Tensor:
    """cen(E_i) for every neuron, [head, neuron, d_model]: what a firing neuron adds to the stream, up to its coefficient."""
    return centred(model.weights.E.detach())


def scale_names(layer: int) -> list[str]:
    """Hook points of the norm scales that determine the coefficients of everything written into `layer`."""
    return ["ln_embed.hook_scale", *(f"blocks.{m}.ln_{norm}.hook_scale" for m in range(layer) for norm in "uv")]


def coefficients(scales: dict[str, Tensor], layer: int) -> dict[Source, Tensor]:
    """c_{τ,source→layer} [batch, pos] for `"embedding"` and every lower layer, from scales [batch, pos, 1] by hook-point name."""
    found: dict[Source, Tensor] = {}
    onward = torch.ones_like(scales["ln_embed.hook_scale"])
    for source in reversed(range(layer)):
        onward = onward / scales[f"blocks.{source}.ln_v.hook_scale"]
        found[source] = (onward / scales[f"blocks.{source}.ln_u.hook_scale"])[..., 0]
    found[EMBEDDING] = (onward / scales["ln_embed.hook_scale"])[..., 0]
    return dict(sorted(found.items(), key=lambda item: -1 if item[0] == EMBEDDING else int(item[0])))


@dataclass(frozen=True)
class Writes:
    """Factors of what each token writes into the state of `layer`; everything in float32 at least.

    keys [batch, head, pos, neuron] are rotated x (the fixed frame), values [batch, pos, d_model] the residual stream,
    embedding [batch, pos, d_model] is cen(embedding), y[k] [batch, head, pos, neuron] and coefficients[source] [batch, pos] as above.
    Keys of padding are zero.
    """

    layer: int
    tokens: Tensor
    keys: Tensor
    values: Tensor
    embedding: Tensor
    y: dict[int, Tensor]
    coefficients: dict[Source, Tensor]
    encoder: Tensor
    norm_eps: float

    @property
    def sources(self) -> list[Source]:
        """`"embedding"` and the lower layers."""
        return list(self.coefficients)

    def checked_source(self, source: Source) -> Source:
        """Raises ValueError unless something of this source is written into the layer, and was kept."""
        if source not in self.coefficients:
            raise ValueError(f"Nothing from {source!r} is written into layer {self.layer}. Sources: {self.sources}.")
        if source != EMBEDDING and source not in self.y:
            raise ValueError(f"y of layer {source} was not kept in this run; kept: {sorted(self.y)}.")
        return source

    def written(self, source: Source) -> Tensor:
        """The part of the values that comes from one source, [batch, pos, d_model]; summed over sources they give `values`."""
        scale = self.coefficients[self.checked_source(source)][..., None]
        if source == EMBEDDING:
            return scale * self.embedding
        return scale * torch.einsum("bhtn,hnd->btd", self.y[int(source)], self.encoder)

    def state(self, at: int, source: Source | None = None) -> Tensor:
        """The state after token `at`, or the part of it that comes from one source: [batch, head, neuron, d_model]."""
        values = self.values if source is None else self.written(source)
        return outer(self.keys, values, at)


def outer(keys: Tensor, values: Tensor, at: int) -> Tensor:
    """Σ_{τ≤at} keys_τ ⊗ values_τ: [batch, head, pos, neuron], [batch, pos, d_model] -> [batch, head, neuron, d_model]."""
    return keys[:, :, : at + 1].mT @ values[:, None, : at + 1]


@torch.no_grad()
def capture_writes(
    model: Any,
    tokens: Any,
    layer: int,
    *,
    sources: Sequence[int] | None = None,
    mask: Tensor | None = None,
    hooks: Sequence[Any] = (),
) -> Writes:
    """Run the model once and keep what is written into the state of `layer`.

    Memory: pos · n numbers for the keys and for the y of each of the `sources` (None: all lower layers), the dense activations; no state
    and nothing of size n × n.
    With `hooks` that add to the stream the decomposition loses that part; `StateAttribution.error` shows it.
    Raises ValueError for a layer that does not exist.
    """
    model = require_bdh(model)
    checked_layer(model, layer)
    tokens = model.to_tokens(tokens)
    kept = list(range(layer)) if sources is None else list(sources)
    site = f"blocks.{layer}.attn."
    names = [
        "hook_embed",
        *scale_names(layer),
        *(f"blocks.{k}.hook_y" for k in kept),
        site + "hook_rot_k",
        site + "hook_value",
    ]
    _, cache = model.run_with_cache(tokens, names=names, hooks=hooks, mask=mask)
    precise = cache[site + "hook_rot_k"].dtype
    keys = cache[site + "hook_rot_k"]
    if mask is not None:
        keys = keys * mask.to(keys)[:, None, :, None]
    scales = {name: cache[name].to(precise) for name in scale_names(layer)}
    return Writes(
        layer=layer,
        tokens=tokens,
        keys=keys,
        values=cache[site + "hook_value"].to(precise),
        embedding=centred(cache["hook_embed"].to(precise)),
        y={k: cache[f"blocks.{k}.hook_y"].to(precise) for k in kept},
        coefficients=coefficients(scales, layer),
        encoder=centred_encoder(model).to(precise),
        norm_eps=model.config.norm_eps,
    )


def token_strings(model: BDH, tokens: Tensor) -> list[str]:
    """Each token [pos] as text, or as its number where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(int(token)) for token in tokens]
    return model.tokenizer.token_strings(tokens.tolist())
