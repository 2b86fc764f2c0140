"""Planners of prompts on models with planted attention; passes with several bases against passes made by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from probes.context_order import (
    attention_buckets,
    attention_sorting,
    context_mass,
    joined,
    ranked_order,
    rope_base,
    slot_profile,
)
from workbench.instrument.errors import RefusedByPattern
from workbench.instrument.patterns import Pattern, PatternMeta


class Planted:
    """A model whose last token reads token t with a weight ∝ value[id] · (1 + slope · position): content, and a preference of place."""

    name = "planted"

    def __init__(self, slope: float = 0.0) -> None:
        self.slope = slope

    def patterns(self, tokens: Tensor, layers: Any = None) -> dict[int, Pattern]:
        weights = tokens.double() * (1 + self.slope * torch.arange(tokens.shape[1]))
        row = weights / weights.sum(-1, keepdim=True)
        values = row[:, None, None].expand(-1, 2, tokens.shape[1], -1)
        return {0: Pattern(values, PatternMeta(), 0, "planted")}


DOCUMENTS = [[5, 5], [9, 9, 9], [1, 1], [7, 7]]


def test_mass_on_documents() -> None:
    tokens, spans = joined(DOCUMENTS, [2], before=[4])
    assert tokens.tolist() == [[4, 5, 5, 9, 9, 9, 1, 1, 7, 7, 2]] and spans == [(1, 3), (3, 6), (6, 8), (8, 10)]
    assert torch.allclose(context_mass(Planted(), tokens, spans), torch.tensor([[10, 27, 2, 14]]).double() / 59)
    with pytest.raises(RefusedByPattern, match="mass"):
        context_mass(models.build("diff-transformer"), tokens, spans)


def test_sorting_puts_what_is_read_last() -> None:
    assert attention_sorting(Planted(), DOCUMENTS, [2]) == [2, 0, 3, 1]
    assert attention_sorting(Planted(), DOCUMENTS, [2], rounds=5) == [2, 0, 3, 1]


def test_sorting_again_undoes_a_preference_of_place() -> None:
    """A model that reads the end more first takes a late document for the important one; another round puts that right."""
    documents = [[8], [2], [3], [4]]
    assert attention_sorting(Planted(slope=0.5), documents, [1]) == [1, 2, 0, 3]
    assert attention_sorting(Planted(slope=0.5), documents, [1], rounds=6) == [1, 2, 3, 0]


def test_the_best_document_goes_to_the_best_place() -> None:
    profile = slot_profile(Planted(slope=-0.05), [([[3], [3], [3]], [1]), ([[6], [6], [6]], [2])])
    assert profile.argsort(descending=True).tolist() == [0, 1, 2]
    assert ranked_order([0.1, 0.9, 0.5], torch.tensor([0.2, 0.1, 0.4])) == [2, 0, 1]
    assert ranked_order([0.1, 0.9, 0.5], profile) == [1, 2, 0]
    for call in (
        lambda: ranked_order([1.0], profile),
        lambda: slot_profile(Planted(), [([[1]], [1]), ([[1], [2]], [1])]),
    ):
        with pytest.raises(ValueError, match="document"):
            call()


def test_buckets_are_passes_with_other_bases() -> None:
    """Against models built with each base; afterwards the model is what it was."""
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    model = models.build("llama").double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    before, by_hand = model(tokens), []
    for base in (100.0, 20000.0):
        site = SimpleNamespace(**vars(model.config))
        mixers = tuple(type(m)(**{**vars(m), "rope_base": base}) for m in model.config.mixers)
        twin = type(model)(type(model.config)(**{**vars(site), "mixer": mixers})).double()
        twin.load_state_dict(model.state_dict())
        by_hand.append(twin(tokens))
    assert float((by_hand[0] - by_hand[1]).abs().max()) > 1e-3
    chances = [logits.softmax(-1) for logits in by_hand]
    peak = torch.stack([p.max(-1, keepdim=True).values for p in chances]).exp()
    expected = sum(w * p for w, p in zip(peak / peak.sum(0), chances, strict=True))
    assert torch.allclose(attention_buckets(model, tokens, [100.0, 20000.0]).exp(), expected, atol=1e-10)
    top = torch.stack([logits.max(-1, keepdim=True).values for logits in by_hand]).exp()
    mixed = sum(w * logits for w, logits in zip(top / top.sum(0), by_hand, strict=True))
    got = attention_buckets(model, tokens, [100.0, 20000.0], "confident_logits")
    assert torch.allclose(got.exp(), mixed.softmax(-1), atol=1e-10)
    assert torch.equal(model(tokens), before)


def test_the_base_comes_back_after_an_error() -> None:
    model = models.build("llama")
    with pytest.raises(RuntimeError, match="stop"), rope_base(model, 5.0):
        raise RuntimeError("stop")
    assert next(m.base for m in model.modules() if type(m).__name__ == "Rotary") == 10000.0
    for wrong in (
        lambda: attention_buckets(model, torch.ones(1, 4), []),
        lambda: attention_sorting(model, [[1]], [1], 0),
    ):
        with pytest.raises(ValueError, match="at least"):
            wrong()
    with pytest.raises(ValueError, match="no rotary"), rope_base(models.build("universal-transformer"), 5.0):
        pass
    with pytest.raises(ValueError, match="'distributions'"):
        attention_buckets(model, torch.ones(1, 4), [1.0], "distribution")
