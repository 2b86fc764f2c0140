"""The census on planted heads and decoys: labels with precision and recall 1, intervals, the random twin, clusters, every architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.registry import ARCHITECTURES
from probes.census import cluster, head_census, jensen_shannon, random_twin
from probes.heads import head_scores
from tests.probes.test_heads import (
    LENGTH,
    SIGNED,
    VOCAB,
    Stub,
    back,
    duplicating,
    first,
    inducing,
    induction,
    one_hot,
    uniform,
)
from workbench.instrument.patterns import PatternMeta

models.architecture("bdh")  # registers all


def test_planted_heads_get_their_labels_and_decoys_none() -> None:
    """Precision = recall = 1 over seven planted heads and a head of random weights; a fixed offset is no induction head."""

    def noise(tokens: Tensor) -> Tensor:
        scores = torch.randn(*tokens.shape, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
        return scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)

    planted = {
        "previous_token": back(1),
        "current_token": back(0),
        "first_token": first,
        "duplicate_token": duplicating,
        "induction": inducing,
        "offset 9": back(9),
        "broad": uniform,
        "": noise,
    }
    found = head_census(Stub(*planted.values()), induction(16), clusters=3)
    assert [found.label(0, head) for head in range(len(planted))] == list(planted)
    assert [row["label"] for row in found.table()] == list(planted)
    assert found.to_json()["labels"] == list(planted) and found.left_out == {}


def test_intervals_cover_the_score_and_shrink() -> None:
    few, many = induction(6), induction(48)
    narrow, wide = ([] for _ in range(2))
    for data, widths in ((few, wide), (many, narrow)):
        scores = head_scores(Stub(half_the_time), data, "previous_token")
        low, high = scores.interval("previous_token", seed=1)
        assert low[0, 0] <= scores["previous_token"][0, 0] <= high[0, 0]
        widths.append(high[0, 0] - low[0, 0])
    assert 0 < narrow[0] < 0.7 * wide[0]


def half_the_time(tokens: Tensor) -> Tensor:
    """The previous token in sequences whose first token is even, the own token in the others."""
    even = (tokens[:, :1] % 2 == 0)[:, :, None]
    return torch.where(even, back(1)(tokens), back(0)(tokens))


def test_probes_that_these_texts_cannot_answer_are_named() -> None:
    tokens = torch.arange(20).expand(3, -1)
    found = head_census(Stub(back(1), uniform), tokens)
    assert set(found.left_out) == {"duplicate_token", "induction"}
    assert "no token here has such a source" in found.left_out["induction"]
    assert found.label(0, 0) == "previous_token"


def test_more_probes_on_planted_heads() -> None:
    """Bigrams, delimiters and the next token, each read by one head and by no other."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (12, 60), generator=generator)

    def after_same_suffix(n: int):  # type: ignore[no-untyped-def]
        def head(tokens: Tensor) -> Tensor:
            target = torch.full_like(tokens, -1)
            for row, ids in enumerate(tokens.tolist()):
                for query in range(n, len(ids)):
                    for key in range(query - 1, n - 1, -1):
                        if ids[key - n : key] == ids[query - n + 1 : query + 1]:
                            target[row, query] = key
                            break
            return one_hot(target)

        return head

    def latest_delimiter(tokens: Tensor) -> Tensor:
        target = torch.full_like(tokens, -1)
        for row, ids in enumerate(tokens.tolist()):
            for query in range(1, len(ids)):
                target[row, query] = max((k for k in range(query) if ids[k] == 4), default=-1)
        return one_hot(target)

    model = Stub(after_same_suffix(2), latest_delimiter, uniform, after_same_suffix(3))
    scores = head_scores(model, tokens, ("bigram", "delimiter", "trigram"), delimiters=[4])
    assert scores["bigram"][0].argmax() in (0, 3) and scores["bigram"][0, 0] > 0.5
    assert scores["bigram"][0, [1, 2]].max() < 0.05
    assert scores["trigram"][0].argmax() == 3 and scores["trigram"][0, 3] > 0.5
    assert scores["delimiter"][0].argmax() == 1 and scores["delimiter"][0, 1] > 0.3
    assert scores["delimiter"][0, [0, 2, 3]].max() < 0.1
    with pytest.raises(ValueError, match="no delimiters given"):
        head_scores(model, tokens, "delimiter")
    both_ways = Stub(
        lambda tokens: torch.eye(60, dtype=torch.float64).roll(1, 1).expand(len(tokens), -1, -1),
        back(1),
        meta=PatternMeta(causal="none"),
    )
    ahead = head_scores(both_ways, tokens, "next_token")["next_token"][0]
    assert ahead[0] > 0.95 and ahead[1] < 0
    assert np.isnan(head_scores(model, tokens, "next_token")["next_token"]).all()  # nobody can look ahead there


def test_the_nearest_embedding_is_found() -> None:
    """On a model whose embeddings come in pairs, the head that reads the partner scores and the previous-token head does not."""
    model = models.build("gpt", seed=0)
    with torch.no_grad():
        model.embed.W_E[1::2] = model.embed.W_E[0::2] + 0.01 * torch.randn(128, model.d_model)  # type: ignore[union-attr]
    tokens = torch.randint(0, 40, (8, 40), generator=torch.Generator().manual_seed(1))

    def partner(tokens: Tensor) -> Tensor:
        target = torch.full_like(tokens, -1)
        for row, ids in enumerate(tokens.tolist()):
            for query in range(1, len(ids)):
                target[row, query] = max((k for k in range(query) if ids[k] == ids[query] ^ 1), default=-1)
        return one_hot(target)

    class Paired(Stub):
        hook_points = model.hook_points

        def run_with_cache(self, *arguments, **named):  # type: ignore[no-untyped-def]
            return model.run_with_cache(*arguments, **named)

    scores = head_scores(Paired(partner, back(1)), tokens, "nearest_embedding")
    assert scores["nearest_embedding"][0, 0] > 0.3 and scores["nearest_embedding"][0, 1] < 0.1


def test_jensen_shannon_by_hand() -> None:
    """0 for the same, 1 bit for disjoint heads, and the closed form between a certain and an even choice of two."""
    p = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]]], dtype=torch.float64)
    found = jensen_shannon(p)
    half = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert torch.allclose(found, torch.tensor([[0, 1, half], [1, 0, half], [half, half, 0]], dtype=torch.float64))
    blocks = np.array([[0, 0.1, 0.9, 0.9], [0.1, 0, 0.9, 0.9], [0.9, 0.9, 0, 0.1], [0.9, 0.9, 0.1, 0]])
    assert cluster(blocks, 2).tolist() == [1, 1, 2, 2]


def test_the_shipped_circuit_against_its_random_twin() -> None:
    """Induction heads in layer 1, previous-token heads in layer 0, above a null that is near 0."""
    model = models.load("induction-circuit")
    twin = random_twin(model)
    assert replace(twin.config, seed=model.config.seed) == model.config and twin.config.seed != model.config.seed
    found = head_census(model, twin=twin)
    assert abs(found.null["induction"]) < 0.1 and abs(found.null["previous_token"]) < 0.1
    assert "induction" in {found.label(1, head) for head in range(4)}
    assert "previous_token" in {found.label(0, head) for head in range(4)}
    assert "induction" not in {found.label(0, head) for head in range(4)}
    assert all(
        head_census(twin, twin=random_twin(model, 2)).label(layer, h) in ("", "broad")
        for layer in (0, 1)
        for h in range(4)
    )


@pytest.mark.parametrize("name", ["gpt", "alibi", "looped", "retnet", "mamba2", "bdh"])
def test_padding_changes_nothing(name: str) -> None:
    assert name in ARCHITECTURES
    model = models.build(name, seed=2).double()
    tokens = induction(5).tokens
    plain = head_census(model, tokens, ("previous_token", "first_token"))
    padded = torch.cat([torch.zeros(5, 4, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :4] = False
    other = head_census(model, padded, ("previous_token", "first_token"), mask=mask)
    for probe in ("previous_token", "first_token", "broad"):
        assert np.allclose(plain.scores[probe], other.scores[probe], equal_nan=True), probe
    assert np.allclose(plain.distance, other.distance, atol=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown probe 'inducton'. Did you mean 'induction'"):
        head_census(Stub(uniform), induction(2), ["inducton"])
    with pytest.raises(ValueError, match="None of the probes has an answer"):
        head_census(Stub(uniform), torch.arange(VOCAB)[None], ["induction"])
    assert np.isfinite(head_census(Stub(back(1), meta=SIGNED), induction(3)).scores["broad"]).all()
