"""Other ways from scores to weights than a softmax over all that is visible: sinks, top-k, hard attention, ReLU."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.stages import Call, Normaliser, Sizes, register_part
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class SinkConfig:
    """A softmax with one more choice, reading nothing: exp(s_ij) / (exp(sink_h) + Σ_j exp(s_ij)), rows sum to less than 1.

    Args: learned: a logit per head (gpt-oss); False: the logit 0 (Miller 2023, "Attention is off by one").
    """

    learned: bool = True
    kind: str = "sink"


@register_part(SinkConfig)
class Sink(Normaliser):
    """`logit` [head]."""

    def __init__(self, config: SinkConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if config.learned:
            self.logit = nn.Parameter(torch.zeros(sizes.n_maps))
        else:
            self.register_buffer("logit", torch.zeros(sizes.n_maps), persistent=False)

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, rows_sum_to="free", label="a sink takes what is missing to 1")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        sink = self.logit.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class TopKConfig:
    """A softmax over the k largest scores of each row; scores that tie with the k-th stay."""

    k: int
    kind: str = "top_k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; expected at least 1.")


@register_part(TopKConfig)
class TopK(Normaliser):
    """Rows are distributions over at most k sources (but for ties)."""

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        least = scores.topk(min(self.config.k, scores.shape[-1]), dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class HardConfig:
    """All weight on the largest score of each row (the first, if several tie). Gradients are those of the softmax (straight-through)."""

    kind: str = "hard"


@register_part(HardConfig)
class Hard(Normaliser):
    """Rows are one-hot."""

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        soft = scores.softmax(-1)
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype) + (soft - soft.detach())


@dataclass(frozen=True)
class ReluConfig:
    """max(s_ij, 0) / n_i, n_i the number of tokens that query i can see: weights without competition (Wortsman et al. 2023)."""

    kind: str = "relu"


@register_part(ReluConfig)
class Relu(Normaliser):
    """Non-negative weights whose rows sum to nothing in particular."""

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, rows_sum_to="free")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        seen = scores.isfinite().sum(-1, keepdim=True).clamp(min=1)
        return scores.relu() / seen


@dataclass(frozen=True)
class EmptyRowsConfig:
    """A softmax in which a row without any source is 0 instead of not a number."""

    kind: str = "empty_rows"


@register_part(EmptyRowsConfig)
class EmptyRows(Normaliser):
    """Rows sum to 1 or to 0."""

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, rows_sum_to="free", label="rows sum to 1, or to 0 where nothing matches")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        empty = scores.isneginf().all(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
