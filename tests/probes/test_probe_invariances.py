"""No score of the battery depends on the order of the sequences, on which others are read with them, or on padding.

Padding is asked of the probes that take a mask. Local queries and the basin read sequences of one length, and retrieval its own prompts,
so there the rest of the batch is what could leak.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from probes.battery import PROBES
from probes.census import head_census
from probes.heads import head_scores
from probes.long_context import adaptive_heads, segment_attention
from probes.retrieval import needle_grid, retrieval_scores
from probes.score_tables import score_tables
from probes.sinks import find_sinks
from workbench.lab.tasks import make_task

HABITS = ("previous_token", "duplicate_token", "induction")
ON_TOKENS: dict[str, Callable[..., Any]] = {
    "induction": lambda model, tokens, **mask: head_scores(model, tokens, HABITS, **mask),
    "census": lambda model, tokens, **mask: head_census(model, tokens, HABITS, **mask),
    "sinks": lambda model, tokens, **mask: find_sinks(model, tokens, threshold=0.05, min_readers=4, **mask),
    "local": lambda model, tokens: adaptive_heads(model, tokens, sinks=2, recent=6, threshold=0.4),
    "basin": lambda model, tokens: segment_attention(model, tokens, 5, rows=3),
}
MASKED = ("induction", "census", "sinks")
ORDER = [3, 0, 4, 1, 2]


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights large enough for patterns that are far from uniform, and for some queries that are local."""
    found = models.build("gpt", seed=2).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3)
    return found


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    task = make_task("induction", vocab_size=40, length=32, min_period=6, max_period=12, seed=1)
    return task.batch(5, 0, "validation").tokens


def scores(result: Any) -> dict[str, np.ndarray]:
    return {name: table.values for name, table in score_tables(result).items()}


def assert_alike(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-9, err_msg=name)


def test_every_probe_of_the_battery_is_asked() -> None:
    assert {*ON_TOKENS, "retrieval"} == set(PROBES)


@pytest.mark.parametrize("probe", ON_TOKENS)
def test_the_order_of_the_sequences_does_not_matter(probe: str, model: Any, tokens: Tensor) -> None:
    measure = ON_TOKENS[probe]
    found = scores(measure(model, tokens))
    assert any(np.nanstd(values) > 1e-3 for values in found.values()), "heads differ, so there is something to confuse"
    assert_alike(found, scores(measure(model, tokens[ORDER])))


@pytest.mark.parametrize("probe", ["sinks", "local", "basin"])
def test_scores_of_a_batch_are_means_of_those_of_its_sequences(probe: str, model: Any, tokens: Tensor) -> None:
    """Exact shares and weights of a sequence do not see its neighbours (the criterion of local queries does: it pools keys on purpose)."""
    measure = ON_TOKENS[probe]
    one_by_one = [scores(measure(model, row[None])) for row in tokens]
    found = measure(model, tokens)
    if probe == "basin":  # a depth is no mean of depths; the weights are
        alone = [measure(model, row[None]).weights_by_sequence[0] for row in tokens]
        np.testing.assert_allclose(found.weights_by_sequence, np.stack(alone), atol=1e-9)
        return
    names = ("first_mass", "score")
    for name in names:
        if name in one_by_one[0]:
            mean = np.mean([each[name] for each in one_by_one], axis=0)
            np.testing.assert_allclose(scores(found)[name], mean, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("probe", MASKED)
def test_padding_does_not_matter(probe: str, side: str, model: Any, tokens: Tensor) -> None:
    fill, keep = torch.full((5, 4), 7), torch.ones_like(tokens, dtype=torch.bool)
    pair = lambda pads, real: torch.cat([pads, real] if side == "left" else [real, pads], 1)  # noqa: E731
    mask = pair(torch.zeros(5, 4, dtype=torch.bool), keep)
    measure = ON_TOKENS[probe]
    assert_alike(scores(measure(model, tokens)), scores(measure(model, pair(fill, tokens), mask=mask)))


def test_the_order_of_needle_runs_and_their_company_do_not_matter() -> None:
    """Runs of two lengths, mixed: every run scores as it does alone, wherever it stands."""
    circuit = models.load("induction-circuit")
    runs = needle_grid(128, lengths=(32, 48), depths=(0.2, 0.7), needle_length=4, repeats=2)
    found = retrieval_scores(circuit, runs, success=-1)
    order = np.random.default_rng(0).permutation(len(runs)).tolist()
    mixed = retrieval_scores(circuit, [runs[i] for i in order], success=-1)
    np.testing.assert_allclose(mixed.scores, found.scores, atol=1e-9)
    np.testing.assert_array_equal(mixed.by_run, found.by_run[order])
    for number in (0, len(runs) - 1):
        alone = retrieval_scores(circuit, [runs[number]], success=-1)
        np.testing.assert_array_equal(alone.by_run[0], found.by_run[number])
    assert found.scores.max() > 0.5
