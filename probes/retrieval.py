"""Retrieval heads: heads that, while the model repeats something from its context, read exactly the token that is emitted next.

    runs = needle_grid(128, lengths=(40, 80), depths=(0.0, 0.5, 1.0), needle_length=6, repeats=4)
    found = retrieval_scores(model, runs)
    found.best(3)                                  [(layer, head, score), …]
    masking_curve(model, runs, found, (1, 2, 4))   accuracy without the top k heads, and without as many others of the same layers
    feeders(model, runs, reader=(1, 2))            which earlier heads the reader needs to find its place

A needle is a key that occurs nowhere else, followed by tokens that occur nowhere else; it lies in random tokens, and the prompt ends with
the key. The model continues greedily. At every step a head scores a hit if the token that it reads most lies in the needle and equals the
token that is emitted (Wu et al. 2024, Retrieval Head). Per run `mode="paper"` counts the different needle tokens hit, over the different
needle tokens, so at most 1; `mode="official"` counts hits over the needle's length as the published code does, which can exceed 1. As
published, only runs count in which the model repeats more than half of the needle. Here the needle's place is known; the published code
searches it by overlap.

A score says where a head looks, not that it matters. In small models a head with score 0 (the feeder that copies each token's predecessor)
can be worth more than any reader, so the control of `masking_curve` takes other heads of the same layers, and excludes those it controls
for (the published control does not, by a comparison of tuples with lists).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.progress import Report, watched
from probes.sinks import best_heads, plain
from probes.statistics import Layer, attention_statistics
from workbench.instrument.errors import suggestion
from workbench.instrument.interventions import Ablate, Patch
from workbench.instrument.selection import Select

MODES = ("paper", "official")
THRESHOLD = 0.1  # above which the paper calls a head a retrieval head


@dataclass(frozen=True)
class NeedleRun:
    """One prompt: `tokens` [pos] whose needle (without its key) is at `start` … `stop` − 1, and that ends with the needle's key.

    `length`: tokens of the prompt. `depth`: place of the needle, 0 (first) to 1 (last). `needle`: which of the repeats.
    """

    tokens: Tensor
    start: int
    stop: int
    length: int
    depth: float
    needle: int

    @property
    def answer(self) -> Tensor:
        """What is to be repeated, [step]."""
        return self.tokens[self.start : self.stop]


def needle_grid(
    vocab_size: int,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needle_length: int = 6,
    repeats: int = 4,
    seed: int = 0,
) -> list[NeedleRun]:
    """Prompts over lengths × depths × needles. Key and needle are different tokens that the rest of the prompt does not hold.

    Raises ValueError when a length cannot hold the needle, or the vocabulary has too few tokens for needle and haystack.
    """
    if needle_length < 1 or repeats < 1:
        raise ValueError(f"needle_length and repeats must be at least 1, got {needle_length} and {repeats}")
    if vocab_size < needle_length + 3:
        raise ValueError(
            f"vocab_size: a needle of {needle_length} tokens and its key need at least {needle_length + 3}, got {vocab_size}"
        )
    for length in lengths:
        if length < needle_length + 3:
            raise ValueError(
                f"lengths: {length} tokens do not hold a needle of {needle_length}, its key twice and anything else"
            )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths: expected numbers from 0 to 1, got {depth!r}")
    random = np.random.default_rng(seed)
    runs = []
    for length in lengths:
        for depth in depths:
            for needle in range(repeats):
                chosen = random.permutation(vocab_size)
                key, words, hay = chosen[0], chosen[1 : needle_length + 1], chosen[needle_length + 1 :]
                free = length - needle_length - 2
                before = round(depth * free)
                filler = random.choice(hay, size=free)
                ids = np.concatenate([filler[:before], [key], words, filler[before:], [key]])
                start = before + 1
                runs.append(NeedleRun(torch.from_numpy(ids), start, start + needle_length, length, depth, needle))
    return runs


@dataclass(frozen=True)
class RetrievalScores:
    """Result of `retrieval_scores`.

    Args:
        scores: mean over the counted runs, [layer, head]. frequency: share of the counted runs in which a head scores at all.
        by_run: score of every run, [run, layer, head]. recall: share of the needle that was repeated, [run]. counted: [run].
        layers: layer numbers, or (layer, step). lengths, depths: of every run. mode: `"paper"` or `"official"`.
    """

    scores: NDArray[np.float64]
    frequency: NDArray[np.float64]
    by_run: NDArray[np.float64]
    recall: NDArray[np.float64]
    counted: NDArray[np.bool_]
    layers: tuple[Layer, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    mode: str

    def best(self, n: int = 5) -> list[tuple[Layer, int, float]]:
        """The n heads of highest score as (layer, head, score)."""
        return best_heads(self.scores, self.layers, n)

    def retrieval_heads(self, threshold: float = THRESHOLD) -> list[tuple[Layer, int]]:
        """Heads above the threshold, best first."""
        return [(layer, head) for layer, head, score in self.best(self.scores.size) if score > threshold]

    def over(self, axis: str) -> dict[float, NDArray[np.float64]]:
        """Mean score [layer, head] by `"depth"` or `"length"`, counted runs only; values without such a run are left out."""
        if axis not in ("depth", "length"):
            raise ValueError(f"Unknown axis {axis!r}. Expected 'depth' or 'length'.")
        of = np.array(self.depths if axis == "depth" else self.lengths, dtype=float)
        return {
            float(value): self.by_run[chosen].mean(0)
            for value in np.unique(of)
            if (chosen := self.counted & (of == value)).any()
        }

    def stability(self, axis: str = "depth") -> float:
        """Mean Spearman correlation of the heads' scores between pairs of depths (or lengths); nan with fewer than two."""
        from scipy.stats import spearmanr

        parts = [values.ravel() for values in self.over(axis).values()]
        pairs = [(a, b) for i, a in enumerate(parts) for b in parts[i + 1 :] if np.ptp(a) > 0 and np.ptp(b) > 0]
        return (
            float(np.mean([spearmanr(a, b, nan_policy="omit").statistic for a, b in pairs])) if pairs else float("nan")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "mode": self.mode,
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "scores": plain(self.scores),
            "frequency": plain(self.frequency),
            "recall": plain(self.recall),
            "counted": self.counted.tolist(),
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "best": [
                [list(layer) if isinstance(layer, tuple) else layer, head, score]
                for layer, head, score in self.best(10)
            ],
        }


def retrieval_scores(
    model: Any,
    runs: Sequence[NeedleRun],
    mode: str = "paper",
    *,
    success: float = 0.5,
    whole_patterns: bool = False,
) -> RetrievalScores:
    """Score every head of a generating model on needle runs.

    Args:
        model: a hooked model with `generate`. mode: see the module's docstring. success: a run counts if more than this share of the
            needle is repeated; −1 counts all. whole_patterns: as for `attention_statistics`.

    Raises:
        ValueError: no runs, an unknown mode, or no run in which the model succeeds (then no score would mean anything).
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}.{suggestion(mode, MODES)} Expected 'paper' or 'official'.")
    emitted = continuations(model, runs)
    recall = np.array([_recall(run, tokens) for run, tokens in zip(runs, emitted, strict=True)])
    counted = recall > success
    if not counted.any():
        raise ValueError(
            f"The model repeats more than {success:.0%} of the needle in none of {len(runs)} runs (best: {recall.max():.0%}), so "
            "nothing is retrieved that a head could be credited with. Expected a model that can do it, or success=-1 to count every run."
        )
    by_run: list[NDArray[np.float64] | None] = [None] * len(runs)
    layers: tuple[Layer, ...] = ()
    for numbers in _by_length(runs):
        prompts = torch.stack([runs[i].tokens for i in numbers])
        answers = torch.stack([emitted[i] for i in numbers])
        fed = torch.cat([prompts, answers[:, :-1]], 1)
        found = attention_statistics(model, fed, statistics=["largest"], whole_patterns=whole_patterns)
        layers = tuple(found)
        first = prompts.shape[1] - 1
        scores = []
        for statistics in found.values():
            reads = statistics.need("largest_at")[:, :, first : first + answers.shape[1]].cpu()
            scores.append(
                torch.stack([copy_scores(reads[row], runs[i], emitted[i], mode) for row, i in enumerate(numbers)])
            )
        widest = max(part.shape[1] for part in scores)
        padded = [torch.nn.functional.pad(part, (0, widest - part.shape[1]), value=torch.nan) for part in scores]
        for row, i in enumerate(numbers):
            by_run[i] = torch.stack([part[row] for part in padded]).numpy()
    per_run = np.stack([scores for scores in by_run if scores is not None])
    return RetrievalScores(
        per_run[counted].mean(0),
        (per_run[counted] > 0).mean(0),
        per_run,
        recall,
        counted,
        layers,
        tuple(run.length for run in runs),
        tuple(run.depth for run in runs),
        mode,
    )


def copy_scores(reads: Tensor, run: NeedleRun, emitted: Tensor, mode: str = "paper") -> Tensor:
    """Copy–paste score of every head in one run, [head].

    reads: the position that each head reads most at the step that emits each token, [head, step]. emitted: [step].
    """
    sequence = torch.cat([run.tokens, emitted])
    inside = (reads >= run.start) & (reads < run.stop)
    hits = inside & (sequence[reads.clamp(min=0)] == emitted)
    if mode == "official":
        return hits.double().sum(-1) / (run.stop - run.start)
    words = run.answer.unique()
    copied = (hits[:, :, None] & (emitted[None, :, None] == words)).any(1)
    return copied.double().mean(-1)


def continuations(model: Any, runs: Sequence[NeedleRun], hooks: Sequence[Any] = ()) -> list[Tensor]:
    """What the model emits greedily after each prompt, as many tokens as the needle has, [step] each."""
    if not runs:
        raise ValueError("No runs given. Expected some from needle_grid.")
    found: list[Tensor | None] = [None] * len(runs)
    for numbers in _by_length(runs):
        prompts = torch.stack([runs[i].tokens for i in numbers])
        steps = runs[numbers[0]].stop - runs[numbers[0]].start
        with torch.no_grad():
            out = model.generate(prompts, steps, hooks=list(hooks))[:, prompts.shape[1] :].cpu()
        for row, i in enumerate(numbers):
            found[i] = out[row]
    return [tokens for tokens in found if tokens is not None]


def needle_recall(
    model: Any, runs: Sequence[NeedleRun], without: Sequence[tuple[Layer, int]] = ()
) -> NDArray[np.float64]:
    """Share of the needle that the model repeats in each run, with the z of the heads in `without` set to zero, [run]."""
    emitted = continuations(model, runs, _silencing(without))
    return np.array([_recall(run, tokens) for run, tokens in zip(runs, emitted, strict=True)])


def masking_curve(
    model: Any,
    runs: Sequence[NeedleRun],
    scores: RetrievalScores,
    ks: Sequence[int],
    *,
    controls: int = 4,
    seed: int = 0,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, Any]:
    """Needle recall without the top k heads, and without k random other heads of the same layers (z set to zero).

    A control takes, in every layer, as many heads as the top k has there, from the heads not among the top k; where a layer has fewer
    left, it takes those, and `control_size` says how many heads that are.

    Returns:
        `{"k", "top", "control" (mean over draws), "control_draws", "control_size", "plain"}`; recall is the mean share of the needle.

    Raises:
        ValueError: a k beyond the number of heads. MeasurementCancelled: `cancel` was set.
    """
    ranked = scores.best(scores.scores.size)
    random = np.random.default_rng(seed)
    heads_of: dict[Layer, list[int]] = {}
    for layer, head, _ in ranked:
        heads_of.setdefault(layer, []).append(head)

    result: dict[str, Any] = {"k": list(ks), "top": [], "control": [], "control_draws": [], "control_size": []}
    result["plain"] = float(needle_recall(model, runs).mean())
    for k in watched(ks, "masking heads", progress, cancel):
        if not 1 <= k <= len(ranked):
            raise ValueError(f"k: expected 1 to {len(ranked)} heads, got {k}")
        top = [(layer, head) for layer, head, _ in ranked[:k]]
        draws, size = [], 0
        for _ in range(controls):
            drawn: list[tuple[Layer, int]] = []
            for layer in dict.fromkeys(layer for layer, _ in top):
                others = [head for head in heads_of[layer] if (layer, head) not in top]
                wanted = min(sum(1 for at, _ in top if at == layer), len(others))
                drawn += (
                    [(layer, int(head)) for head in random.choice(others, size=wanted, replace=False)] if wanted else []
                )
            size = len(drawn)
            draws.append(float(needle_recall(model, runs, drawn).mean()))
        result["top"].append(float(needle_recall(model, runs, top).mean()))
        result["control"].append(float(np.mean(draws)))
        result["control_draws"].append(draws)
        result["control_size"].append(size)
    return result


def feeders(model: Any, runs: Sequence[NeedleRun], reader: tuple[int, int]) -> dict[tuple[int, int], float]:
    """How much of the reader's weight on the right token is lost when one earlier head is silent on its way to the reader.

    Path patching as for IOI (Wang et al. 2022): the sender's z is zero, the z of every other head of the earlier layers is held at the
    clean run's, MLPs and norms are recomputed, and the reader's pattern is looked at. A reader keeps no weight without its
    feeder, whatever the feeder's own retrieval score is. The runs are given their right answers, and all have to be of one length.

    Returns:
        `{(layer, head): loss of weight}`, largest first; the clean weight is under `(reader)`.
    """
    layer, head = reader
    if layer < 1:
        raise ValueError(f"The reader is in layer {layer}; expected a later one: nothing feeds the first.")
    if len({run.length for run in runs}) != 1 or len({run.stop - run.start for run in runs}) != 1:
        raise ValueError("feeders: expected runs of one length and one needle length.")
    tokens = torch.stack([torch.cat([run.tokens, run.answer[:-1]]) for run in runs])
    source = torch.stack([torch.arange(run.start, run.stop) for run in runs])
    rows = torch.arange(runs[0].length - 1, tokens.shape[1])
    earlier = list(range(layer))

    def weight(hooks: Sequence[Any]) -> float:
        pattern = model.patterns(tokens, layers=layer, heads=[head], positions=rows.tolist(), hooks=list(hooks))[layer]
        values = pattern.values[:, 0].abs()
        values = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        return float(values.gather(-1, source.to(values.device)[..., None]).mean())

    with torch.no_grad():
        _, clean = model.run_with_cache(tokens, names=Select(role="z", layer=earlier))
        whole = weight([])
        found: dict[tuple[int, int], float] = {}
        for sender_layer in earlier:
            n_heads = model.mixers[sender_layer].describe()["n_heads"]
            for sender in range(n_heads):
                hooks: list[Any] = []
                for at in earlier:
                    others = [
                        h for h in range(model.mixers[at].describe()["n_heads"]) if (at, h) != (sender_layer, sender)
                    ]
                    if others:
                        hooks.append(Patch(Select(role="z", layer=at), value=clean["z", at], heads=others))
                hooks.append(Ablate(Select(role="z", layer=sender_layer), heads=[sender]))
                found[sender_layer, sender] = whole - weight(hooks)
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    return {reader: whole, **ordered}


def _silencing(chosen: Sequence[tuple[Layer, int]]) -> list[Ablate]:
    by_layer: dict[int, list[int]] = {}
    for layer, head in chosen:
        if isinstance(layer, tuple):
            raise ValueError(
                "Depth shares its weights here, and a head cannot be masked in one step only. Expected a model without loops."
            )
        by_layer.setdefault(layer, []).append(head)
    return [Ablate(Select(role="z", layer=layer), heads=heads) for layer, heads in by_layer.items()]


def _recall(run: NeedleRun, emitted: Tensor) -> float:
    """ROUGE-1 recall: the share of the needle's tokens that are emitted."""
    return float(torch.isin(run.answer, emitted).double().mean())


def _by_length(runs: Sequence[NeedleRun]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault((len(run.tokens), run.stop - run.start), []).append(number)
    return list(groups.values())
