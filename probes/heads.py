"""Head scores: which heads read the previous token, an equal token, the token after an equal token, the first token, or themselves.

    scores = head_scores(model, make_task("induction").batch(16))
    scores["induction"]            [layer, head]
    scores.best("previous_token")  [(layer, head, score), ...]

A score is the mean weight that a head puts on the token in question, minus what a head without that habit would put there, over the
rows (reading tokens) where there is such a token and something else to read. 0 is chance; a head that reads nothing else comes near 1.

| probe | row q reads | what is subtracted: the largest of |
|---|---|---|
| `previous_token` | q − 1 | chance: what a uniform head gives, the share of such tokens among those that q can see |
| `current_token` | q | chance |
| `first_token` | 0, the usual sink | chance |
| `duplicate_token` | earlier tokens equal to token q | chance; distance |
| `induction` | tokens after earlier tokens equal to token q | chance; distance; the task's control, where it has one |

On request (`MORE_PROBES`):

| probe | row q reads | what is subtracted |
|---|---|---|
| `next_token` | q + 1, where the pattern is not causal | chance |
| `delimiter` | the latest earlier token of `delimiters` | chance; distance |
| `bigram`, `trigram` | tokens after earlier ones whose last two (three) tokens equal those up to q | chance; distance |
| `nearest_embedding` | the earlier token of another type whose embedding has the largest cosine with that of token q | chance; distance |

*Distance*: where a text repeats at one distance, a head that always looks back that far passes for an induction head (Olsson et al. 2022
define the score on such text). So from each weight at distance d is subtracted the share of rows whose token at that distance is wanted.
A head that goes by distance alone scores exactly 0, whatever its distances. If one distance accounts for more than half of the rows, the
question has no answer and is refused. The induction task's own control (`control_source`) is the weight at one wrong distance per sequence.

*Signed patterns* (retention, state spaces, BDH) are no distributions. There the weight is |α|, each row divided by its sum, and the
result says so (`measured_on`). A row in which a head reads nothing at all counts as 0, neither hit nor chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.instrument.errors import RefusedByPattern, suggestion
from workbench.instrument.patterns import Pattern, PatternMeta
from workbench.lab.tasks import TaskBatch

PROBES = ("previous_token", "duplicate_token", "induction", "first_token", "current_token")
MORE_PROBES = ("next_token", "delimiter", "bigram", "trigram", "nearest_embedding")
LARGEST_SHARE = 0.5  # of one distance among the rows of `induction` and `duplicate_token`

Layer = int | tuple[int, int]  # (layer, step) where weights are shared over depth


@dataclass(frozen=True)
class HeadScores:
    """Result of `head_scores`; arrays are [layer, head] in the order of `layers`.

    Args:
        scores: by probe, chance-corrected; nan where a layer cannot show it (a strict pattern never reads its own token).
        weights: by probe, the mean weight before the correction. rows: by probe, how many rows each layer was measured on, [layer].
        layers: layer numbers, or (layer, step) where weights are shared over depth. measured_on: per layer, what a weight is.
        largest_share: for `induction` and `duplicate_token`, the share of rows whose nearest source is at the most common distance.
        by_sequence: by probe, sums over the rows of each sequence, [1 + controls, sequence, layer, head]: weight wanted, then the controls.
        rows_by_sequence: by probe, [sequence, layer].
    """

    scores: dict[str, NDArray[np.float64]]
    weights: dict[str, NDArray[np.float64]]
    rows: dict[str, NDArray[np.int64]]
    layers: tuple[Layer, ...]
    measured_on: tuple[str, ...]
    largest_share: dict[str, float] = field(default_factory=dict)
    by_sequence: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    rows_by_sequence: dict[str, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def interval(
        self, probe: str, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bootstrap interval of a score over sequences (percentiles), low and high, [layer, head] each.

        Sequences are drawn with replacement and rows are pooled, so rows of one sequence are never taken for independent.
        """
        self[probe]
        sums, rows = self.by_sequence[probe], self.rows_by_sequence[probe]
        drawn = np.random.default_rng(seed).multinomial(
            sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), resamples
        )  # how often each sequence was drawn, [resample, sequence]
        totals = np.einsum("ns,cslh->cnlh", drawn.astype(np.float64), sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = totals / (drawn @ rows)[None, :, :, None]
        scores = means[0] - means[1:].max(0)
        tail = 100 * (1 - level) / 2
        low, high = np.full((2, *scores.shape[1:]), np.nan)
        scored = ~np.isnan(scores).all(0)  # a layer without rows of this kind has no score to draw
        if scored.any():
            low[scored], high[scored] = np.nanpercentile(scores[:, scored], [tail, 100 - tail], axis=0)
        return low, high

    def __getitem__(self, probe: str) -> NDArray[np.float64]:
        if probe not in self.scores:
            known = ", ".join(self.scores)
            raise KeyError(f"No scores of {probe!r}.{suggestion(probe, self.scores)} Measured: {known}.")
        return self.scores[probe]

    def best(self, probe: str, n: int = 5) -> list[tuple[Layer, int, float]]:
        """The n heads of highest score as (layer, head, score), best first; heads without a score are left out."""
        scores = self[probe]
        order = np.argsort(-scores, axis=None, kind="stable")  # nan comes last
        ranked = [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]
        found = [(self.layers[i], head, float(scores[i, head])) for i, head in ranked]
        return [place for place in found if not np.isnan(place[2])][:n]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, nan as None."""

        def plain(values: NDArray[np.float64]) -> list[list[float | None]]:
            return [[float(x) if np.isfinite(x) else None for x in row] for row in values]

        return {
            "scores": {probe: plain(values) for probe, values in self.scores.items()},
            "weights": {probe: plain(values) for probe, values in self.weights.items()},
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "measured_on": list(self.measured_on),
            "largest_share": self.largest_share,
        }

    def __repr__(self) -> str:
        lines = [f"HeadScores({len(self.layers)} layers; {'; '.join(dict.fromkeys(self.measured_on))})"]
        for probe in self.scores:
            best = ", ".join(f"{layer}.{head} {score:+.2f}" for layer, head, score in self.best(probe, 3))
            lines.append(f"  {probe}: {best or 'no layer of this model can show it'}")
        return "\n".join(lines)


def head_scores(
    model: Any,
    batch: TaskBatch | Tensor | str,
    probes: str | Sequence[str] = PROBES,
    *,
    mask: Tensor | None = None,
    batch_size: int = 16,
    delimiters: Sequence[int] = (),
) -> HeadScores:
    """Score every head of every layer that has a pattern.

    Args:
        model: a hooked model (`patterns`, `to_tokens`). batch: a batch of a task, token ids [batch, pos], or text. Where a task plants a
            `source`, `induction` measures reading it; otherwise the source is found in the tokens.
        probes: which scores. mask: True at real tokens of ids, [batch, pos]. batch_size: sequences per run (memory, not results).
        delimiters: token ids that `delimiter` looks for.

    Raises:
        ValueError: an unknown probe; data in which a probe has no row, or only one distance. RefusedByPattern: columns are not tokens.
    """
    for probe in (probes := (probes,) if isinstance(probes, str) else probes):
        if probe not in (*PROBES, *MORE_PROBES):
            known = (*PROBES, *MORE_PROBES)
            raise ValueError(f"Unknown probe {probe!r}.{suggestion(probe, known)} Known: {', '.join(known)}.")
    if not probes:
        raise ValueError(f"No probes given. Expected some of {', '.join(PROBES)}.")
    planted: dict[str, Tensor] = {}
    if isinstance(batch, TaskBatch):
        if mask is not None:
            raise ValueError("A batch of a task has no padding. Expected mask=None, or token ids with a mask.")
        planted = batch.metadata
    tokens: Tensor = model.to_tokens(batch.tokens if isinstance(batch, TaskBatch) else batch)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    if real.shape != tokens.shape:
        raise ValueError(f"mask has shape {tuple(real.shape)}; expected [batch, pos] = {tuple(tokens.shape)}.")
    shares: dict[str, float] = {}
    facts = _Facts(planted, tuple(delimiters), model)
    questions = {probe: _question(probe, tokens, real, facts, shares) for probe in probes}

    sums: dict[str, dict[Layer, list[Tensor]]] = {
        probe: {} for probe in probes
    }  # [1 + controls, sequence, head] and [sequence]
    rows: dict[str, dict[Layer, list[Tensor]]] = {probe: {} for probe in probes}
    measured: dict[Layer, str] = {}
    for start in range(0, len(tokens), batch_size):
        some = slice(start, start + batch_size)
        padding = {} if mask is None else {"mask": real[some]}
        with torch.no_grad():
            patterns: dict[Layer, Pattern] = model.patterns(tokens[some], **padding)
            for layer, pattern in patterns.items():
                weights, measured[layer] = weights_of(pattern)
                visible = _visible(real[some].to(weights.device), pattern.meta)
                for probe, question in questions.items():
                    total, count = _measure(weights, visible, [cells[some] for cells in question])
                    sums[probe].setdefault(layer, []).append(total.cpu())
                    rows[probe].setdefault(layer, []).append(count.cpu())
    layers = tuple(measured)
    whole = {p: {layer: torch.cat(sums[p][layer], 1) for layer in layers} for p in probes}
    counts = {
        p: np.stack([torch.cat(rows[p][layer]).numpy() for layer in layers], 1) for p in probes
    }  # [sequence, layer]
    mean = {p: [whole[p][layer].sum(1) / counts[p][:, i].sum() for i, layer in enumerate(layers)] for p in probes}
    read = {p: _stack([means[0] for means in mean[p]]) for p in probes}
    control = {p: _stack([means[1:].amax(0) for means in mean[p]]) for p in probes}
    return HeadScores(
        scores={probe: read[probe] - control[probe] for probe in probes},
        weights=read,
        rows={probe: counts[probe].sum(0) for probe in probes},
        layers=layers,
        measured_on=tuple(measured.values()),
        largest_share=shares,
        by_sequence={probe: _padded([whole[probe][layer] for layer in layers]) for probe in probes},
        rows_by_sequence=counts,
    )


@dataclass(frozen=True)
class _Facts:
    """What a question needs besides the tokens."""

    planted: dict[str, Tensor]
    delimiters: tuple[int, ...]
    model: Any


def _question(probe: str, tokens: Tensor, real: Tensor, facts: _Facts, shares: dict[str, float]) -> list[Tensor]:
    """The cells that a probe wants, then the weights of its controls besides chance: [batch, query, key] each.

    Positions count real tokens only, so padding changes nothing.
    """
    planted = facts.planted
    position = torch.where(real, real.cumsum(1) - 1, -1)
    distance = position[:, :, None] - position[:, None, :]  # [batch, query, key]
    both = real[:, :, None] & real[:, None, :]
    if probe == "previous_token":
        wanted = both & (distance == 1)
    elif probe == "current_token":
        wanted = both & (distance == 0)
    elif probe == "first_token":
        wanted = both & (position[:, None, :] == 0)
    elif probe == "next_token":
        wanted = both & (distance == -1)
    elif probe == "delimiter":
        if not facts.delimiters:
            raise ValueError(
                "delimiter: no delimiters given. Expected token ids, e.g. delimiters=[46] for full stops in bytes."
            )
        known = torch.tensor(facts.delimiters, device=tokens.device)
        before = both & (distance > 0) & torch.isin(tokens, known)[:, None, :]
        wanted = before & (distance == torch.where(before, distance, distance.shape[1]).amin(-1, keepdim=True))
    elif probe in ("bigram", "trigram"):
        wanted = both & (distance > 0) & _same_suffix(tokens, real, 2 if probe == "bigram" else 3)
    elif probe == "nearest_embedding":
        wanted = both & _nearest(tokens, both & (distance > 0), facts.model)
    elif probe == "duplicate_token":
        wanted = both & (distance > 0) & (tokens[:, :, None] == tokens[:, None, :])
    else:
        # in "a a" the token after the earlier one is the reading token itself: nothing to tell apart, hence distance > 0
        wanted = both & (distance > 0) & (tokens[:, :, None] == _token_before(tokens, real)[:, None, :])
        if "source" in planted:  # the task says in which rows there is something to find
            source = _cells(planted["source"].to(tokens.device))
            wanted = (wanted | source) & source.any(-1, keepdim=True)
    if not bool(wanted.any()):
        raise ValueError(f"{probe}: no token here has such a source. Expected text in which tokens recur.")
    if probe in ("previous_token", "current_token", "first_token", "next_token"):
        return [wanted]
    controls = []
    if probe == "induction" and "control_source" in planted:
        controls.append(_cells(planted["control_source"].to(tokens.device)))
        wanted = wanted & controls[0].any(-1, keepdim=True)
    rows = wanted.any(-1)
    nearest, counts = torch.where(wanted, distance, distance.shape[1]).amin(-1)[rows].unique(return_counts=True)
    shares[probe] = float(counts.max() / counts.sum())
    if shares[probe] > LARGEST_SHARE and probe in ("induction", "duplicate_token", "bigram", "trigram"):
        raise ValueError(
            f"{probe}: {shares[probe]:.0%} of the rows have their source {int(nearest[counts.argmax()])} tokens back, so a head that "
            "always looks there cannot be told apart. Expected varied distances: several sequences of the induction task, or natural text."
        )
    past = both & (distance > 0) & rows[:, :, None]
    length = distance.shape[1]
    there = torch.bincount(distance[past], minlength=length).clamp(min=1)
    share = torch.bincount(distance[wanted], minlength=length).double() / there
    return [wanted, share[distance.clamp(min=0)] * past, *controls]


def _token_before(tokens: Tensor, real: Tensor) -> Tensor:
    """The real token before each token, -1 before the first. [batch, pos]."""
    index = torch.where(real, torch.arange(tokens.shape[1], device=tokens.device), -1).cummax(1).values
    before = torch.cat([torch.full_like(index[:, :1], -1), index[:, :-1]], dim=1)
    return torch.where(before >= 0, tokens.gather(1, before.clamp(min=0)), -1)


def _same_suffix(tokens: Tensor, real: Tensor, n: int) -> Tensor:
    """True at (query, key) where the n tokens before the key equal the n tokens up to the query. [batch, query, key]."""
    same = torch.ones(*tokens.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)
    last = tokens
    for _ in range(n):
        earlier = _token_before(last, real & (last >= 0))  # of the key: one further back than of the query
        same &= (last[:, :, None] == earlier[:, None, :]) & (last >= 0)[:, :, None]
        last = earlier
    return same


def _nearest(tokens: Tensor, before: Tensor, model: Any) -> Tensor:
    """True at the latest earlier token, of another type, whose embedding has the largest cosine with the query's. [batch, query, key]."""
    points = [point.name for point in model.hook_points.points.values() if point.role == "embed"]
    if not points:
        raise ValueError("nearest_embedding: this model has no hook point of role 'embed' to take embeddings from.")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=points[:1])
    embedded = torch.nn.functional.normalize(cache[points[0]].double(), dim=-1)
    cosine = embedded @ embedded.mT
    allowed = before & (tokens[:, :, None] != tokens[:, None, :])
    cosine = torch.where(allowed, cosine, -2.0)
    best = cosine.amax(-1, keepdim=True)
    close = allowed & (cosine >= best - 1e-9)
    latest = torch.where(close, torch.arange(tokens.shape[1], device=tokens.device), -1).amax(-1, keepdim=True)
    return close & (torch.arange(tokens.shape[1], device=tokens.device) == latest)


def _cells(source: Tensor) -> Tensor:
    """Cells (t − 1, source[t]) of a planted source [batch, pos], −1 for none: token t is predicted at t − 1. [batch, query, key]."""
    keys = torch.arange(source.shape[1], device=source.device)
    cells = source[:, 1:, None] == keys
    return torch.cat([cells, torch.zeros_like(cells[:, :1])], dim=1)


def weights_of(pattern: Pattern) -> tuple[Tensor, str]:
    """Non-negative weights [batch, head, query, key] whose rows sum to 1 (or 0), and what they are in words."""
    if pattern.meta.columns != "token":
        raise RefusedByPattern(
            f"Head scores need a pattern over tokens; the columns of {pattern.name} are {pattern.meta.columns}s."
        )
    values = pattern.values.double()
    if pattern.meta.is_distribution:
        return values, "attention weights"
    values = values.abs()
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total, 0.0), "|α|, each row divided by its sum"


def _visible(real: Tensor, meta: PatternMeta) -> Tensor:
    """Which real tokens each real token may read, [batch, query, key]."""
    both = real[:, :, None] & real[:, None, :]
    return both if meta.causal == "none" else both.tril(-1 if meta.causal == "strict" else 0)


def _measure(weights: Tensor, visible: Tensor, question: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over rows of the weight wanted and of each control, chance among them, [1 + controls, batch, head], and the rows, [batch]."""
    wanted = question[0].to(weights.device) & visible
    choices = visible.sum(-1)
    rows = wanted.any(-1) & (choices >= 2)
    cells = [wanted.double(), *(control.to(weights) * visible for control in question[1:])]
    sums = [torch.einsum("bhqk,bqk->bhq", weights, cell) for cell in cells]
    chance = wanted.sum(-1).double() / choices.clamp(min=1)
    sums.append(chance[:, None] * (weights.sum(-1) > 0))
    return torch.stack([(total * rows[:, None]).sum(2) for total in sums]), rows.sum(1)


def _stack(layers: list[Tensor]) -> NDArray[np.float64]:
    """[layer, head], nan where a layer has fewer heads than the widest."""
    result = np.full((len(layers), max(len(row) for row in layers)), np.nan)
    for number, row in enumerate(layers):
        result[number, : len(row)] = row.cpu().numpy()
    return result


def _padded(layers: list[Tensor]) -> NDArray[np.float64]:
    """[controls, sequence, layer, head], nan where a layer has fewer heads than the widest."""
    widest = max(layer.shape[-1] for layer in layers)
    return np.stack(
        [np.pad(x.numpy(), ((0, 0), (0, 0), (0, widest - x.shape[-1])), constant_values=np.nan) for x in layers], 2
    )
