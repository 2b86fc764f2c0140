"""Reading parameters in the space of tokens (Dar et al. 2022, "Analyzing Transformers in Embedding Space"). No input is involved.

    neuron_tokens(model, 2, [5], side="value")    tokens that neuron 5 promotes, with scores
    head_pairs(model, 1, 3, "ov")                                token pairs (read, promoted) of the head's largest entries
    layer_alignment(model_a, model_b, "values")                  which layer of one model is which of another?

With E [vocab, d_model] the token vectors, a channel mixer's keys K and values V [neuron, d_model] become K Eᵀ and V Eᵀ, and a head's two
maps become token × token matrices, E W_Q W_Kᵀ Eᵀ (query token, key token) and E W_V W_O Eᵀ (token read, token promoted). The paper's models
tie embedding and unembedding; where they are not tied, what reads is projected with the embedding and what writes with the unembedding.
Norms and gates are left out, and so are positions: a rotary head's QK map is the one at distance 0.

BDH's columns of D_x are keys and the rows of E values, neuron h·N + j being neuron j of head h; its heads have no weights of their own.
Mamba's queries and keys go through a convolution and a nonlinearity, so no bilinear form of tokens exists: refused in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.instrument.errors import suggestion
from workbench.instrument.hooked_model import heads_first, main_point
from workbench.lab.catalogue import implements

SIDES = ("key", "value")
MAPS = ("qk", "ov")
PARAMETERS = ("keys", "values", "query", "key", "value", "output")


class NotBilinear(ValueError):
    """A layer without the weights that a reading in embedding space is made of."""


@torch.no_grad()
def neurons(model: Any, layer: int, side: str) -> Tensor:
    """A channel mixer's keys (what each neuron responds to) or values (what it adds), [neuron, d_model].

    Raises:
        NotBilinear: a layer without neurons. ValueError: an unknown side or layer.
    """
    if side not in SIDES:
        raise ValueError(f"Unknown side {side!r}.{suggestion(side, SIDES)} Expected 'key' or 'value'.")
    layer = _layer(model, layer)
    shared: Any = getattr(model, "weights", None)
    if hasattr(shared, "D_x"):  # BDH: one set for every layer, [head, d_model, neuron] and [head, neuron, d_model]
        return shared.D_x.transpose(1, 2).flatten(0, 1) if side == "key" else shared.E.flatten(0, 1)
    mlp = getattr(model.blocks[layer], "mlp", None)
    if mlp is None or not hasattr(mlp, "W_in") or not hasattr(mlp, "W_out"):
        raise NotBilinear(
            f"Layer {layer} of {model.name} has no channel mixer with W_in and W_out, so no neurons to read."
        )
    gate = getattr(mlp, "gate", None)
    reads = mlp.W_in if gate is None else gate.weight.T  # of a gated mixer, what decides whether the neuron is on
    return reads.T if side == "key" else mlp.W_out


@torch.no_grad()
def head_map(model: Any, layer: int, head: int, which: str = "ov") -> tuple[Tensor, Tensor]:
    """A head's map in two factors, left [d_model, n] and right [n, d_model]: W_Q and W_Kᵀ, or W_V and W_O.

    Raises:
        NotBilinear: a mixer without such weights. ValueError: an unknown map, layer or head.
    """
    if which not in MAPS:
        raise ValueError(f"Unknown map {which!r}.{suggestion(which, MAPS)} Expected 'qk' or 'ov'.")
    layer = _layer(model, layer)
    names = ("query", "key") if which == "qk" else ("value", "output")
    first, second = (head_weights(model, layer, name) for name in names)
    n_heads = model.mixers[layer].describe()["n_heads"]
    if not 0 <= head < n_heads:
        raise ValueError(f"There is no head {head} in layer {layer}: it has heads 0..{n_heads - 1}.")
    left, right = (part[head * len(part) // n_heads] for part in (first, second))
    return left, right.T if which == "qk" else right


def head_weights(model: Any, layer: int, name: str) -> Tensor:
    """A projection of a mixer by head or group of heads: [head, d_model, width], of the output [head, width, d_model].

    Args: name: `"query"`, `"key"`, `"value"` or `"output"`.

    Raises:
        NotBilinear: a mixer that has no such linear map, or does more than that with what it gives.
    """
    mixer = model.mixers[layer]
    linear = getattr(mixer, name, None)
    if not isinstance(linear, torch.nn.Linear):
        kind = mixer.describe()["kind"]
        raise NotBilinear(
            f"Layer {layer} of {model.name} ({kind}) has no linear map {name!r} of its heads, so no reading in embedding space. "
            "Expected a layer whose queries, keys, values and output are linear in the stream."
        )
    if name != "output" and not _only_scaled(model, layer, name, linear):
        raise NotBilinear(
            f"Layer {layer} of {model.name} ({mixer.describe()['kind']}) does more to its {name} than a linear map (a convolution, a "
            "nonlinearity, several maps per head), so no reading in embedding space. Expected a layer that does not."
        )
    record = mixer.describe()
    heads = {"key": record["n_key_heads"], "value": record["n_value_heads"]}.get(name, record["n_heads"])
    if name == "output":
        return linear.weight.T.unflatten(0, (heads, -1))
    return linear.weight.unflatten(0, (heads, -1)).transpose(1, 2)


def _only_scaled(model: Any, layer: int, name: str, linear: torch.nn.Linear) -> bool:
    """Whether the layer's signal of role `name` is the linear map's output up to one factor: seen in a run, not guessed from its kind."""
    point = main_point(model.hook_points.points.values(), name, layer)
    if point is None:
        return False
    found: list[Tensor] = []
    handle = linear.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    try:
        tokens = (torch.arange(6, device=model.device) * 7 % model.vocab_size)[None]
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names=point.name if point.steps == 1 else f"{point.name}@0")
    finally:
        handle.remove()
    signal = heads_first(next(iter(cache.values())), point).transpose(1, 2).double()  # [batch, pos, head, width]
    heads = {"key": "n_key_heads", "value": "n_value_heads"}.get(name, "n_heads")
    if (
        not found
        or signal.shape[2] != model.mixers[layer].describe()[heads]
        or signal[0, 0].numel() != found[0].shape[-1]
    ):
        return False
    signal, made = signal.flatten(2), found[0].double()
    factor = (signal * made).sum() / made.square().sum().clamp(min=1e-300)
    return bool((signal - factor * made).norm() <= 1e-4 * signal.norm())


@torch.no_grad()
def project(model: Any, vectors: Tensor, side: str) -> Tensor:
    """Vectors [..., d_model] over tokens [..., vocab]: by the embedding what reads (`"key"`), by the unembedding what writes."""
    if side not in SIDES:
        raise ValueError(f"Unknown side {side!r}.{suggestion(side, SIDES)} Expected 'key' or 'value'.")
    return vectors @ (model.W_E.T if side == "key" else model.W_U)


@implements("embedding-space", "probe", "neuron_tokens")
def neuron_tokens(
    model: Any, layer: int, numbers: Sequence[int] | None = None, side: str = "value", k: int = 10
) -> list[list[tuple[int, float]]]:
    """The k tokens of largest score of each neuron, as (token id, score), for all neurons of a layer or some."""
    vectors = neurons(model, layer, side)
    if numbers is not None:
        wrong = [number for number in numbers if not 0 <= number < len(vectors)]
        if wrong:
            raise ValueError(f"There is no neuron {wrong[0]} in layer {layer}: it has neurons 0..{len(vectors) - 1}.")
        vectors = vectors[list(numbers)]
    best = project(model, vectors, side).topk(min(k, model.vocab_size), dim=-1)
    return [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(best.indices, best.values, strict=True)]


@implements("embedding-space", "probe", "head_pairs")
@torch.no_grad()
def head_pairs(
    model: Any, layer: int, head: int, which: str = "ov", k: int = 20, rows: int = 1024
) -> list[tuple[int, int, float]]:
    """The k largest entries of a head's token × token matrix, as (token, token, value); `rows` of it are formed at a time.

    Of `"qk"`: (query token, key token). Of `"ov"`: (token read, token promoted).
    """
    left, right = head_map(model, layer, head, which)
    first = model.W_E @ left
    second = right @ (model.W_E.T if which == "qk" else model.W_U)
    values, places = first.new_empty(0), torch.empty(0, dtype=torch.long, device=first.device)
    for start in range(0, len(first), rows):
        entries = (first[start : start + rows] @ second).flatten()
        found = entries.topk(min(k, len(entries)))
        values = torch.cat([values, found.values])
        places = torch.cat([places, found.indices + start * second.shape[1]])
        kept = values.topk(min(k, len(values))).indices
        values, places = values[kept], places[kept]
    pairs = np.stack(np.divmod(places.cpu().numpy(), second.shape[1]), 1).tolist()
    return [(a, b, value) for (a, b), value in zip(pairs, values.tolist(), strict=True)]


@dataclass(frozen=True)
class KeyValueOverlap:
    """Do neurons promote what they respond to? Shares of the top k tokens that key and value have in common.

    Args:
        paired: of each neuron's own key and value, [neuron]. random: of a key with the value of another neuron of the layer, [neuron].
    """

    layer: int
    k: int
    paired: NDArray[np.float64]
    random: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "layer": self.layer,
            "k": self.k,
            "paired": float(self.paired.mean()),
            "random": float(self.random.mean()),
        }


@implements("embedding-space", "probe", "key_value_overlap")
def key_value_overlap(model: Any, layer: int, k: int = 50, seed: int = 0) -> KeyValueOverlap:
    """R_k of each neuron: |top k of its key ∩ top k of its value| / k, beside keys and values that do not belong together.

    Raises:
        ValueError: k not below the vocabulary, or a layer of one neuron.
    """
    keys, values = (project(model, neurons(model, layer, side), side) for side in SIDES)
    if not 0 < k < model.vocab_size or len(keys) < 2:
        raise ValueError(f"k is {k}; expected 1..{model.vocab_size - 1}, and a layer of at least two neurons.")
    tops = [torch.zeros_like(x, dtype=torch.bool).scatter(1, x.topk(k).indices, True) for x in (keys, values)]
    shift = int(np.random.default_rng(seed).integers(1, len(keys)))
    shares = [(tops[0] & other).sum(1).double().numpy(force=True) / k for other in (tops[1], tops[1].roll(shift, 0))]
    return KeyValueOverlap(_layer(model, layer), k, *shares)


@dataclass(frozen=True)
class LayerAlignment:
    """How well layers of two models match. similarity [layer of the first, layer of the second]: mean |correlation|, see `layer_alignment`.

    assignment: for each layer of the first its partner in the second (one to one, of largest total similarity).
    """

    parameter: str
    space: str
    similarity: NDArray[np.float64]
    assignment: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of layers that are assigned to the layer of their own number."""
        return float(np.mean([partner == number for number, partner in enumerate(self.assignment)]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parameter": self.parameter, "space": self.space, "similarity": self.similarity.tolist(),
            "assignment": list(self.assignment), "accuracy": self.accuracy,
        }  # fmt: skip


@implements("embedding-space", "probe", "layer_alignment")
@torch.no_grad()
def layer_alignment(first: Any, second: Any, parameter: str = "values", space: str = "tokens") -> LayerAlignment:
    """Match the layers of two models by one kind of parameter, read as vectors over tokens.

    Each vector of one layer (a neuron, or a head's column) is compared with each of the other by |correlation|, and takes its best; the
    mean of these, in both directions, is the layers' similarity. Models of different widths can be compared, since both speak about tokens.

    Args:
        parameter: `"keys"`, `"values"` of neurons, or `"query"`, `"key"`, `"value"`, `"output"` of heads.
        space: `"tokens"`, or `"raw"`: the vectors as they are, for control; two seeds share no basis, so nothing should match.

    Raises:
        ValueError: an unknown parameter or space, other vocabularies, raw vectors of other widths. NotBilinear: a layer without it.
    """
    if parameter not in PARAMETERS:
        raise ValueError(
            f"Unknown parameter {parameter!r}.{suggestion(parameter, PARAMETERS)} Expected one of {', '.join(PARAMETERS)}."
        )
    if space not in ("tokens", "raw"):
        raise ValueError(f"Unknown space {space!r}. Expected 'tokens' or 'raw'.")
    if space == "tokens" and first.vocab_size != second.vocab_size:
        raise ValueError(
            f"The models have {first.vocab_size} and {second.vocab_size} tokens. Expected the same vocabulary."
        )
    if space == "raw" and first.d_model != second.d_model:
        raise ValueError(f"The models have widths {first.d_model} and {second.d_model}. Expected space='tokens'.")
    vectors = [
        [_vectors(model, layer, parameter, space) for layer in range(model.n_layers)] for model in (first, second)
    ]
    similarity = np.array([[_similarity(a, b) for b in vectors[1]] for a in vectors[0]])
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    partner = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return LayerAlignment(parameter, space, similarity, tuple(partner.get(n, -1) for n in range(len(similarity))))


def _vectors(model: Any, layer: int, parameter: str, space: str) -> Tensor:
    """All vectors of a kind of parameter, centred and of unit length, [vector, vocab or d_model]."""
    if parameter in ("keys", "values"):
        x, side = neurons(model, layer, parameter.removesuffix("s")), parameter.removesuffix("s")
    else:
        weights, side = head_weights(model, layer, parameter), "value" if parameter == "output" else "key"
        x = (weights if parameter == "output" else weights.transpose(1, 2)).flatten(0, 1)
    x = (project(model, x, side) if space == "tokens" else x).double()
    return torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def _similarity(a: Tensor, b: Tensor) -> float:
    correlation = (a @ b.T).abs()
    return float(correlation.amax(1).mean() + correlation.amax(0).mean()) / 2


def _layer(model: Any, layer: int) -> int:
    if not -model.n_layers <= layer < model.n_layers:
        raise ValueError(f"Layer {layer} is out of range: this model has layers 0..{model.n_layers - 1}.")
    return layer % int(model.n_layers)
