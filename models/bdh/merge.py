"""Merging BDH models by concatenating their neurons (Kosowski et al. 2025, section 7.1): no training, one larger model.

Per head, the neurons of the parents stand side by side: D_x, D_y, E and the rotation frequencies are concatenated along the neuron axis;
embedding and unembedding are averaged. The frequencies must be concatenated, not made anew: a neuron keeps the time scale it was trained
with. And the concatenation must be per head: in the published layout E is [head · neuron, d], and joining two of those end to end would
give the second half of the heads to the second parent.

Merging a model with itself changes nothing but two norms' arguments (E y doubles, the read a doubles), so the logits stay the same
as ε of the norms goes to 0. That is the test of a correct merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.bdh.model import BDH
from models.diagram import model_blocks
from workbench.lab.catalogue import implements

SMALL = 1e-30
"""ε of the norms at which a self-merge is an identity."""


@dataclass(frozen=True)
class Heritage:
    """Which neurons of every head of a merged model come from which parent: `sizes` neurons per head each, in order."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def parent(self) -> Tensor:
        """The parent's number for each neuron of a head, [neuron]."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def split(self, activity: Tensor) -> dict[str, Tensor]:
        """Activations [..., neuron] (x, y, gate, rows of a state put last) by parent. Raises ValueError for another number of neurons."""
        if activity.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"The last axis has {activity.shape[-1]} entries; expected {sum(self.sizes)}, the merged model's neurons per head."
            )
        return dict(zip(self.names, activity.split(self.sizes, dim=-1), strict=True))

    def active_share(self, activity: Tensor) -> dict[str, Tensor]:
        """Each parent's share of the non-zero entries of [..., neuron], over the last axis: [...]; nan where nothing is active."""
        counts = {name: (part != 0).sum(-1) for name, part in self.split(activity).items()}
        total = torch.stack(list(counts.values())).sum(0)
        return {name: count / total for name, count in counts.items()}

    def contribution(self, model: BDH, y: Tensor) -> dict[str, Tensor]:
        """What each parent's neurons add to E y, from y [batch, head, pos, neuron] of one layer: [batch, pos, d_model]; they sum to it."""
        encoders = model.weights.E.split(self.sizes, dim=1)
        parts = self.split(y)
        return {
            name: torch.einsum("bhtn,hnd->btd", part, encoder.to(part))
            for (name, part), encoder in zip(parts.items(), encoders, strict=True)
        }


@implements("bdh", "model", "merge", note="section 7.1: neurons concatenated per head, frequencies included")
def merge(parents: Sequence[BDH], names: Sequence[str] | None = None) -> tuple[BDH, Heritage]:
    """Concatenate the neurons of two or more BDH models that share depth, width, heads, vocabulary, dtype, norm ε, residual and decay.

    Args:
        names: one per parent, for the heritage (default: "parent 0", "parent 1", …). A model may be merged with itself.

    Returns:
        The merged model, in evaluation mode, and which of its neurons come from whom.

    Raises ValueError naming the first property in which the parents differ.
    """
    parents = list(parents)
    labels = tuple(names) if names is not None else tuple(f"parent {number}" for number in range(len(parents)))
    if len(parents) < 2:
        raise ValueError(f"Merging takes at least two models; got {len(parents)}.")
    for number, parent in enumerate(parents):
        if not isinstance(parent, BDH):
            raise TypeError(f"Parent {number} is a {type(parent).__name__}; expected BDH models.")
    if len(labels) != len(parents) or len(set(labels)) < len(labels):
        raise ValueError(f"names is {list(labels)}; expected {len(parents)} different names.")
    first = parents[0]
    for number, parent in enumerate(parents[1:], 1):
        for name in ("n_layers", "d_model", "n_heads", "vocab_size", "norm_eps", "residual", "decay", "detach_memory"):
            ours, theirs = getattr(first.config, name), getattr(parent.config, name)
            if ours != theirs:
                raise ValueError(
                    f"Parents 0 and {number} differ in {name}: {ours} and {theirs}. Only n_neurons may differ."
                )
        if parent.weights.E.dtype != first.weights.E.dtype:
            raise ValueError(
                f"Parents 0 and {number} differ in dtype: {first.weights.E.dtype} and {parent.weights.E.dtype}."
            )

    neurons = sum(parent.config.n_neurons for parent in parents)
    model = BDH(replace(first.config, n_neurons=neurons)).to(device=first.device, dtype=first.weights.E.dtype)
    weights = [parent.weights for parent in parents]
    with torch.no_grad():
        model.weights.D_x.copy_(torch.cat([w.D_x.to(first.device) for w in weights], dim=-1))
        model.weights.D_y.copy_(torch.cat([w.D_y.to(first.device) for w in weights], dim=-1))
        model.weights.E.copy_(torch.cat([w.E.to(first.device) for w in weights], dim=1))
        model.weights.frequencies.copy_(torch.cat([w.frequencies.to(first.device) for w in weights]))
        for parameter, originals in (
            (model.embed.W_E, [parent.W_E for parent in parents]),
            (model.unembed.weight, [parent.unembed.weight for parent in parents]),
        ):
            assert parameter is not None
            parameter.copy_(torch.stack([p.to(first.device) for p in originals if p is not None]).mean(0))
    sizes = tuple(parent.config.n_neurons // parent.config.n_heads for parent in parents)
    model.name, model.architecture, model.tokenizer = " + ".join(labels), first.architecture, first.tokenizer
    model.origin = {**first.origin, "blocks": model_blocks(model), "merged_from": list(labels)}
    return model.eval(), Heritage(labels, sizes)


@torch.no_grad()
def self_merge_error(model: BDH, tokens: Tensor, *, exact: bool = True) -> float:
    """Largest change of a logit when a model is merged with itself, relative to the logits' largest size.

    `exact`: in float64 with ε of the norms at 1e-30, where a right merge is an identity. Otherwise the model as it is, whose norms' ε sees
    sums twice as large.
    """
    if exact:
        tiny = BDH(replace(model.config, norm_eps=SMALL)).double().eval()
        tiny.load_state_dict(model.state_dict())
        model = tiny
    merged, _ = merge([model, model], names=["once", "again"])
    logits = model(tokens)
    return float((merged(tokens) - logits).abs().max() / logits.abs().max())
