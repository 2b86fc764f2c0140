"""Do concept synapses matter to the predictions? They are taken out, and so are random synapses that are as strong and as much read.

For sentence s the effect is the mean over its marked tokens of log p(token | before) without the synapses minus log p with them, in nats:
negative where the model needed them. A matched control has for each synapse one from the same source head to the same target head
and layers, drawn from those nearest to it in (log strength, log reading), both averaged over the same sentences:

    strength  |C_T| / T            reading  Σ_t |q_t[j] Σ_{τ<t} k_τ[j] y_τ[i]| / T, what actually passes through the synapse
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.bdh.capture import Synapse, neurons_per_head, require_bdh
from probes.bdh.concepts_recording import Recording, padded, record_sentences, tokenised
from probes.bdh.concepts_statistics import Interval
from probes.bdh.interventions import ablate_synapse, mute_synapse
from probes.progress import Progress
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

HOW = ("mute", "ablate")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class CausalCheck:
    """What taking synapses out does to log p of marked tokens, in nats per token.

    Args:
        effects: [sentence]. matched_effects: [draw, sentence]. matched: the controls of each draw.
        mean, interval: of `effects`. difference, difference_interval: of effects minus the draws' mean; 95 % bootstrap over sentences,
            or over whole groups.
        p: (1 + draws whose mean effect is at least as large in size) / (1 + draws).
        match_ratio: median of control / synapse for (strength, reading): 1 is a perfect match. A synapse that is never read (0) is
            compared with the least-read control.
    """

    synapses: tuple[Synapse, ...]
    how: str
    effects: Array
    matched_effects: Array
    matched: tuple[tuple[Synapse, ...], ...]
    mean: float
    interval: Interval
    difference: float
    difference_interval: Interval
    p: float
    match_ratio: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "synapses": [str(synapse) for synapse in self.synapses],
            "how": self.how,
            "effects": self.effects.tolist(),
            "matched_effects": self.matched_effects.tolist(),
            "mean": self.mean,
            "interval": [self.interval.low, self.interval.high],
            "difference": self.difference,
            "difference_interval": [self.difference_interval.low, self.difference_interval.high],
            "p": self.p,
            "match_ratio": list(self.match_ratio),
        }

    def __repr__(self) -> str:
        return (
            f"CausalCheck({self.how} {len(self.synapses)} synapses, {len(self.effects)} sentences: {self.mean:+.4g} nats {self.interval}; "
            f"against {len(self.matched)} matched draws {self.difference:+.4g} {self.difference_interval}, p {self.p:.2g}; "
            f"match {self.match_ratio[0]:.2f} strength, {self.match_ratio[1]:.2f} reading)"
        )

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>"


def marked_positions(model: Any, sentences: Sequence[Any], words: Sequence[str]) -> list[list[int]]:
    """Positions of the tokens of any of the words in each sentence, wherever their token ids occur in a row.

    Raises ValueError for words that occur in no sentence.
    """
    model = require_bdh(model)
    wanted = [model.to_tokens(word)[0].tolist() for word in words]
    out = []
    for tokens in tokenised(model, sentences):
        ids: list[int] = tokens.tolist()
        found: set[int] = set()
        for word in wanted:
            for start in range(len(ids) - len(word) + 1):
                if ids[start : start + len(word)] == word:
                    found.update(range(start, start + len(word)))
        out.append(sorted(found - {0}))
    if not any(out):
        raise ValueError(f"None of the words {list(words)[:5]} occurs in any of the {len(sentences)} sentences.")
    return out


@implements("bdh", "probe", "causal_check", note="not in the paper: ablation against matched random synapses")
@torch.no_grad()
def causal_check(
    model: Any,
    synapses: Sequence[Synapse],
    sentences: Sequence[Any],
    *,
    marked: Sequence[Sequence[int]] | None = None,
    how: str = "mute",
    n_matched: int = 19,
    pool: int = 4000,
    groups: Sequence[str] | None = None,
    n_bootstrap: int = 2000,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> CausalCheck:
    """Take synapses out (all together) and compare with matched random ones.

    Args:
        synapses: found elsewhere; use sentences here that did not choose them.
        marked: positions of the tokens to score in each sentence (`marked_positions`); None for the second half, its continuation.
            Sentences without a marked token are left out.
        how: `"mute"`: the synapses count for nothing in the whole run. `"ablate"`: they are set to 0 once, just before the first marked
            token is predicted.
        n_matched: control draws. pool: random synapses that controls are chosen from, for each pair of heads.
        groups: of each sentence; the bootstrap then draws whole groups.

    Raises ValueError for positions outside a sentence, or where nothing is marked.
    """
    model = require_bdh(model)
    if how not in HOW:
        raise ValueError(f"Unknown how {how!r}.{suggestion(how, HOW)} Expected one of {', '.join(HOW)}.")
    if not len(synapses):
        raise ValueError("synapses is empty, which takes nothing out.")
    for synapse in synapses:
        synapse.check(model)
    tokens, places, kept = _scored_positions(model, sentences, marked, how)
    report = Progress(progress, cancel)
    rng = np.random.default_rng(seed)
    matched, ratio = matched_synapses(model, synapses, [tokens[s] for s in kept], n_matched, pool, rng)
    plain = _log_probs(model, tokens, places, kept, (), how, batch_size)
    runs = []
    for number, chosen in enumerate([tuple(synapses), *matched]):
        report(number / (1 + n_matched), f"taking out set {number + 1} of {1 + n_matched}")
        runs.append(_log_probs(model, tokens, places, kept, chosen, how, batch_size) - plain)
    report(1.0, "done")
    effects, others = runs[0], np.stack(runs[1:]) if n_matched else np.zeros((0, len(kept)))
    weights = _resamples(None if groups is None else [groups[s] for s in kept], len(kept), n_bootstrap, rng)
    ahead = effects - others.mean(0) if n_matched else np.full(len(kept), np.nan)
    larger = int((np.abs(others.mean(1)) >= abs(effects.mean())).sum())
    return CausalCheck(
        synapses=tuple(synapses),
        how=how,
        effects=effects,
        matched_effects=others,
        matched=matched,
        mean=float(effects.mean()),
        interval=Interval.of(weights @ effects),
        difference=float(ahead.mean()),
        difference_interval=Interval.of(weights @ ahead) if n_matched else Interval(float("nan"), float("nan")),
        p=(1 + larger) / (1 + n_matched),
        match_ratio=ratio,
    )


def _scored_positions(
    model: Any, sentences: Sequence[Any], marked: Sequence[Sequence[int]] | None, how: str
) -> tuple[list[Tensor], list[list[int]], list[int]]:
    tokens = tokenised(model, sentences)
    if marked is None:
        marked = [range(max(1, len(ids) // 2), len(ids)) for ids in tokens]
    if len(marked) != len(tokens):
        raise ValueError(f"marked has {len(marked)} entries for {len(tokens)} sentences; expected one for each.")
    places = [sorted(set(positions)) for positions in marked]
    first = 2 if how == "ablate" else 1  # an edit after token t changes predictions from token t + 2 on
    for number, (ids, positions) in enumerate(zip(tokens, places, strict=True)):
        if positions and not first <= positions[0] <= positions[-1] < len(ids):
            raise ValueError(
                f"Marked positions of sentence {number} are {positions[:5]}; expected {first}..{len(ids) - 1}: token 0 is not predicted"
                + (", and how='ablate' changes predictions from token 2 on." if how == "ablate" else ".")
            )
    kept = [number for number, positions in enumerate(places) if positions]
    if not kept:
        raise ValueError("No sentence has a marked position; expected at least one.")
    return tokens, places, kept


def _log_probs(
    model: Any,
    tokens: Sequence[Tensor],
    places: Sequence[Sequence[int]],
    kept: Sequence[int],
    synapses: Sequence[Synapse],
    how: str,
    batch_size: int,
) -> Array:
    """Mean log p of the marked tokens of each kept sentence, with synapses taken out."""
    size = 1 if how == "ablate" and synapses else batch_size
    out = []
    for first in range(0, len(kept), size):
        numbers = kept[first : first + size]
        batch = padded([tokens[s] for s in numbers])
        hooks: list[Any] = []
        for synapse in synapses:
            if how == "mute":
                hooks += mute_synapse(model, synapse)
            else:
                hooks.append(ablate_synapse(model, batch, synapse, after=places[numbers[0]][0] - 2))
        logits = model.run_with_hooks(batch, hooks=hooks) if hooks else model(batch)
        scores = logits[:, :-1].double().log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
        out += [float(scores[row, [p - 1 for p in places[s]]].mean()) for row, s in enumerate(numbers)]
    return np.array(out)


def _resamples(groups: Sequence[str] | None, n: int, draws: int, rng: np.random.Generator) -> Array:
    """Weights [draw, sentence] that sum to 1: sentences, or whole groups, drawn with replacement."""
    units = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(units.max()) + 1
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)[:, units]
    return weights / weights.sum(1, keepdims=True)


# Matching --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matched_synapses(
    model: Any, synapses: Sequence[Synapse], sentences: Sequence[Any], n_draws: int, pool: int, rng: np.random.Generator
) -> tuple[tuple[tuple[Synapse, ...], ...], tuple[float, float]]:
    """For each draw one control per synapse, and the median ratio of controls to synapses in strength and in reading.

    Raises ValueError where the pool holds too few synapses that are ever strengthened.
    """
    recording = record_sentences(
        model,
        sentences,
        source_layers=sorted({s.source_layer for s in synapses}),
        target_layers=sorted({s.target_layer for s in synapses}),
    )
    width, taken = neurons_per_head(model), set(synapses)
    draws: list[list[Synapse]] = [[] for _ in range(n_draws)]
    ratios = []
    alike: dict[tuple[int, int, int, int], list[Synapse]] = {}
    for synapse in synapses:
        alike.setdefault((synapse.source_layer, synapse.target_layer, synapse.source[0], synapse.target[0]), []).append(
            synapse
        )
    for (source, target, a, b), wanted in alike.items():
        rows = (
            torch.cat([y[:, a * width : (a + 1) * width] for y in recording.y[source]])
            .abs()
            .amax(0)
            .nonzero()[:, 0]
            .numpy()
        )
        columns = (
            torch.cat([x[:, b * width : (b + 1) * width] for x in recording.x[target]])
            .abs()
            .amax(0)
            .nonzero()[:, 0]
            .numpy()
        )
        if not len(rows) or not len(columns):
            raise ValueError(
                f"No synapse from head {a} of layer {source} to head {b} of layer {target} is ever strengthened here."
            )
        flat = (
            rng.permutation(len(rows) * len(columns))[: pool + len(wanted)]
            if len(rows) * len(columns) < 2**22
            else None
        )
        if flat is None:
            flat = np.unique(rng.integers(0, len(rows) * len(columns), pool + len(wanted)))
        others = [
            s
            for i in flat
            if (s := Synapse((a, int(rows[i // len(columns)])), (b, int(columns[i % len(columns)])), target, source))
            not in taken
        ]
        activity = strength_and_reading(recording, [*wanted, *others])
        own, theirs = activity[: len(wanted)], activity[len(wanted) :]
        alive = np.flatnonzero((theirs > 0).all(1))
        theirs, others = theirs[alive], [others[number] for number in alive]
        if len(others) < n_draws:
            raise ValueError(
                f"Only {len(others)} random synapses from head {a} of layer {source} to head {b} of layer {target} are ever used; "
                f"expected at least n_matched = {n_draws}. Use more sentences or a larger pool."
            )
        floor = theirs.min(0)
        spread = np.log(theirs).std(0) + 1e-12
        for values in own:
            distance = np.square((np.log(theirs) - np.log(np.maximum(values, floor))) / spread).sum(1)
            nearest = np.argsort(distance, kind="stable")[:n_draws]
            for draw, number in zip(draws, rng.permutation(nearest), strict=True):
                draw.append(others[number])
            ratios.append(theirs[nearest] / np.where(values > 0, values, floor))
    medians = np.median(np.concatenate(ratios), 0) if n_draws else (np.nan, np.nan)
    return tuple(tuple(draw) for draw in draws), (float(medians[0]), float(medians[1]))


def strength_and_reading(recording: Recording, synapses: Sequence[Synapse]) -> Array:
    """Mean over sentences of |C_T| / T and of the mean size of what passes through, [synapse, 2]."""
    width = recording.n_neurons // recording.n_heads
    out = np.zeros((len(synapses), 2))
    together: dict[tuple[int, int, int], list[int]] = {}
    for number, synapse in enumerate(synapses):
        together.setdefault((synapse.source_layer, synapse.target_layer, synapse.target[0]), []).append(number)
    for (source, target, head), numbers in together.items():
        rows = [synapses[n].source[0] * width + synapses[n].source[1] for n in numbers]
        neurons = torch.tensor([synapses[n].target[1] for n in numbers])
        for sentence in range(len(recording)):
            keys = recording.targets(target, head, sentence, "strength")[:, :, neurons // 2]
            y = recording.y[source][sentence][:, rows]
            strength = torch.hypot(*(y * keys).sum(1)) / len(y)
            own = torch.where(neurons % 2 == 1, keys[1], keys[0])
            written = (y * own).cumsum(0) - y * own
            reading = (own * written).abs().mean(0)
            out[numbers] += torch.stack([strength, reading], 1).double().numpy() / len(recording)
    return out
