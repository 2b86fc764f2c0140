"""Feed-forward layers as attention over a knowledge base: generalised cross-attention (2025).

    y = V ReLU(K x · scale + threshold) + b,   K [entry, d_model], V [entry, d_model]

reads a fixed set of entries with one query per token, ReLU weights and a threshold per entry. A feed-forward layer is the case in which
keys and values are its own weights, W_inᵀ and W_out; so every MLP can be shown as a token × neuron map whose rows mix the neurons'
output directions, exactly (`feed_forward_attention`). `KnowledgeBase` is the layer with entries E shared between layers, from which each
layer makes its keys, values and thresholds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta
from workbench.lab.catalogue import implements

ENTRIES = PatternMeta(columns="entry", rows_sum_to="free", causal="none")


@dataclass(frozen=True)
class FeedForwardAttention:
    """`weights` [batch, pos, neuron], `values` [neuron, d_model] and `bias` [d_model]: `output()` is the MLP's output."""

    weights: Tensor
    values: Tensor
    bias: Tensor
    meta: PatternMeta

    def output(self) -> Tensor:
        """[batch, pos, d_model]."""
        return self.weights @ self.values + self.bias


@implements(
    "generalized-cross-attn",
    "view",
    "feed_forward_attention",
    note="keys, values and thresholds are an MLP's own weights",
)
def feed_forward_attention(model: Any, tokens: Any, layer: int) -> FeedForwardAttention:
    """The MLP of one layer as attention of every token over its neurons. Entries may be negative unless the activation is ReLU."""
    mlp = model.blocks[layer].mlp
    name = f"blocks.{range(model.n_layers)[layer]}.mlp.hook_post"
    _, cache = model.run_with_cache(tokens, names=name)
    signed = mlp.config.activation != "relu" or mlp.config.gated
    meta = PatternMeta(columns="neuron", signed=signed, rows_sum_to="free", causal="none")
    return FeedForwardAttention(cache[name], mlp.W_out, mlp.b_out, meta)


@implements(
    "generalized-cross-attn",
    "model",
    "KnowledgeBase",
    note="linear maps make keys, values and thresholds of the shared entries",
)
class KnowledgeBase(nn.Module):
    """Cross-attention with ReLU weights over shared `entries` [entry, d_entry], a `nn.Parameter` that several layers may be given.

    Args:
        d_model: width of the stream. d_key: width of queries and keys. Scaling inside the ReLU is 1/√d_key.
    """

    def __init__(self, entries: nn.Parameter, d_model: int, d_key: int) -> None:
        super().__init__()
        self.entries = [entries]  # in a list, so that it is registered where it belongs
        width = entries.shape[1]
        self.query = nn.Linear(d_model, d_key, bias=False)
        self.key = nn.Linear(width, d_key, bias=False)
        self.threshold = nn.Linear(width, 1)
        self.value = nn.Linear(width, d_model, bias=False)
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.hook_pre = HookPoint("mlp_pre", "batch pos entry")
        self.hook_post = HookPoint("mlp_post", "batch pos entry", meta=ENTRIES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_model]; `hook_post` is the token × entry map."""
        entries = self.entries[0]
        scores = self.query(x) @ self.key(entries).T * self.query.out_features**-0.5 + self.threshold(entries)[:, 0]
        return self.hook_post(self.hook_pre(scores).relu()) @ self.value(entries) + self.bias
