"""The shipped two-layer model holds an induction circuit: it is measured, and taken apart, on sequences it has not seen."""

import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from probes.heads import head_scores
from workbench import Ablate
from workbench.lab.tasks import make_task


@pytest.fixture(scope="module")
def circuit() -> Decoder:
    return models.load("induction-circuit")


@pytest.fixture(scope="module", params=[(129, 10, 42), (97, 4, 20)], ids=["trained periods", "shorter periods"])
def batch(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    length, low, high = request.param
    task = make_task("induction", vocab_size=128, length=length, min_period=low, max_period=high, seed=7)
    return task.batch(16, 3, "validation")


def accuracy(model, batch, hooks=()) -> float:  # type: ignore[no-untyped-def]
    """Share of predictable tokens that are predicted right."""
    tokens: Tensor = batch.tokens
    with torch.no_grad():
        guess = model.run_with_hooks(tokens[:, :-1], hooks=list(hooks)).argmax(-1)
    counted = batch.loss_mask[:, 1:]
    return float(((guess == tokens[:, 1:]) & counted).sum() / counted.sum())


def test_it_solves_induction(circuit, batch) -> None:  # type: ignore[no-untyped-def]
    assert accuracy(circuit, batch) > 0.98


def test_its_heads_are_the_textbook_ones(circuit, batch) -> None:  # type: ignore[no-untyped-def]
    """Previous-token heads sit in layer 0, induction heads in layer 1, and not the other way round."""
    scores = head_scores(circuit, batch, ("previous_token", "induction"))
    previous, induction = scores["previous_token"], scores["induction"]
    assert previous[0].max() > 0.8 and previous[1].max() < 0.1
    assert induction[1].max() > 0.5 and induction[0].max() < 0.1


def test_both_halves_are_needed(circuit, batch) -> None:  # type: ignore[no-untyped-def]
    """Without the previous-token heads, or without the induction heads, nothing is retrieved."""
    scores = head_scores(circuit, batch, ("previous_token", "induction"))
    previous = [head for head in range(4) if scores["previous_token"][0, head] > 0.5]
    readers = [head for head in range(4) if scores["induction"][1, head] > 0.2]
    assert accuracy(circuit, batch, [Ablate("blocks.0.attn.hook_z", heads=previous)]) < 0.2
    assert accuracy(circuit, batch, [Ablate("blocks.1.attn.hook_z", heads=readers)]) < 0.2


def test_it_is_the_previous_token_that_matters(circuit, batch) -> None:  # type: ignore[no-untyped-def]
    """Cutting what those heads read one token back breaks the circuit; cutting what they read two or three back does not."""
    scores = head_scores(circuit, batch, ("previous_token",))
    previous = [head for head in range(4) if scores["previous_token"][0, head] > 0.5]

    def without(offset: int) -> float:
        def cut(pattern: Tensor, hook: object) -> Tensor:
            for head in previous:
                pattern[:, head].diagonal(-offset, -2, -1).zero_()
            return pattern

        return accuracy(circuit, batch, [("blocks.0.attn.hook_pattern", cut)])

    assert without(1) < 0.2
    assert without(2) > 0.95 and without(3) > 0.95


def test_the_shuffled_control_cannot_be_solved(circuit) -> None:  # type: ignore[no-untyped-def]
    """Where every copy is a fresh permutation, looking back gives nothing."""
    control = make_task("induction", vocab_size=128, length=129, shuffled=True, seed=7).batch(16, 3, "validation")
    assert accuracy(circuit, control) < 0.15
