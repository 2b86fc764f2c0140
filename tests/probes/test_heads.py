"""Head scores on planted truth: patterns made by hand, a circuit built from weights, decoys, and every architecture."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.registry import ARCHITECTURES
from probes.heads import PROBES, HeadScores, head_scores
from workbench.instrument.errors import HookError, RefusedByPattern
from workbench.instrument.interventions import Ablate
from workbench.instrument.patterns import Pattern, PatternMeta
from workbench.instrument.selection import Select
from workbench.lab.tasks import TaskBatch, make_task

models.architecture("bdh")  # registers all
VOCAB, LENGTH = 40, 48
SIGNED = PatternMeta(signed=True, rows_sum_to="free", effective=True)
STRICT = PatternMeta(signed=True, rows_sum_to="free", effective=True, causal="strict")


def induction(batch: int = 24, **options: Any) -> TaskBatch:
    return make_task("induction", vocab_size=VOCAB, length=LENGTH, **options).batch(batch)


class Stub:
    """A hooked model reduced to what the probe asks for: heads are functions from tokens [batch, pos] to [batch, query, key]."""

    def __init__(self, *heads: Any, meta: PatternMeta | None = None) -> None:
        self.heads, self.meta, self.calls = heads, meta or PatternMeta(), 0

    def to_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def patterns(self, tokens: Tensor, **options: Any) -> dict[int, Pattern]:
        self.calls += 1
        values = torch.stack([head(tokens) for head in self.heads], dim=1)
        return {0: Pattern(values, self.meta, 0, "blocks.0.attn.hook_pattern")}


def one_hot(target: Tensor) -> Tensor:
    """A head that reads exactly one token per row and, where there is none (−1), all that it can see. target [batch, query]."""
    reads = torch.nn.functional.one_hot(target.clamp(min=0), target.shape[1]).double()
    return torch.where(target[..., None] < 0, uniform(target), reads)


def back(distance: int) -> Any:
    """The head that always looks `distance` tokens back."""
    return lambda tokens: one_hot((torch.arange(tokens.shape[1]) - distance).clamp(min=-1).expand(tokens.shape))


def first(tokens: Tensor) -> Tensor:
    return one_hot(torch.zeros_like(tokens))


def uniform(tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.float64).tril()
    return (seen / seen.sum(-1, keepdim=True)).expand(len(tokens), -1, -1)


def latest_equal(tokens: Tensor, offset: int) -> Tensor:
    """Position of the latest earlier equal token plus `offset`, −1 without one."""
    target = torch.full_like(tokens, -1)
    for row in range(tokens.shape[0]):
        for query in range(tokens.shape[1]):
            for key in range(query - 1, -1, -1):
                if tokens[row, key] == tokens[row, query]:
                    target[row, query] = key + offset if key + offset <= query else -1
                    break
    return target


def inducing(tokens: Tensor) -> Tensor:
    return one_hot(latest_equal(tokens, 1))


def duplicating(tokens: Tensor) -> Tensor:
    return one_hot(latest_equal(tokens, 0))


HEADS = {
    "previous_token": back(1),
    "duplicate_token": duplicating,
    "induction": inducing,
    "first_token": first,
    "current_token": back(0),
}


# ---------------------------------------------------------------------------------------------------- patterns by hand


def test_planted_heads_are_found_and_no_other() -> None:
    """Each of five ideal heads scores high on its own probe and near 0 or below on every other."""
    scores = head_scores(Stub(*(HEADS[probe] for probe in PROBES)), induction())
    assert scores.layers == (0,) and scores.measured_on == ("attention weights",)
    for number, probe in enumerate(PROBES):
        values = scores[probe][0]
        assert values[number] > 0.7, probe
        assert np.delete(values, number).max() < 0.05, (probe, values)
        assert scores.best(probe, 1) == [(0, number, values[number])]


def test_numbers_by_hand() -> None:
    """The weight of an ideal head is 1; what is subtracted is counted here once more, cell by cell."""
    batch = induction()
    tokens, source, control = batch.tokens, batch.metadata["source"], batch.metadata["control_source"]
    scores = head_scores(Stub(*(HEADS[probe] for probe in PROBES), spread, uniform), batch)
    one_of = np.mean([1 / (query + 1) for query in range(1, LENGTH)])
    for probe in ("previous_token", "current_token", "first_token"):
        assert scores.weights[probe][0, PROBES.index(probe)] == 1
        assert scores[probe][0, PROBES.index(probe)] == pytest.approx(1 - one_of, abs=1e-12)
        assert scores.rows[probe].tolist() == [24 * (LENGTH - 1)]
    for probe, head in (("duplicate_token", 5), ("induction", 2), ("induction", 6)):
        cells: list[tuple[int, int, list[int]]] = []  # row of the batch, query, wanted keys
        for row in range(24):
            for query in range(1, LENGTH):
                equal = [key for key in range(query) if tokens[row, key] == tokens[row, query]]
                if probe == "induction":
                    next_ = query + 1
                    if next_ == LENGTH or source[row, next_] < 0 or control[row, next_] < 0:
                        continue
                    equal = [key + 1 for key in equal if key + 1 < query]
                    assert int(source[row, next_]) in equal
                if equal:
                    cells.append((row, query, equal))
        there, hits = np.zeros(LENGTH), np.zeros(LENGTH)
        for _, query, wanted in cells:
            there[1 : query + 1] += 1
            for key in wanted:
                hits[query - key] += 1
        share = hits / np.maximum(there, 1)
        pattern = Stub(*(HEADS[p] for p in PROBES), spread, uniform).patterns(tokens)[0].values[:, head].numpy()
        read = np.mean([pattern[row, query, wanted].sum() for row, query, wanted in cells])
        chance = np.mean([len(wanted) / (query + 1) for _, query, wanted in cells])
        by_distance = np.mean([sum(pattern[row, q, k] * share[q - k] for k in range(q)) for row, q, _ in cells])
        controls = [chance, by_distance]
        if probe == "induction":
            controls.append(np.mean([pattern[row, query, control[row, query + 1]] for row, query, _ in cells]))
        assert scores.rows[probe].tolist() == [len(cells)]
        assert scores.weights[probe][0, head] == pytest.approx(read, abs=1e-12)
        assert scores[probe][0, head] == pytest.approx(read - max(controls), abs=1e-12)


def spread(tokens: Tensor) -> Tensor:
    """Reads all earlier equal tokens evenly, everything where there is none."""
    equal = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).double()
    count = equal.sum(-1, keepdim=True)
    return torch.where(count == 0, uniform(tokens), equal / count.clamp(min=1))


@pytest.mark.parametrize("meta", [PatternMeta(), SIGNED])
def test_a_uniform_head_scores_no_better_than_chance(meta: PatternMeta) -> None:
    """Exactly 0 where chance alone is subtracted; 0 or a hair below it where other controls are subtracted too."""
    scale = 1.0 if meta.is_distribution else -7.0
    scores = head_scores(Stub(lambda tokens: scale * uniform(tokens), meta=meta), induction())
    for probe in PROBES:
        assert scores.weights[probe][0, 0] > 0.01
        least = -0.02 if probe in ("duplicate_token", "induction") else -1e-12
        assert least <= scores[probe][0, 0] < 1e-12, probe


# --------------------------------------------------------------------------------------------------------------- decoys


@pytest.mark.parametrize("batch", [6, 24])
def test_heads_at_a_fixed_distance_are_no_induction_heads(batch: int) -> None:
    """Whatever the distance, also one that is right for some sequences: varied periods and the matched control give it away."""
    data = induction(batch)
    decoys = range(0, 20)
    scores = head_scores(Stub(inducing, *(back(distance) for distance in decoys)), data, ["induction"])
    values = scores["induction"][0]
    assert values[0] > 0.5
    assert values[1:].max() < 0.002  # where a decoy has no token that far back it reads everything alike
    read = scores.weights["induction"][0, 1:]
    assert read.max() > 0.1  # some decoy does sit on the source now and then, so the controls have work to do
    pure = Stub(lambda tokens: torch.stack([torch.eye(LENGTH).roll(11, 0).tril(-11)] * len(tokens)), meta=SIGNED)
    assert head_scores(pure, data.tokens, "induction")["induction"][0, 0] == pytest.approx(0, abs=1e-12)


def test_data_that_cannot_tell_are_refused() -> None:
    """At one period a fixed distance is as good as induction; the probe says so instead of giving a number."""
    fixed = induction(period=9, max_prefix=5)
    with pytest.raises(ValueError, match=r"induction: 100% of the rows have their source 8 tokens back"):
        head_scores(Stub(inducing), fixed, "induction")
    with pytest.raises(ValueError, match=r"duplicate_token: 100% of the rows have their source 9 tokens back"):
        head_scores(Stub(inducing), fixed, ["duplicate_token"])
    with pytest.raises(ValueError, match=r"100% of the rows have their source 8 tokens back"):
        head_scores(Stub(inducing), fixed.tokens[:1, 6:], "induction")
    assert head_scores(Stub(back(1)), fixed, ["previous_token"])["previous_token"][0, 0] > 0.9
    varied = head_scores(Stub(inducing), induction(), ["induction"])
    assert 0 < varied.largest_share["induction"] < 0.3


def test_shuffled_copies_give_no_induction_score() -> None:
    """In the control task the token after the earlier one is not the answer: a head that predicts well has no reason to read it."""
    scores = head_scores(Stub(inducing, back(1), uniform), induction(shuffled=True), "induction")
    assert scores["induction"][0, 0] > 0.6  # the rule "look after the last occurrence" is still followed ...
    assert scores["induction"][0, 1:].max() < 0.05  # ... and nothing else is taken for it


def test_sources_are_found_in_plain_tokens() -> None:
    """Without planted metadata the same rows are found in the tokens themselves."""
    batch = induction()
    planted = head_scores(Stub(inducing, duplicating, back(7)), batch, "induction")
    found = head_scores(Stub(inducing, duplicating, back(7)), batch.tokens, "induction")
    assert found["induction"][0, 0] > 0.75 and found["induction"][0, 1:].max() < 0.002
    assert found.weights["induction"][0, 0] == planted.weights["induction"][0, 0] == 1
    copy = make_task("copy", vocab_size=VOCAB, length=LENGTH).batch(16)
    assert head_scores(Stub(lambda tokens: one_hot(shifted(copy)), back(3)), copy, "induction")["induction"][0, 0] > 0.7


def shifted(batch: TaskBatch) -> Tensor:
    """Planted sources, moved to the reading token."""
    source = batch.metadata["source"]
    return torch.cat([source[:, 1:], torch.full_like(source[:, :1], -1)], dim=1)


# ------------------------------------------------------------------------------------------------------- signed, strict


def test_signed_patterns_are_measured_on_absolute_weights() -> None:
    """The sign and the scale of a row do not matter; the result says what was measured."""

    def rescaled(tokens: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(*tokens.shape, 1, generator=generator, dtype=torch.float64) * 100
        return inducing(tokens) * factor

    plain = head_scores(Stub(inducing, back(1)), induction())
    signed = head_scores(Stub(rescaled, lambda tokens: -back(1)(tokens), meta=SIGNED), induction())
    for probe in PROBES:
        assert np.abs(signed[probe] - plain[probe]).max() < 1e-12, probe
    assert signed.measured_on == ("|α|, each row divided by its sum",)
    assert "|α|" in repr(signed) and "attention weights" in repr(plain)


def test_strict_patterns_never_read_themselves() -> None:
    """`current_token` has no answer there (nan), and chance counts only the past."""
    scores = head_scores(Stub(lambda tokens: back(1)(tokens).tril(-1), meta=STRICT), induction())
    assert np.isnan(scores["current_token"]).all() and scores.rows["current_token"].tolist() == [0]
    assert scores.best("current_token") == []
    assert "no layer of this model can show it" in repr(scores)
    # row q sees q tokens; row 1 sees only one and is left out
    expected = 1 - np.mean([1 / q for q in range(2, LENGTH)])
    assert scores["previous_token"][0, 0] == pytest.approx(expected, abs=1e-12)


def test_rows_that_read_nothing_count_as_nothing() -> None:
    """A head silent in half of its rows has half the score of a head that is not; a silent head scores 0, not minus chance."""

    def half(tokens: Tensor) -> Tensor:
        pattern = back(1)(tokens)
        pattern[::2] = 0
        return pattern

    scores = head_scores(
        Stub(back(1), half, lambda tokens: 0 * uniform(tokens), meta=SIGNED), induction(), "previous_token"
    )
    values = scores["previous_token"][0]
    assert values[1] == pytest.approx(values[0] / 2, abs=1e-12) and values[2] == 0


# -------------------------------------------------------------------------------------------------- a circuit of weights


def circuit(strength: float = 12.0, distance: int = 8) -> LanguageModel:
    """Two layers of attention without MLPs whose weights implement induction, with other heads beside it.

    The stream holds a one-hot token, a one-hot position and room for the previous token. Layer 0: heads read the previous token (and copy
    it into the room), a fixed distance back, the first token, themselves. Layer 1: head 0 matches its token with the room (induction),
    head 1 looks a fixed distance back, head 2 matches token with token but not itself, head 3 does nothing.
    """
    width = VOCAB + LENGTH + VOCAB
    token, place, room = slice(0, VOCAB), slice(VOCAB, VOCAB + LENGTH), slice(VOCAB + LENGTH, width)
    mixer = AttentionConfig(n_heads=4, d_head=VOCAB + LENGTH, position="learned", bias=False, scale=1.0)
    model = LanguageModel(LanguageModelConfig(2, width, VOCAB, LENGTH, mixer, None, norm="rms")).double()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for block in model.blocks:
        block.ln1.w.fill_(width**-0.5)  # so that the norm only divides by the stream's length
    torch.nn.init.ones_(model.ln_final.w)  # type: ignore[arg-type]
    model.embed.W_E[:, token] = torch.eye(VOCAB, dtype=torch.float64)
    model.pos_embed.W_pos[:, place] = torch.eye(LENGTH, dtype=torch.float64)

    def head(layer: int, number: int, query: Tensor, key: Tensor) -> None:
        """Weights [d_head, d_model] of one head's query and key, the query scaled so that a match decides the softmax."""
        own = slice(number * (VOCAB + LENGTH), (number + 1) * (VOCAB + LENGTH))
        site = model.blocks[layer].attn
        site.query.weight[own], site.key.weight[own] = 4 * strength * query, key

    def reading(shift: int) -> tuple[Tensor, Tensor]:
        query = torch.zeros(VOCAB + LENGTH, width, dtype=torch.float64)
        key = query.clone()
        for position in range(LENGTH):
            if position - shift >= 0:
                query[position - shift, VOCAB + position] = 1
            key[position, VOCAB + position] = 1
        return query, key

    zero = torch.zeros(VOCAB + LENGTH, width, dtype=torch.float64)
    to_first, by_place = zero.clone(), zero.clone()
    to_first[0, place], by_place[0, VOCAB] = 1, 1
    with_token, with_room = zero.clone(), zero.clone()
    with_token[:VOCAB, token] = torch.eye(VOCAB, dtype=torch.float64)
    with_room[:VOCAB, room] = torch.eye(VOCAB, dtype=torch.float64)
    other, not_here = with_token.clone(), with_token.clone()
    other[VOCAB:, place] = -3 * torch.eye(LENGTH, dtype=torch.float64)
    not_here[VOCAB:, place] = torch.eye(LENGTH, dtype=torch.float64)
    head(0, 0, *reading(1))
    head(0, 1, *reading(distance))
    head(0, 2, to_first, by_place)
    head(0, 3, *reading(0))
    head(1, 0, with_token, with_room)
    head(1, 1, *reading(distance))
    head(1, 2, other, not_here)
    site = model.blocks[0].attn  # layer 0, head 0 copies the token that it reads into the room
    site.value.weight[:VOCAB, token] = torch.eye(VOCAB, dtype=torch.float64)
    site.output.weight[room, :VOCAB] = 2 * torch.eye(VOCAB, dtype=torch.float64)
    return model


PLANTED = {
    "previous_token": {(0, 0)},
    "first_token": {(0, 2)},
    "current_token": {(0, 3)},
    "induction": {(1, 0)},
    "duplicate_token": {(1, 2)},
}


def test_a_circuit_built_from_weights_is_read_off() -> None:
    """Every planted head is found at its place with a high score; the fixed-distance heads and the idle one are found nowhere."""
    scores = head_scores(circuit(), induction())
    assert scores.layers == (0, 1)
    for probe, planted in PLANTED.items():
        for layer in range(2):
            for head in range(4):
                if (layer, head) in planted:
                    assert scores[probe][layer, head] > 0.6, (probe, layer, head)
                else:
                    assert scores[probe][layer, head] < 0.2, (probe, layer, head, scores[probe])
        assert {(layer, head) for layer, head, _ in scores.best(probe, 1)} == planted


def test_the_induction_head_depends_on_the_previous_token_head() -> None:
    """Without what layer 0 head 0 writes, the induction head of layer 1 has nothing to match."""
    model = circuit()
    with model.hooks(Ablate(Select(role="z", layer=0), heads=0)):
        scores = head_scores(model, induction())
    assert scores["induction"][1, 0] < 0.1
    assert scores["previous_token"][0, 0] > 0.6  # the pattern itself is still there


# ----------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_order_of_the_batch_do_not_matter(side: str) -> None:
    model = models.build("gpt", seed=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tokens = induction(6).tokens
    plain = head_scores(model, tokens)
    flipped = head_scores(model, tokens.flip(0))
    one_by_one = head_scores(model, tokens, batch_size=1)
    fill = torch.full((6, 5), 3)
    padded = torch.cat([fill, tokens] if side == "left" else [tokens, fill], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, slice(0, 5) if side == "left" else slice(LENGTH, None)] = False
    with_padding = head_scores(model, padded, mask=mask)
    for probe in PROBES:
        assert plain.rows[probe].tolist() == with_padding.rows[probe].tolist()
        for other in (flipped, one_by_one, with_padding):
            assert np.abs(other[probe] - plain[probe]).max() < 1e-10, probe
    assert plain.largest_share == with_padding.largest_share


# softmax over all of the past with nothing that tells tokens apart but random weights: close to uniform, so every score is close to 0
PLAIN = ("gpt2", "gpt", "llama", "gptj", "attention-only")


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_can_be_asked(name: str) -> None:
    """Scores of random weights are finite, what is measured is what the pattern is, shared depth is labelled by step; or it is refused."""
    model = models.build(name)
    batch = induction(8 if name in PLAIN else 5)  # more rows only where scores are compared with chance
    patterns = {} if "pattern" not in model.hook_points.roles else model.patterns(batch.tokens[:1])
    if not patterns or any(pattern.meta.columns != "token" for pattern in patterns.values()):
        with pytest.raises(HookError):
            head_scores(model, batch)
        return
    scores = head_scores(model, batch)
    assert scores.layers == tuple(patterns)
    if model.loops > 1:
        repeated = {layer for layer, step in model.visits if step}
        assert set(scores.layers) == {(layer, step) if layer in repeated else layer for layer, step in model.visits}
    for row, pattern in enumerate(patterns.values()):
        wanted = "attention weights" if pattern.meta.is_distribution else "|α|, each row divided by its sum"
        assert scores.measured_on[row] == wanted
        heads = pattern.values.shape[1]
        for probe in PROBES:
            values = scores[probe][row]
            assert np.isnan(values[heads:]).all()
            if probe == "current_token" and pattern.meta.causal == "strict":
                assert np.isnan(values).all()
                continue
            assert np.isfinite(values[:heads]).all(), probe
            if name in PLAIN:
                assert np.abs(values[:heads]).max() < 0.05, probe
    assert isinstance(repr(scores), str) and isinstance(scores, HeadScores)


def test_text_can_be_asked_directly() -> None:
    text = "the cat saw the other cat, and the other cat saw the dog; then the dog saw another dog and the cat. "
    scores = head_scores(models.build("gpt"), text * 2)
    assert scores["induction"].shape == (3, 4)


# -------------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_errors_in_words() -> None:
    batch = induction(2)
    with pytest.raises(ValueError, match=r"Unknown probe 'inducton'. Did you mean 'induction'"):
        head_scores(Stub(uniform), batch, ["inducton"])
    with pytest.raises(ValueError, match=r"No probes given"):
        head_scores(Stub(uniform), batch, [])
    with pytest.raises(ValueError, match=r"A batch of a task has no padding"):
        head_scores(Stub(uniform), batch, mask=torch.ones(2, LENGTH))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\); expected \[batch, pos\] = \(2, 48\)"):
        head_scores(Stub(uniform), batch.tokens, mask=torch.ones(2, 3))
    different = torch.arange(VOCAB)[None]
    for probe in ("duplicate_token", "induction"):
        with pytest.raises(ValueError, match=rf"{probe}: no token here has such a source"):
            head_scores(Stub(uniform), different, probe)
    slots = PatternMeta(columns="memory slot")
    with pytest.raises(RefusedByPattern, match=r"columns of blocks.0.attn.hook_pattern are memory slots"):
        head_scores(Stub(uniform, meta=slots), batch, "first_token")
    scores = head_scores(Stub(uniform), batch, "first_token")
    with pytest.raises(KeyError, match=r"No scores of 'induction'.* Measured: first_token"):
        scores["induction"]
