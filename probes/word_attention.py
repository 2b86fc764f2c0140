"""Attention between words: what every head reads, for models whose tokens are pieces of words.

    for number, reads in word_attention(model, [sentence.written for sentence in sentences]):
        reads[layer, head, 1 + i, 1 + j]       how much word i reads word j; index 0 is all that is no word ([CLS], [SEP])

A word that is several tokens is read by the sum of the weights on its tokens, and reads by the mean over its tokens (Clark et al. 2019,
section 4.1), so that rows still sum to 1. Each word is split into tokens by itself, which leaves no doubt which token belongs to which
word. For signed patterns a weight is |α| divided by its row's sum.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.heads import weights_of
from probes.progress import Report, watched

WordMap = NDArray[np.float32]  # [layer, head, 1 + word, 1 + word]


@torch.no_grad()
def word_attention(
    model: Any,
    texts: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[int, WordMap]]:
    """Yield (number of the text, [layer, head, 1 + word, 1 + word]) for all texts, short ones first.

    Args:
        model: a hooked model with a tokenizer, all of whose layers have a pattern over tokens and equally many heads.
        texts: the words of each text, with their blanks (`Sentence.written`). batch_size: texts per run; memory, not results.

    Raises:
        ValueError: no text, a text without words, one longer than the model reads. RefusedByPattern: a pattern whose columns are no tokens.
        MeasurementCancelled: `cancel` was set.
    """
    if not texts or not all(texts):
        raise ValueError("Expected at least one text, and at least one word in each.")
    encoded = [_tokens(model, words) for words in texts]
    for number, (ids, _) in enumerate(encoded):
        if model.n_ctx is not None and len(ids) > model.n_ctx:
            raise ValueError(f"Text {number} has {len(ids)} tokens; this model reads at most {model.n_ctx}.")
    order = sorted(range(len(texts)), key=lambda number: len(encoded[number][0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for some in watched(batches, "attention between words, batches", progress, cancel):
        longest = max(len(encoded[number][0]) for number in some)
        tokens = torch.tensor([encoded[number][0] + [0] * (longest - len(encoded[number][0])) for number in some])
        mask = torch.tensor([[p < len(encoded[number][0]) for p in range(longest)] for number in some])
        patterns = model.patterns(tokens.to(model.device), mask=mask.to(model.device))
        weights = torch.stack([weights_of(pattern)[0] for pattern in patterns.values()], 1).float().cpu()
        for row, number in enumerate(some):
            owner = torch.tensor(encoded[number][1])
            length = len(owner)
            member = (owner[None] == torch.arange(len(texts[number]) + 1)[:, None]).float()  # [1 + word, token]
            mean = member / member.sum(1, keepdim=True).clamp(min=1)
            reads = mean @ weights[row, :, :, :length, :length] @ member.T
            yield number, reads.numpy()


def _tokens(model: Any, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Token ids of a text, and of each token the word that it belongs to, from 1; 0 for special tokens."""
    before, _, after = encoded_apart(model.tokenizer, "a")
    plain = getattr(model.tokenizer, "encode_plain", model.tokenizer.encode)
    ids, owner = list(before), [0] * len(before)
    for number, word in enumerate(words, 1):
        pieces = plain(word)
        ids += pieces
        owner += [number] * len(pieces)
    return ids + after, owner + [0] * len(after)


def encoded_apart(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts before a text, the ids of the text itself, and what it puts after it."""
    if not hasattr(tokenizer, "encode_plain"):
        return [], tokenizer.encode(text), []
    whole, plain = tokenizer.encode(text), tokenizer.encode_plain(text)
    start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:start], plain, whole[start + len(plain) :]
