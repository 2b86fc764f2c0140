"""Feed-forward layers as attention over a knowledge base: generalised cross-attention (2025).

    y = V ReLU(K x · scale + threshold) + b,   K [entry, d_model], V [entry, d_model]

reads a fixed set of entries with one query per token, ReLU weights and a threshold per entry. A feed-forward layer is the case in which
keys and values are its own weights, W_inᵀ and W_out; so every MLP can be shown as a token × neuron map whose rows mix the neurons'
output directions, exactly (`feed_forward_attention`). `KnowledgeConfig`, a channel mixer, is the layer with entries E shared between
layers, from which each layer makes its keys, values and thresholds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.parts.channel_mixers import MLP, register_channel_mixer
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
    mlp = getattr(model.blocks[layer], "mlp", None)
    if not isinstance(mlp, MLP):
        kind = "no channel mixer" if mlp is None else type(mlp).__name__
        raise ValueError(f"Layer {layer} has {kind}; expected an MLP, whose own weights are its keys and values.")
    name = f"blocks.{range(model.n_layers)[layer]}.mlp.hook_post"
    _, cache = model.run_with_cache(tokens, names=name)
    signed = mlp.config.activation != "relu" or mlp.config.gated
    meta = PatternMeta(columns="neuron", signed=signed, rows_sum_to="free", causal="none")
    return FeedForwardAttention(cache[name], mlp.W_out, mlp.b_out, meta)


@dataclass(frozen=True)
class KnowledgeConfig:
    """Args: entries: how many there are. d_entry: their width. d_key: width of queries and keys. shared: layers with the same configuration
    read the same entries (those of the first of them), each through maps of its own."""

    entries: int
    d_entry: int
    d_key: int
    shared: bool = True
    kind: str = "knowledge"

    gated, label = False, "Knowledge base"  # what others ask of any channel mixer's configuration

    def __post_init__(self) -> None:
        if min(self.entries, self.d_entry, self.d_key) < 1:
            raise ValueError(f"{self} has a size below 1; expected at least one entry, of at least one number.")

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.entries} {'shared ' if self.shared else ''}entries"


@implements(
    "generalized-cross-attn",
    "model",
    "KnowledgeConfig",
    note="linear maps make keys, values and thresholds of the shared entries",
)
@register_channel_mixer(KnowledgeConfig)
class KnowledgeBase(nn.Module):
    """Cross-attention with ReLU weights over `entries` [entry, d_entry]; scores are divided by √d_key. Axes batch pos d_model."""

    def __init__(self, config: KnowledgeConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.own_entries: nn.Parameter | None = nn.Parameter(torch.empty(config.entries, config.d_entry))
        self.owner: list[KnowledgeBase] = [self]  # in a list, so that shared entries are registered once
        self.query = nn.Linear(d_model, config.d_key, bias=False)
        self.key = nn.Linear(config.d_entry, config.d_key, bias=False)
        self.threshold = nn.Linear(config.d_entry, 1)
        self.outward = nn.Linear(config.d_entry, d_model)  # values, and what is added to their sum
        self.hook_pre = HookPoint("mlp_pre", "batch pos entry")
        self.hook_post = HookPoint("mlp_post", "batch pos entry", meta=ENTRIES)

    def placed(self, layer: int, earlier: list[Any]) -> None:
        """Use the entries of the first layer with this configuration."""
        alike = [other for other in earlier if isinstance(other, KnowledgeBase) and other.config == self.config]
        if self.config.shared and alike:
            self.own_entries, self.owner = None, [alike[0]]

    def initialise_own(self) -> None:
        """Entries are not small, like weights, but of the size of what is read: N(0, 1)."""
        if self.own_entries is not None:
            nn.init.normal_(self.own_entries)

    @property
    def entries(self) -> Tensor:
        """[entry, d_entry]."""
        entries = self.owner[0].own_entries
        assert entries is not None
        return entries

    @property
    def values(self) -> Tensor:
        """What each entry writes, [entry, d_model]."""
        return self.entries @ self.outward.weight.T

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_model]; `hook_post` is the token × entry map."""
        entries = self.entries
        scores = self.query(x) @ self.key(entries).T * self.config.d_key**-0.5 + self.threshold(entries)[:, 0]
        return self.hook_post(self.hook_pre(scores).relu()) @ self.values + self.outward.bias
