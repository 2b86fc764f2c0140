"""A model written by hand that finds needles with one known head, beside heads that look as if they did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.attention.config import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from probes.retrieval import THRESHOLD, feeders, needle_grid, needle_recall, retrieval_scores

VOCAB, LENGTH, HEADS = 24, 48, 6
READER, FEEDER = (1, 2), (0, 1)
DECOYS = (
    "three tokens back",
    "the first token",
    "",
    "the same token earlier: in the needle, and wrong",
    "all alike",
    "random",
)
SHARP = 60.0  # score of a match, before the norm divides by the lengths of both streams; all else scores 0


def hand_written() -> LanguageModel:
    """Two layers of six heads, float64. The stream holds the token, the previous token, what is to be said, and the place, one-hot each.

    Layer 0: head 1 copies the previous token. Layer 1: head 2 looks for where the previous token is the present one, and says the token
    that it finds there. The other heads of layer 1 are `DECOYS`, those of layer 0 read a fixed place; none of them writes anything.
    """
    width = 3 * VOCAB + LENGTH
    token, previous, said = (slice(part * VOCAB, (part + 1) * VOCAB) for part in range(3))
    place = slice(3 * VOCAB, width)
    mixer = AttentionConfig(HEADS, d_head=VOCAB + LENGTH, position="learned", bias=False, scale=1.0)
    model = (
        LanguageModel(LanguageModelConfig(2, width, VOCAB, LENGTH, mixer, norm="rms")).double().requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter.zero_()
    for block in model.blocks:
        block.ln1.w.fill_(width**-0.5)  # type: ignore[union-attr, operator]
    model.ln_final.w.fill_(1.0)  # type: ignore[union-attr, operator]
    words, places = torch.eye(VOCAB).double(), torch.eye(LENGTH).double()
    model.embed.W_E[:, token] = words
    model.pos_embed.W_pos[:, place] = places
    model.unembed.weight[:, said] = words  # type: ignore[index]

    by_word, by_place = slice(0, VOCAB), slice(VOCAB, VOCAB + LENGTH)  # what queries and keys can be matched by
    back = {distance: torch.diag(torch.ones(LENGTH - distance), distance).double() for distance in (0, 1, 3)}
    first = torch.zeros(LENGTH, LENGTH).double()
    first[0] = 1
    for layer, heads in ((0, {0: back[0], 1: back[1], 2: back[3], 3: first}), (1, {0: back[3], 1: first})):
        for head, where in heads.items():
            _match(model, layer, head, [(by_place, place, where)], [(by_place, place, places)])
    no_previous = torch.zeros(VOCAB, LENGTH).double()
    no_previous[:, 0] = -2  # the first token can only copy itself, and must not pass for its own successor
    _match(model, *READER, [(by_word, token, words)], [(by_word, previous, words), (by_word, place, no_previous)])
    _match(model, 1, 3, [(by_word, token, words), (by_place, place, -3 * places)],
           [(by_word, token, words), (by_place, place, places)])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        noise = torch.randn(2, VOCAB + LENGTH, width, generator=generator, dtype=torch.float64) / 8
        _match(model, layer, 5, [(slice(None), slice(None), noise[0])], [(slice(None), slice(None), noise[1])])
    for (layer, head), target in ((FEEDER, previous), (READER, said)):
        site = model.blocks[layer].attn
        own = slice(head * (VOCAB + LENGTH), head * (VOCAB + LENGTH) + VOCAB)
        site.value.weight[own, token] = words  # type: ignore[union-attr, index, operator]
        site.output.weight[target, own] = 2 * words  # type: ignore[union-attr, index, operator]
    return model.eval()


Parts = list[tuple[slice, slice, Tensor]]


def _match(model: LanguageModel, layer: int, head: int, query: Parts, key: Parts) -> None:
    """Let a head match: parts are (features, part of the stream, matrix [feature, stream])."""
    site: Any = model.blocks[layer].attn
    start = head * (VOCAB + LENGTH)
    for linear, parts, size in ((site.query, query, SHARP), (site.key, key, 1.0)):
        own = linear.weight[start : start + VOCAB + LENGTH]
        for features, stream, matrix in parts:
            own[features, stream] = size * matrix


def planted() -> dict[str, Any]:
    """What the probe says of the hand-written model: scores, precision and recall at the paper's threshold, and what it feeds on."""
    model = hand_written()
    runs = needle_grid(VOCAB, (24, 40), (0.0, 0.25, 0.5, 0.75, 1.0), needle_length=5, repeats=4)
    found = retrieval_scores(model, runs)
    heads = set(found.retrieval_heads())
    fed = feeders(model, [run for run in runs if run.length == 40], READER)
    loss = {place: value for place, value in fed.items() if place != READER}
    return {
        "planted_score": float(found.scores[READER]),
        "planted_precision": len(heads & {READER}) / max(1, len(heads)),
        "planted_decoys": float(max(found.scores[1, head] for head in range(HEADS) if head != READER[1])),
        "planted_recall": float(found.recall.mean()),
        "planted_recall_without": float(needle_recall(model, runs, [READER]).mean()),
        "planted_feeder": float(loss[FEEDER] / fed[READER]),
        "planted_other_feeders": float(max(value for place, value in loss.items() if place != FEEDER)),
        "planted_scores": found.scores,
        "threshold": THRESHOLD,
    }
