"""Needles of natural text: a sentence hidden in a long text, and a question at its end, for models that read language (Wu et al. 2024).

    runs = text_needle_grid(model, haystack, lengths=(1000, 2000), depths=(0.0, 0.5, 1.0))
    retrieval_scores(model, runs)

The prompt is haystack, needle and question, cut so that it has exactly the wanted number of tokens. The needle goes between two sentences.
Greedy continuations are as long as the needle, where the published code allows 50 tokens. The needles below are our own. Success is counted
in tokens, as for random needles; for a model that reads bytes any sentence repeats most of a needle's, so it says nothing there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from probes.retrieval import NeedleRun
from probes.word_attention import encoded_apart

NEEDLES = (
    (
        " The old lighthouse keeper hid the silver key under the third stone of the garden wall.",
        "\n\nQuestion: Where did the old lighthouse keeper hide the silver key?\nAnswer: The old lighthouse keeper hid the silver key",
    ),
    (
        " Doctor Marlow always orders green tea with two slices of ginger before her evening lecture.",
        "\n\nQuestion: What does Doctor Marlow always order before her evening lecture?\nAnswer: Doctor Marlow always orders",
    ),
    (
        " The secret ingredient of the winning soup was a spoonful of smoked plum vinegar.",
        "\n\nQuestion: What was the secret ingredient of the winning soup?\nAnswer: The secret ingredient of the winning soup was",
    ),
)


def text_needle_grid(
    model: Any,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needles: Sequence[tuple[str, str]] = NEEDLES,
) -> list[NeedleRun]:
    """Prompts over lengths × depths × needles, for a model with a tokenizer.

    Args:
        haystack: text without the needles, long enough for the longest prompt. lengths: tokens of whole prompts.
        needles: (needle, question) with the blanks that belong to them; the question may begin the answer.

    Raises:
        ValueError: a needle that the haystack holds, a length that does not hold needle and question, a haystack that is too short, a depth
            outside 0 … 1, no needle.
    """
    if not needles:
        raise ValueError("No needles given. Expected at least one (needle, question).")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths: expected numbers from 0 to 1, got {depth!r}")
    before, hay, _ = encoded_apart(model.tokenizer, haystack)
    ends = np.array([0, *(at + 1 for at, token in enumerate(hay) if _ends_sentence(model, token))])
    runs = []
    for length in lengths:
        for depth in depths:
            for number, (needle, question) in enumerate(needles):
                if needle.strip() in haystack:
                    raise ValueError(f"needles: the haystack already holds {needle.strip()!r}.")
                words, asked = (encoded_apart(model.tokenizer, part)[1] for part in (needle, question))
                free = length - len(before) - len(words) - len(asked)
                if free < 1:
                    raise ValueError(
                        f"lengths: {length} tokens do not hold needle {number} and its question ({len(words)} and {len(asked)} tokens)."
                    )
                if free > len(hay):
                    raise ValueError(
                        f"haystack: a prompt of {length} tokens needs {free} of it, it has {len(hay)}. Expected a longer text."
                    )
                wanted = round(depth * free)
                possible = ends[ends <= free]
                place = free if depth == 1 else int(possible[np.abs(possible - wanted).argmin()])
                ids = [*before, *hay[:place], *words, *hay[place:free], *asked]
                start = len(before) + place
                runs.append(NeedleRun(torch.tensor(ids), start, start + len(words), length, depth, number))
    return runs


def _ends_sentence(model: Any, token: int) -> bool:
    return model.tokenizer.decode([token]).strip().endswith((".", "!", "?"))
