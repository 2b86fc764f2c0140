"""Activations of words: what a model holds at each word of parsed sentences, at any site, states included.

    words = word_activations(model, load_treebank("dev"), ["blocks.1.hook_resid_post", "blocks.1.mixer.hook_state"])
    words["blocks.1.hook_resid_post"]     float32 [word, width]
    words.facts("upos")                   one label per word

A word is several tokens. `pooling="last"` takes its last token (the first at which a causal model has read all of it), `"first"` its
first, `"mean"` the mean over its tokens. A state is taken after the word's token, flattened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.progress import Progress
from probes.word_attention import encoded_apart
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.lab.stimuli import Sentence

POOLINGS = ("last", "first", "mean")


@dataclass(frozen=True)
class WordActivations:
    """Activations of all words of some sentences, words one after the other.

    Args:
        sites: by site, float32 [word, width]. sentence, word: which sentence and which word of it each row is, [row].
        sentences: the sentences read.
    """

    sites: dict[str, NDArray[np.float32]]
    sentence: NDArray[np.int64]
    word: NDArray[np.int64]
    sentences: tuple[Sentence, ...] = field(repr=False)

    def __getitem__(self, site: str) -> NDArray[np.float32]:
        if site not in self.sites:
            raise KeyError(f"No activations of {site!r}.{suggestion(site, self.sites)} Read: {', '.join(self.sites)}.")
        return self.sites[site]

    def __len__(self) -> int:
        return len(self.word)

    def facts(self, name: str) -> list[str]:
        """One fact of each word: a field of `Sentence` that has one entry per word (`words`, `lemmas`, `upos`, `xpos`, `relations`, …)."""
        known = [key for key, value in vars(self.sentences[0]).items() if isinstance(value, tuple)]
        if name not in known:
            raise ValueError(f"Words have no {name!r}.{suggestion(name, known)} They have: {', '.join(known)}.")
        return [getattr(self.sentences[s], name)[w] for s, w in zip(self.sentence, self.word, strict=True)]

    @property
    def documents(self) -> list[str]:
        """The document of each word."""
        return [self.sentences[number].document for number in self.sentence]

    @property
    def types(self) -> list[str]:
        """The type of each word: its form in lower case."""
        return [form.lower() for form in self.facts("words")]


@torch.no_grad()
def word_activations(
    model: Any,
    sentences: Sequence[Sentence],
    sites: Sequence[str],
    *,
    pooling: str = "last",
    batch_size: int = 16,
    hooks: Sequence[Any] = (),
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> WordActivations:
    """Run the model over sentences, each on its own, and keep its activations at their words.

    Args:
        model: hooked model with a tokenizer. sites: hook points with a position axis, or states. pooling: see the module docstring.
        batch_size: sentences per run; memory, not results. hooks: in place during the run.

    Raises:
        ValueError: no sentence, an unknown pooling, a site without positions, a mean over a state, which is one thing after all tokens.
        MeasurementCancelled: `cancel` was set.
    """
    sentences = tuple(sentences)
    if not sentences:
        raise ValueError("There are no sentences. Expected at least one.")
    if pooling not in POOLINGS:
        raise ValueError(
            f"Unknown pooling {pooling!r}.{suggestion(pooling, POOLINGS)} Expected one of {', '.join(POOLINGS)}."
        )
    points = {site: _point(model, site, pooling) for site in sites}
    by_length = sorted(range(len(sentences)), key=lambda number: len(sentences[number].text))
    found: dict[str, dict[int, Tensor]] = {site: {} for site in sites}
    for start in range(0, len(by_length), batch_size):
        Progress(progress, cancel)(start / len(by_length), f"{start} of {len(by_length)} sentences")
        some = by_length[start : start + batch_size]
        spans = [_token_spans(model, sentences[number]) for number in some]
        tokens, mask = model.pad([sentences[number].text for number in some], side="right")
        wanted = _positions(spans, pooling)
        _, cache = model.run_with_cache(
            tokens, mask=mask, names=list(sites), positions=wanted, hooks=list(hooks), return_type=None
        )
        for site, point in points.items():
            values = _rows_first(cache[site], point)  # [sentence, position, width]
            for row, number in enumerate(some):
                found[site][number] = _pooled(values[row], spans[row], wanted, pooling)
    order = [(number, word) for number, sentence in enumerate(sentences) for word in range(len(sentence.words))]
    stacked = {
        site: torch.cat([rows[number] for number in range(len(sentences))]).float().cpu().numpy()
        for site, rows in found.items()
    }
    index = np.array(order, dtype=np.int64)
    return WordActivations(stacked, index[:, 0], index[:, 1], sentences)


def _point(model: Any, site: str, pooling: str) -> HookPoint:
    (_, selected), *more = model.hook_points.resolve(site)
    point: HookPoint = selected[0].point
    if more or len(selected) != 1:
        raise ValueError(f"{site!r} is {len(selected)} hook points. Expected one site by its name.")
    if point.per_position and pooling == "mean":
        raise ValueError(
            f"{site!r} is a state, which already sums up all tokens so far. Expected pooling='last' or 'first' for it."
        )
    if not point.per_position and "pos" not in point.axes:
        raise ValueError(
            f"{site!r} has the axes {' '.join(point.axes)}. Expected a site with a position axis, or a state."
        )
    return point


def _token_spans(model: Any, sentence: Sentence) -> list[tuple[int, int]]:
    """First and last token (inclusive) of each word, found from how many tokens the text before each of its ends has."""
    encode = getattr(model.tokenizer, "encode_plain", model.tokenizer.encode)
    first = len(encoded_apart(model.tokenizer, "a")[0])  # special tokens before the text; those behind it move nothing
    spans = []
    for start, end in sentence.spans:
        before, upto = first + len(encode(sentence.text[:start])), first + len(encode(sentence.text[:end]))
        spans.append((min(before, upto - 1), upto - 1))
    return spans


def _positions(spans: list[list[tuple[int, int]]], pooling: str) -> list[int]:
    """All token positions that any word of the batch needs."""
    needed: set[int] = set()
    for sentence in spans:
        for first, last in sentence:
            needed.update(range(first, last + 1) if pooling == "mean" else [first if pooling == "first" else last])
    return sorted(needed)


def _rows_first(x: Tensor, point: HookPoint) -> Tensor:
    """[batch, position, everything else flattened]; states are cached as batch, position, then the others."""
    if not point.per_position:
        x = x.movedim(point.axes.index("pos"), 1)
    return x.flatten(2)


def _pooled(values: Tensor, spans: list[tuple[int, int]], positions: list[int], pooling: str) -> Tensor:
    """values [position, width] -> [word, width]."""
    where = {position: row for row, position in enumerate(positions)}
    if pooling == "mean":
        rows = [values[[where[p] for p in range(first, last + 1)]].mean(0) for first, last in spans]
        return torch.stack(rows)
    return values[[where[first if pooling == "first" else last] for first, last in spans]]
