"""The strongest, most changed and most read synapses of a layer, found without an n × n matrix.

After token t the synapses from layer k to a head of layer l are Y[:t]ᵀ X̃[:t] (rotated x), a matrix of rank ≤ t. It is formed one block of
rows at a time and only a running list of the best k entries is kept. Neurons that never fired in the text have no synapses and are
left out beforehand; that changes no result.

strength   |C_t| of `probes.bdh.synapses`: one number per source neuron and rotary pair, reported with the pair's even neuron
change     |C_t − C_s| over a span s → t: what the tokens s+1 … t wrote
read       contribution to a logit of token t, through one layer, with norm scales as they were:
           q_t[j] · σ̂_{t−1}[i, j] · ⟨cen(E_i), ∂logit/∂a_t⟩,  σ̂ the coefficient-weighted synapse that the state is made of
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import Synapse, Writes, capture_writes, checked_layer, checked_position, require_bdh
from probes.bdh.reading import reading_gradient
from workbench.lab.catalogue import implements

BLOCK = 2**21
"""Numbers per block: 8 MB in float32."""


@dataclass(frozen=True)
class Cost:
    """What a search takes. `multiply_adds` and `block_bytes` are exact; `seconds` extrapolates one small product timed on this machine."""

    multiply_adds: int
    block_bytes: int
    seconds: float
    rows: int
    columns: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} source × {self.columns:,} target neurons: {self.multiply_adds / 1e9:.3g} G multiply-adds, "
            f"about {self.seconds:.2g} s, {self.block_bytes / 1e6:.3g} MB per block"
        )


@dataclass(frozen=True)
class TopSynapses:
    """Synapses by descending |score|, their signed scores [synapse] and the search's cost.

    There are fewer than asked for where fewer have a score other than 0. `total` is the sum over all entries searched.
    """

    measure: str
    synapses: tuple[Synapse, ...]
    scores: Tensor
    total: float
    cost: Cost

    def __len__(self) -> int:
        return len(self.synapses)

    def __repr__(self) -> str:
        best = f"; first {self.synapses[0]} {float(self.scores[0]):.4g}" if self.synapses else ""
        return f"TopSynapses({len(self)} by {self.measure}{best}; {self.cost})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(str(synapse))}</code></td><td>{float(score):.5g}</td></tr>"
            for synapse, score in zip(self.synapses, self.scores, strict=True)
        )
        caption = f"Top synapses by {escape(self.measure)} ({escape(str(self.cost))})"
        return f"<table><caption>{caption}</caption><thead><tr><th>synapse</th><th>score</th></tr></thead><tbody>{rows}</tbody></table>"


@implements(
    "bdh",
    "probe",
    "strongest_synapses",
    note="strength is rotation-invariant; the paper drops negative entries instead",
)
def strongest_synapses(
    model: Any,
    tokens: Any,
    target_layer: int,
    *,
    at: int = -1,
    k: int = 50,
    source_layer: int | None = None,
    target_heads: Sequence[int] | None = None,
    hooks: Sequence[Any] = (),
) -> TopSynapses:
    """The k strongest synapses after token `at` of one sequence, by |C_t|.

    Args:
        tokens: one sequence, [pos] or [1, pos], or text. target_layer: whose state. source_layer: default target_layer − 1.
        target_heads: only into these heads of the target layer (sources are all heads).

    Raises ValueError for layers, heads or positions that do not exist.
    """
    search = _Search.of(model, tokens, target_layer, source_layer, target_heads, hooks)
    return search.by_strength("strength", 0, search.position(at) + 1, k)


@implements("bdh", "probe", "most_changed_synapses")
def most_changed_synapses(
    model: Any,
    tokens: Any,
    target_layer: int,
    *,
    span: tuple[int, int],
    k: int = 50,
    source_layer: int | None = None,
    target_heads: Sequence[int] | None = None,
    hooks: Sequence[Any] = (),
) -> TopSynapses:
    """The k synapses that the tokens after `span[0]`, up to and with `span[1]`, changed most; else as `strongest_synapses`."""
    search = _Search.of(model, tokens, target_layer, source_layer, target_heads, hooks)
    first, last = search.position(span[0]), search.position(span[1])
    if first >= last:
        raise ValueError(f"span is {span}: positions {first} to {last}. Expected a later second position.")
    return search.by_strength("change", first + 1, last + 1, k)


@implements("bdh", "probe", "most_read_synapses")
def most_read_synapses(
    model: Any,
    tokens: Any,
    target_layer: int,
    *,
    logit: int | Tensor,
    at: int = -1,
    k: int = 50,
    source_layer: int | None = None,
    target_heads: Sequence[int] | None = None,
    hooks: Sequence[Any] = (),
) -> TopSynapses:
    """The k synapses whose reading by token `at` contributes most to a logit (or to a direction over the vocabulary [vocab]).

    Sums to the layer's exact share that came from `source_layer` if `target_layer` is the last layer; below it the gradient makes the
    contribution first-order (`probes.bdh.reading`). Else as `strongest_synapses`.
    """
    search = _Search.of(model, tokens, target_layer, source_layer, target_heads, hooks)
    at = search.position(at)
    reading = reading_gradient(search.model, search.writes.tokens, target_layer, at, logit, hooks=hooks)
    return search.by_reading(reading.query[0], reading.gradient[0], at, k)


@dataclass(frozen=True)
class _Search:
    """One sequence's writes and which part of them to search."""

    model: Any
    writes: Writes
    source_layer: int
    heads: list[int]

    @classmethod
    def of(
        cls,
        model: Any,
        tokens: Any,
        target_layer: int,
        source_layer: int | None,
        target_heads: Sequence[int] | None,
        hooks: Sequence[Any],
    ) -> "_Search":
        model = require_bdh(model)
        checked_layer(model, target_layer, "target_layer", first=1)
        source_layer = target_layer - 1 if source_layer is None else source_layer
        if not 0 <= source_layer < target_layer:
            raise ValueError(f"source_layer is {source_layer}; expected 0..{target_layer - 1}, below target_layer.")
        tokens = model.to_tokens(tokens)
        if tokens.shape[0] != 1:
            raise ValueError(
                f"Expected one sequence of tokens, got a batch of {tokens.shape[0]}: synapses belong to one state."
            )
        heads = list(range(model.config.n_heads)) if target_heads is None else list(target_heads)
        for head in heads:
            if not 0 <= head < model.config.n_heads:
                raise ValueError(f"target_heads has {head}; expected 0..{model.config.n_heads - 1}.")
        if not heads:
            raise ValueError("target_heads is empty, which searches nothing.")
        return cls(
            model, capture_writes(model, tokens, target_layer, sources=[source_layer], hooks=hooks), source_layer, heads
        )

    def position(self, at: int) -> int:
        return checked_position(at, self.writes.tokens.shape[1])

    def sources(self, start: int, stop: int) -> Tensor:
        """y of all heads as [pos, n], for tokens start … stop − 1."""
        return self.writes.y[self.source_layer][0, :, start:stop].transpose(0, 1).flatten(1)

    def by_strength(self, measure: str, start: int, stop: int, k: int) -> TopSynapses:
        """Real and imaginary part of C over the tokens start … stop − 1, per rotary pair."""
        targets = []
        for head in self.heads:
            pairs = self.writes.keys[0, head, start:stop].unflatten(-1, (-1, 2))
            columns = active(pairs.abs().sum(-1))
            targets.append(_Target(head, 2 * columns, pairs[:, columns].permute(2, 0, 1).contiguous(), None))
        return self._run(measure, self.sources(start, stop), targets, k)

    def by_reading(self, query: Tensor, gradient: Tensor, at: int, k: int) -> TopSynapses:
        """query [head, neuron] and gradient [head, d_model] of token `at`."""
        targets = []
        for head in self.heads:
            keys = self.writes.keys[0, head, :at] * query[head]
            columns = active(keys)
            worth = self.writes.encoder.flatten(0, 1) @ gradient[head]
            targets.append(_Target(head, columns, keys[:, columns][None], worth))
        scale = self.writes.coefficients[self.source_layer][0, :at, None]
        return self._run("read", self.sources(0, at) * scale, targets, k)

    def _run(self, measure: str, y: Tensor, targets: list["_Target"], k: int) -> TopSynapses:
        """Form the products of y [pos, n] with each target block by block of rows."""
        rows, best = active(y), RunningTop(k)
        widest = max(target.factors.shape[0] * len(target.columns) for target in targets)
        step = max(1, BLOCK // max(1, widest))
        cost = _cost(y, len(rows), sum(t.factors.shape[0] * len(t.columns) for t in targets), widest, step)
        for target in targets:
            for block in rows.split(step):
                chosen = y[:, block] if target.worth is None else y[:, block] * target.worth[block]
                parts = chosen.T @ target.factors
                best.add(torch.hypot(parts[0], parts[1]) if len(parts) == 2 else parts[0], block, target)
        neurons = self.writes.keys.shape[-1]
        synapses = tuple(
            Synapse(divmod(int(row), neurons), (int(head), int(column)), self.writes.layer, self.source_layer)
            for row, head, column in zip(best.rows, best.heads, best.columns, strict=True)
        )
        return TopSynapses(measure, synapses, best.scores, best.total, cost)


@dataclass(frozen=True)
class _Target:
    """One head of the target layer: the numbers of its active neurons, factors [1 or 2, pos, column], and a weight per source [n]."""

    head: int
    columns: Tensor
    factors: Tensor
    worth: Tensor | None


class RunningTop:
    """The k entries of largest |score| among all blocks added so far, and the sum of all entries."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1.")
        self.k, self.total = k, 0.0
        self.scores = torch.empty(0)
        self.rows = self.columns = self.heads = torch.empty(0, dtype=torch.long)

    def add(self, block: Tensor, rows: Tensor, target: _Target) -> None:
        """block [row, column] with the numbers of its rows; entries that are 0 are no synapses."""
        self.total += float(block.sum(dtype=torch.float64))
        flat = block.flatten()
        places = flat.abs().topk(min(self.k, len(flat))).indices
        places = places[flat[places] != 0]
        row, column = rows[places // max(1, len(target.columns))], target.columns[places % max(1, len(target.columns))]
        found = torch.stack([row, column, torch.full_like(row, target.head)])
        scores = torch.cat([self.scores.to(flat), flat[places]])
        numbers = torch.cat([torch.stack([self.rows, self.columns, self.heads]).to(found), found], 1)
        keep = scores.abs().argsort(descending=True, stable=True)[: self.k]
        self.scores = scores[keep]
        self.rows, self.columns, self.heads = numbers[:, keep]


def active(activity: Tensor) -> Tensor:
    """Numbers of the columns of [pos, column] that are not zero throughout."""
    return (activity != 0).any(0).nonzero()[:, 0]


def search_cost(model: Any, tokens: int, target_heads: int | None = None) -> Cost:
    """The most that a search by strength over `tokens` tokens can take (every neuron active), before running it."""
    model = require_bdh(model)
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected at least 1.")
    width = model.config.n_neurons // model.config.n_heads
    like = torch.empty(tokens, 0, dtype=model.weights.E.dtype)
    heads = model.config.n_heads if target_heads is None else target_heads
    return _cost(like, model.config.n_neurons, heads * width, width, max(1, BLOCK // width))


def _cost(y: Tensor, rows: int, columns: int, widest: int, step: int) -> Cost:
    """Cost of all products of y [pos, n] with `columns` columns, timed on at most 2²² multiply-adds of the products' own shape."""
    pos = y.shape[0]
    step = min(step, max(1, rows))
    sample = max(1, min(step, 2**22 // max(1, pos * widest)))
    left, right = y.new_ones(sample, pos), y.new_ones(pos, widest)
    left @ right  # the first product of a shape pays for setting up
    began = time.perf_counter()
    left @ right
    seconds = (time.perf_counter() - began) * (rows / sample) * (columns / max(1, widest))
    return Cost(pos * rows * columns, step * widest * y.element_size(), seconds, rows, columns)
