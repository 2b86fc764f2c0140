"""What a BDH's neurons did in many sentences, and one number per sentence for a synapse, a neuron, or the residual stream.

For a synapse from neuron i (layer k) to neuron j (layer l), with C_t of `probes.bdh.synapses` and T tokens after the first (position 0
writes nothing), the statistics of a sentence are

strength       √(|C_T| / T): how strong the synapse is at the end. Unchanged by rotation, so one number per rotary pair
mean_strength  √(Σ_t |C_t| / T²): its mean strength over the sentence; a synapse that is written early counts for more
count          √(Σ_τ y_τ[i] x_τ[j] / T): how often and how strongly both fired, without positions

Dividing by T keeps sentence length from passing for a concept; the square root brings sums of products back to the unit of an
activation, so that a few extreme sentences do not decide a mean. It changes no rank. Neurons: mean activity over the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.parts.positions import rotate
from probes.bdh.capture import Synapse, checked_layer, require_bdh
from probes.progress import Progress
from workbench.instrument.errors import suggestion

STATISTICS = ("strength", "mean_strength", "count")


def check_statistic(statistic: str) -> None:
    """Raises ValueError with the nearest name."""
    if statistic not in STATISTICS:
        raise ValueError(
            f"Unknown statistic {statistic!r}.{suggestion(statistic, STATISTICS)} Expected one of {', '.join(STATISTICS)}."
        )


@dataclass(frozen=True)
class Recording:
    """Activity in some sentences, each without its first token.

    Args:
        y, x: by layer, for every sentence [pos, n], n = head · N + neuron. x is the key before rotation.
        resid: by layer, the mean residual stream entering it [sentence, d_model].
        rotation: cosine and sine of each rotary pair's angle at positions 1, 2, … [2, pos, N / 2].
        n_heads: heads that n is divided into.
    """

    y: dict[int, list[Tensor]]
    x: dict[int, list[Tensor]]
    n_heads: int
    rotation: Tensor
    resid: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("y", "x"):
            for layer, sentences in getattr(self, name).items():
                shapes = [tuple(sentence.shape) for sentence in sentences]
                wrong = [shape for shape in shapes if len(shape) != 2 or shape[1] != self.n_neurons or not shape[0]]
                if wrong or [shape[0] for shape in shapes] != self.lengths:
                    raise ValueError(
                        f"{name} of layer {layer} has shapes {shapes[:3]}…; expected [pos, {self.n_neurons}], each sentence's own length."
                    )
        pairs = self.n_neurons // self.n_heads // 2
        shape = tuple(self.rotation.shape)
        if len(shape) != 3 or shape[0] != 2 or shape[1] < max(self.lengths) or shape[2] != pairs:
            raise ValueError(f"rotation has shape {shape}; expected [2, {max(self.lengths)} or more, {pairs}].")

    @property
    def _any(self) -> list[Tensor]:
        return next(iter((self.x or self.y).values()))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sentence, the first left out."""
        return [len(sentence) for sentence in self._any]

    @property
    def n_neurons(self) -> int:
        """n, over all heads."""
        return int(self._any[0].shape[1])

    def __len__(self) -> int:
        return len(self._any)

    def targets(self, layer: int, head: int, sentence: int, statistic: str) -> Tensor:
        """The factors that y is multiplied with: x [1, pos, N], or real and imaginary part of every rotary pair [2, pos, N / 2]."""
        width = self.n_neurons // self.n_heads
        x = self.x[layer][sentence][:, head * width : (head + 1) * width]
        if statistic == "count":
            return x[None]
        cosine, sine = self.rotation[:, : len(x)].to(x)
        return torch.stack(rotate(x, cosine, sine, interleaved=True).unflatten(-1, (-1, 2)).unbind(-1))

    def mean_activity(self, activity: str, layer: int) -> Tensor:
        """Mean of x or y over tokens, [sentence, n]."""
        return torch.stack([sentence.mean(0) for sentence in getattr(self, activity)[layer]])

    def of(self, synapses: Sequence[Synapse], statistic: str) -> Tensor:
        """The statistic of every sentence and synapse, [sentence, synapse], one column at a time: O(pos) per entry."""
        check_statistic(statistic)
        width = self.n_neurons // self.n_heads
        out = torch.zeros(len(self), len(synapses), dtype=self._any[0].dtype)
        together: dict[tuple[int, int, int], list[int]] = {}
        for number, synapse in enumerate(synapses):
            together.setdefault((synapse.source_layer, synapse.target_layer, synapse.target[0]), []).append(number)
        for (source, target, head), numbers in together.items():
            rows = [synapses[number].source[0] * width + synapses[number].source[1] for number in numbers]
            columns = [synapses[number].target[1] // (1 if statistic == "count" else 2) for number in numbers]
            for sentence in range(len(self)):
                y = self.y[source][sentence][:, rows]
                products = y * self.targets(target, head, sentence, statistic)[:, :, columns]
                out[sentence, numbers] = _reduced(products, statistic)
        return out

    def block(self, source: int, rows: Tensor, targets: Tensor, sentence: int, statistic: str) -> Tensor:
        """The statistic of one sentence for sources `rows` and every column of `targets` [part, pos, column]: [row, column]."""
        y = self.y[source][sentence][:, rows]
        if statistic != "mean_strength":
            return _finished([y.T @ part for part in targets], len(y))
        sums = [torch.zeros(len(rows), targets.shape[2], dtype=y.dtype) for _ in targets]
        total = torch.zeros_like(sums[0])
        for t in range(len(y)):
            for running, part in zip(sums, targets, strict=True):
                running.addr_(y[t], part[t])
            total += torch.hypot(*sums)
        return _finished([total / len(y)], len(y))


def _reduced(products: Tensor, statistic: str) -> Tensor:
    """The statistic from the products of each token, [part, pos, synapse] -> [synapse]."""
    length = products.shape[1]
    if statistic == "mean_strength":
        running = products.cumsum(1)
        return _finished([torch.hypot(running[0], running[1]).mean(0)], length)
    return _finished(list(products.sum(1)), length)


def _finished(parts: list[Tensor], length: int) -> Tensor:
    size = torch.hypot(*parts) if len(parts) == 2 else parts[0]
    return (size.clamp(min=0) / length).sqrt()


@torch.no_grad()
def record_sentences(
    model: Any,
    sentences: Sequence[Any],
    *,
    source_layers: Sequence[int],
    target_layers: Sequence[int],
    hooks: Sequence[Any] = (),
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Recording:
    """Run the model over sentences (text, or token ids [pos]) and keep y, x and the mean residual stream of the layers asked for.

    Memory: Σ_sentences pos · n numbers for each of x and y and layer.
    Raises ValueError for a sentence with fewer than two tokens, since the first one writes nothing.
    """
    model = require_bdh(model)
    for layer in [*source_layers, *target_layers]:
        checked_layer(model, layer)
    layers = sorted({*source_layers, *target_layers})
    tokens = tokenised(model, sentences)
    lengths = [len(sentence) for sentence in tokens]
    y: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    x: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    resid: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    points = ("hook_y", "attn.hook_k", "hook_resid_pre")
    names = [f"blocks.{layer}.{point}" for layer in layers for point in points]
    for first in range(0, len(tokens), batch_size):
        if progress is not None:
            progress(first / len(tokens), f"reading sentence {first + 1} of {len(tokens)}")
        _, cache = model.run_with_cache(padded(tokens[first : first + batch_size]), names=names, hooks=hooks)
        for layer in layers:
            for row, length in enumerate(lengths[first : first + batch_size]):
                for kept, point in ((y, "hook_y"), (x, "attn.hook_k")):
                    activity = cache[f"blocks.{layer}.{point}"][row, :, 1:length]
                    kept[layer].append(activity.transpose(0, 1).flatten(1).cpu())
                resid[layer].append(cache[f"blocks.{layer}.hook_resid_pre"][row, 1:length].mean(0).cpu())
    positions = torch.arange(1, max(lengths), device=model.device)[None]
    rotation = torch.stack([part[0, 0].cpu() for part in model.weights.rotation(positions)])
    means = {layer: torch.stack(rows) for layer, rows in resid.items()}
    return Recording(y, x, model.config.n_heads, rotation, means)


def tokenised(model: Any, sentences: Sequence[Any]) -> list[Tensor]:
    """Token ids [pos] of each sentence. Raises ValueError for a sentence with fewer than two tokens, TypeError for one bare string."""
    if isinstance(sentences, str):
        raise TypeError("Expected a list of sentences, got one string.")
    out = []
    for number, sentence in enumerate(sentences):
        tokens = model.to_tokens(sentence)
        if tokens.shape[0] != 1 or tokens.shape[1] < 2:
            raise ValueError(
                f"Sentence {number} ({sentence!r:.60}) has shape {tuple(tokens.shape)}; expected one sequence of at least two tokens."
            )
        out.append(tokens[0])
    return out


def padded(tokens: Sequence[Tensor]) -> Tensor:
    """[sentence, pos], filled up on the right: nothing that comes later changes an earlier token of a causal model."""
    return torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
