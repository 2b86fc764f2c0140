"""Where in a prompt what matters should stand: planners that read a model's attention, and passes with several rotation bases.

mass = context_mass(model, tokens, spans)                    what the last token reads of every document
order = attention_sorting(model, documents, question)        most read last, again and again (Peysakhovich & Lerer 2023)
profile = slot_profile(model, prompts)                       what each place in a prompt gets, whatever stands there
order = ranked_order(relevance, profile)                     the best document to the most read place (AttnRank, Yi et al. 2025)
attention_buckets(model, tokens, bases)                      several RoPE bases, whose troughs lie apart (Chen et al. 2023)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from models.parts.positions import Rotary
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

Tokens = Sequence[int]
Spans = Sequence[tuple[int, int]]
COMBINATIONS = ("distributions", "confident_logits")


def joined(documents: Sequence[Tokens], question: Tokens, before: Tokens = ()) -> tuple[Tensor, list[tuple[int, int]]]:
    """The prompt [1, pos], and where each document lies in it, [start, stop)."""
    ids, spans = list(before), []
    for document in documents:
        spans.append((len(ids), len(ids) + len(document)))
        ids += list(document)
    return torch.tensor([ids + list(question)]), spans


def context_mass(model: Any, tokens: Tensor, spans: Spans, layers: Any = None) -> Tensor:
    """Weight that the last token gives to each span, mean over layers and heads, [batch, span].

    Raises:
        RefusedByPattern: patterns that are not distributions. ValueError: no spans.
    """
    if not spans:
        raise ValueError("context_mass got no spans. Expected [start, stop) of at least one document.")
    rows = []
    for pattern in model.patterns(tokens, layers=layers).values():
        pattern.meta.require_distribution("The mass on a context")
        rows.append(torch.stack([pattern.values[:, :, -1, a:b].sum(-1) for a, b in spans], dim=-1).mean(1))
    return torch.stack(rows).mean(0)


@implements("attention-sorting", "probe", "attention_sorting")
def attention_sorting(
    model: Any, documents: Sequence[Tokens], question: Tokens, rounds: int = 1, before: Tokens = (), layers: Any = None
) -> list[int]:
    """Indices of the documents in their new order: the most read stands last. Stops early once the order stays.

    Raises:
        ValueError: less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1.")
    order = list(range(len(documents)))
    for _ in range(rounds):
        tokens, spans = joined([documents[i] for i in order], question, before)
        mass = context_mass(model, tokens, spans, layers)[0]
        new = [order[place] for place in torch.argsort(mass, stable=True).tolist()]
        if new == order:
            break
        order = new
    return order


def slot_profile(model: Any, prompts: Sequence[tuple[Sequence[Tokens], Tokens]], layers: Any = None) -> Tensor:
    """Mean weight of the last token on each place over prompts (documents, question) with equally many documents, [place].

    Raises:
        ValueError: no prompts, or prompts with different numbers of documents.
    """
    counts = sorted({len(documents) for documents, _ in prompts})
    if len(counts) != 1:
        raise ValueError(f"The prompts have {counts or 'no'} documents; expected one number for all.")
    profiles = [context_mass(model, *joined(documents, question), layers)[0] for documents, question in prompts]
    return torch.stack(profiles).mean(0)


@implements("attention-basin", "probe", "ranked_order", note="the average over calibration prompts is a plain mean")
def ranked_order(relevance: Sequence[float], profile: Tensor) -> list[int]:
    """Which document stands at each place: the most relevant at the place that gets most, and so on.

    Raises:
        ValueError: not as many places as documents.
    """
    if len(relevance) != len(profile):
        raise ValueError(f"{len(relevance)} documents do not fit {len(profile)} places.")
    documents = sorted(range(len(relevance)), key=lambda i: -relevance[i])
    order = [0] * len(documents)
    for document, place in zip(documents, torch.argsort(profile, descending=True, stable=True).tolist(), strict=True):
        order[place] = document
    return order


@contextmanager
def rope_base(model: Any, base: float) -> Iterator[None]:
    """Within the block every rotation of the model uses this base.

    Raises:
        ValueError: a model without rotations, or a base that is not positive.
    """
    rotations = [module for module in model.modules() if isinstance(module, Rotary)]
    if not rotations:
        raise ValueError(f"{model.name} has no rotary positions, so there is no base to change.")
    if base <= 0:
        raise ValueError(f"base is {base}; expected a positive number.")
    before = [module.base for module in rotations]
    try:
        for module in rotations:
            module.base = base
        yield
    finally:
        for module, old in zip(rotations, before, strict=True):
            module.base = old


@implements("attention-buckets", "probe", "attention_buckets", note="the search for bases is not here")
def attention_buckets(
    model: Callable[..., Any], tokens: Tensor, bases: Sequence[float], combine: str = "distributions"
) -> Tensor:
    """Log-probabilities of every next token from one pass per base, [batch, pos, vocab].

    combine: `"distributions"`, as in the paper, Σ_n w_n p_n with w the softmax over passes of each pass's largest probability;
    `"confident_logits"`, as in its code, a softmax of Σ_n w_n logits_n with w the softmax over passes of each one's largest logit.

    Raises:
        ValueError: no bases, or an unknown combination.
    """
    if combine not in COMBINATIONS:
        raise ValueError(
            f"Unknown combine {combine!r}.{suggestion(combine, COMBINATIONS)} Expected one of {', '.join(COMBINATIONS)}."
        )
    if not bases:
        raise ValueError("attention_buckets got no bases. Expected at least one.")
    passes = []
    for base in bases:
        with rope_base(model, base):
            passes.append(model(tokens))
    logits = torch.stack(passes)
    if combine == "confident_logits":
        weights = logits.amax(-1, keepdim=True).softmax(0)
        return (weights * logits).sum(0).log_softmax(-1)
    chances = logits.softmax(-1)
    return (chances.amax(-1, keepdim=True).softmax(0) * chances).sum(0).log()
