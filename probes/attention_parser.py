"""A parser whose only features are how much words read each other: what attention as a whole knows of syntax (Clark et al. 2019, 5).

    parser = fit_attention_parser(maps, sentences)
    parser.attachment(other_maps, other_sentences)         share of words whose head is found, one number per sentence

The head of word j is chosen by  p(i | j) ∝ exp Σ_k (w_k α^k_ji + u_k α^k_ij),  where α^k_ji is how much head k reads i from j; i = 0 is
what is no word ([CLS], [SEP]) and stands for the root. One weight per head and direction, nothing else: no word is known to the parser.
The problem is convex. The paper's second classifier, whose weights depend on word vectors, is not here.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from probes.progress import Report, watched
from probes.word_attention import WordMap
from workbench.lab.stimuli import Sentence


@dataclass(frozen=True)
class AttentionParser:
    """weights: w and u, [direction, layer, head]; losses: mean −log p(head) in nats per word, one per pass over the sentences."""

    weights: NDArray[np.float32]
    losses: tuple[float, ...]

    def scores(self, reads: WordMap) -> NDArray[np.float32]:
        """Score of every head (columns, 0 the root) for every word (rows), −inf for the word itself, [word, 1 + word]."""
        return np.asarray(_scores(torch.from_numpy(reads), torch.from_numpy(self.weights)))

    def parse(self, reads: WordMap) -> NDArray[np.int64]:
        """The most likely head of every word, −1 for the root, [word]. Words choose by themselves, so the result need not be a tree."""
        return self.scores(reads).argmax(1) - 1

    def attachment(self, maps: Sequence[WordMap], sentences: Sequence[Sentence]) -> NDArray[np.float64]:
        """Unlabelled attachment score of every sentence without punctuation, nan where nothing else is left."""
        return np.array([attachment(self.parse(reads), one) for reads, one in zip(maps, sentences, strict=True)])


def attachment(heads: Sequence[int] | NDArray[np.int64], sentence: Sentence) -> float:
    """Share of the words, punctuation left out, that get their true head (−1: the root); nan without such a word."""
    words = [word for word, part in enumerate(sentence.upos) if part != "PUNCT"]
    return float(np.mean([heads[word] == sentence.heads[word] for word in words])) if words else float("nan")


def right_neighbours(sentence: Sentence) -> list[int]:
    """The baseline in which every word depends on the next one, and the last word is the root."""
    return [*range(1, len(sentence.words)), -1]


def fit_attention_parser(
    maps: Sequence[WordMap],
    sentences: Sequence[Sentence],
    *,
    passes: int = 6,
    learning_rate: float = 0.3,
    penalty: float = 1e-4,
    batch: int = 16,
    seed: int = 0,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> AttentionParser:
    """Fit the weights by Adam on −log p(head), punctuation left out, with a rate that falls to zero.

    Args:
        maps: of each sentence, [layer, head, 1 + word, 1 + word] from `word_attention`. passes: over all sentences. penalty: times ½‖w‖².

    Raises:
        ValueError: no sentence, or a map that does not have one row per word. MeasurementCancelled: `cancel` was set.
    """
    if not maps or len(maps) != len(sentences):
        raise ValueError(f"Expected one map per sentence and at least one, got {len(maps)} and {len(sentences)}.")
    for number, (reads, sentence) in enumerate(zip(maps, sentences, strict=True)):
        if reads.shape[-1] != len(sentence.words) + 1:
            raise ValueError(
                f"Map {number} is for {reads.shape[-1] - 1} words, its sentence has {len(sentence.words)}. Expected the same order."
            )
    weights = torch.zeros(2, *maps[0].shape[:2], requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    count = passes * -(-len(maps) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / count)
    rng, losses = np.random.default_rng(seed), []
    for _ in watched(range(passes), "attention parser, passes", progress, cancel):
        order, total, words = rng.permutation(len(maps)), 0.0, 0
        for start in range(0, len(order), batch):
            some = [_surprise(maps[n], sentences[n], weights) for n in order[start : start + batch]]
            surprise = torch.cat(some)
            if not len(surprise):
                continue
            optimiser.zero_grad()
            (surprise.mean() + penalty / 2 * weights.square().sum()).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total, words = total + float(surprise.detach().sum()), words + len(surprise)
        losses.append(total / max(words, 1))
    return AttentionParser(weights.detach().numpy(), tuple(losses))


def _surprise(reads: WordMap, sentence: Sentence, weights: torch.Tensor) -> torch.Tensor:
    """−log p(head) of every word that is no punctuation, [word]."""
    rows = [word for word, part in enumerate(sentence.upos) if part != "PUNCT"]
    scores = _scores(torch.from_numpy(reads), weights)[rows]
    heads = torch.tensor([sentence.heads[word] + 1 for word in rows], dtype=torch.long)
    return torch.nn.functional.cross_entropy(scores, heads, reduction="none")


def _scores(reads: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """reads [layer, head, 1 + word, 1 + word], weights [direction, layer, head] -> [word, 1 + word]."""
    to, back = torch.einsum("dlh,lhij->dij", weights, reads)
    own = torch.eye(reads.shape[-1], dtype=torch.bool)[1:]
    return (to[1:] + back.T[1:]).masked_fill(own, -torch.inf)
