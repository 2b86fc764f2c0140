"""The structural probe (Hewitt & Manning 2019): a linear map B under which squared distance between words is distance in their syntax tree.

    d_B(i, j) = ‖B(h_i − h_j)‖²        loss = mean over sentences of Σ_ij |d_tree(i, j) − d_B(i, j)| / length²

UUAS    share of tree edges that the minimum spanning tree of d_B finds, punctuation left out of both
DSpr    Spearman correlation of d_B(i, ·) with d_tree(i, ·), averaged over the words of a sentence, then over the sentences of each length,
        then over lengths 5 … 50

Words in a row already make a decent tree: `linear_baseline` scores d(i, j) = |i − j|.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.intervals import Interval, mean_interval
from probes.linear.words import WordActivations
from probes.progress import MeasurementCancelled

Array = NDArray[np.float64]
LENGTHS = range(5, 51)


@dataclass(frozen=True)
class TreeSentence:
    """A sentence with its tree. vectors [word, width], distances [word, word] in edges, counted [word]: False for punctuation."""

    vectors: NDArray[Any]
    distances: Array
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class StructuralScores:
    """What a distance gets right on test sentences; see the module docstring.

    Args:
        uuas, dspr: nan where no sentence has an edge, or a length of 5 to 50. uuas_interval: bootstrap over sentences.
    """

    uuas: float
    uuas_interval: Interval
    dspr: float
    n_sentences: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, nan as None."""
        interval = [self.uuas_interval.low, self.uuas_interval.high]
        plain = {name: None if (v := getattr(self, name)) != v else v for name in ("uuas", "dspr", "n_sentences")}
        return plain | {"uuas_interval": [None if v != v else v for v in interval]}

    def __repr__(self) -> str:
        return f"StructuralScores(UUAS {self.uuas:.3f} {self.uuas_interval}, DSpr {self.dspr:.3f}, {self.n_sentences} sentences)"


@dataclass(frozen=True)
class StructuralProbe:
    """A fitted B [rank, width], and the mean training loss of each epoch."""

    projection: Tensor
    losses: tuple[float, ...]

    def distances(self, vectors: Any) -> Array:
        """d_B between all words of a sentence, vectors [word, width] -> [word, word]."""
        x = torch.as_tensor(np.asarray(vectors), dtype=torch.float64) @ self.projection.double().T
        return (x[:, None] - x[None]).square().sum(-1).numpy()

    def score(self, sentences: Sequence[TreeSentence]) -> StructuralScores:
        """UUAS and DSpr on sentences that it was not fitted on."""
        return score_distances([self.distances(s.vectors) for s in sentences], sentences)


def tree_distances(heads: Sequence[int]) -> Array:
    """Number of edges between all words of a tree [word, word]. heads: index of each word's governor, −1 for the root.

    Raises:
        ValueError: heads that are no tree.
    """
    from scipy.sparse.csgraph import shortest_path

    n = len(heads)
    wrong = [head for head in heads if not -1 <= head < n]
    if wrong or sum(head == -1 for head in heads) != 1:
        raise ValueError(f"heads {list(heads)} are no tree. Expected one root (−1) and indices 0..{n - 1}.")
    edges = np.zeros((n, n))
    for word, head in enumerate(heads):
        if head >= 0:
            edges[word, head] = 1
    distances = shortest_path(edges, directed=False, unweighted=True)
    if not np.isfinite(distances).all():
        raise ValueError(f"heads {list(heads)} are no tree: they have a circle.")
    return np.asarray(distances)


def tree_sentences(words: WordActivations, site: str, max_length: int | None = 50) -> list[TreeSentence]:
    """The sentences of `words` with their trees, those of one word or of more than `max_length` left out."""
    vectors, found = words[site], []
    starts = np.flatnonzero(words.word == 0)
    for sentence, start in zip(words.sentences, starts, strict=True):
        n = len(sentence.words)
        if n >= 2 and (max_length is None or n <= max_length):
            counted = np.array([tag != "PUNCT" for tag in sentence.upos])
            found.append(TreeSentence(vectors[start : start + n], tree_distances(sentence.heads), counted))
    return found


def fit_structural_probe(
    sentences: Sequence[TreeSentence],
    rank: int = 64,
    *,
    epochs: int = 20,
    batch_size: int = 20,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> StructuralProbe:
    """Fit B by Adam. Activations are brought to unit root mean square first; the factor is part of the returned B.

    Args:
        rank: rows of B (at most the width of the activations are used).

    Raises:
        ValueError: no sentences, a rank below 1. MeasurementCancelled: `cancel` was set.
    """
    if not sentences:
        raise ValueError("There are no sentences to fit on. Expected at least one of two words or more.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1.")
    width = sentences[0].vectors.shape[1]
    rank = min(rank, width)
    vectors = [torch.as_tensor(np.asarray(s.vectors), dtype=torch.float32) for s in sentences]
    trees = [torch.as_tensor(s.distances, dtype=torch.float32) for s in sentences]
    size = float(torch.cat(vectors).square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    projection = ((torch.rand(rank, width, generator=generator) * 2 - 1) * 0.5 / width**0.5).requires_grad_()
    optimiser = torch.optim.Adam([projection], lr=learning_rate)
    losses = []
    for epoch in range(epochs):
        if progress is not None:
            progress(epoch / epochs, f"epoch {epoch + 1} of {epochs}")
        total = 0.0
        for some in torch.randperm(len(sentences), generator=generator).split(batch_size):
            if cancel is not None and cancel.is_set():
                raise MeasurementCancelled("Cancelled while fitting the structural probe; nothing was kept.")
            loss = torch.stack([_loss(projection, vectors[i] / size, trees[i]) for i in some.tolist()]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(some)
        losses.append(total / len(sentences))
    return StructuralProbe(projection.detach() / size, tuple(losses))


def _loss(projection: Tensor, vectors: Tensor, tree: Tensor) -> Tensor:
    x = vectors @ projection.T
    return ((x[:, None] - x[None]).square().sum(-1) - tree).abs().sum() / len(x) ** 2


def linear_baseline(sentences: Sequence[TreeSentence]) -> StructuralScores:
    """The scores of distance in the text, |i − j|: every word is joined to the next."""
    indices = [np.arange(len(s.distances)) for s in sentences]
    return score_distances([np.abs(i[:, None] - i[None]).astype(float) for i in indices], sentences)


def score_distances(predicted: Sequence[Array], sentences: Sequence[TreeSentence]) -> StructuralScores:
    """UUAS and DSpr of predicted distances [word, word] of each sentence."""
    found, edges, by_length = [], [], dict[int, list[float]]()
    for distance, sentence in zip(predicted, sentences, strict=True):
        keep = np.ix_(sentence.counted, sentence.counted)
        gold, guess = _spanning_edges(sentence.distances[keep]), _spanning_edges(distance[keep])
        if gold:
            found.append(len(gold & guess))
            edges.append(len(gold))
        if len(distance) in LENGTHS:
            by_length.setdefault(len(distance), []).append(_rank_correlation(distance, sentence.distances))
    dspr = float(np.mean([np.mean(values) for values in by_length.values()])) if by_length else float("nan")
    if not found:
        return StructuralScores(float("nan"), Interval(float("nan"), float("nan")), dspr, len(sentences))
    share, total = np.array(found) / np.array(edges), np.array(edges, dtype=float)
    return StructuralScores(sum(found) / sum(edges), mean_interval(share, weights=total), dspr, len(sentences))


def _spanning_edges(distances: Array) -> set[tuple[int, int]]:
    from scipy.sparse.csgraph import minimum_spanning_tree

    # scipy reads 0 as "no edge"; one more everywhere leaves the tree as it is
    rows, columns = minimum_spanning_tree(distances + 1).nonzero()
    return {(min(i, j), max(i, j)) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)}


def _rank_correlation(predicted: Array, true: Array) -> float:
    """Mean over words of the Spearman correlation of their rows; 0 for a row that does not vary, which ranks nothing."""
    from scipy.stats import rankdata

    a, b = (rankdata(x, axis=1) for x in (predicted, true))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return float(np.where(size > 0, (a * b).sum(1) / np.where(size > 0, size, 1), 0).mean())
