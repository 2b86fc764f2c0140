"""Score tables: intervals against their definition, chance against heads that read evenly or at random, and what a survey stores."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

import kernels.attention_statistics as kernel
import models
from probes.battery import LEAST_LENGTH, NoAnswer, Survey, run_probes, store_probes, survey
from probes.progress import MeasurementCancelled
from probes.retrieval import RetrievalScores, copy_scores, needle_grid
from probes.score_tables import ScoreTable, layer_labels, score_tables, twin_tables
from probes.sinks import sink_report
from workbench.lab.runs import RunStore


def evenly(causal: str, length: int, batch: int = 2, window: int | None = None) -> torch.Tensor:
    """A head that reads everything that it sees alike: [batch, head, query, key]."""
    visible = torch.ones(length, length, dtype=torch.float64)
    if causal != "none":
        visible = visible.tril(-1 if causal == "strict" else 0)
    if window is not None:
        visible = visible.triu(1 - window)
    return (visible / visible.sum(-1, keepdim=True).clamp(min=1)).expand(batch, 3, -1, -1)


@pytest.mark.parametrize("causal", ["inclusive", "strict", "none"])
def test_chance_on_the_first_token_is_what_an_even_head_scores(causal: str) -> None:
    statistics = kernel.pattern_statistics(evenly(causal, 11), causal=causal, weights="share")
    report = sink_report({4: statistics}, torch.ones(2, 11, dtype=torch.bool))
    np.testing.assert_allclose(report.first_mass, np.full((1, 3), report.first_chance[0]), rtol=1e-6)


def test_intervals_of_sinks_are_those_of_the_mean_over_sequences() -> None:
    torch.manual_seed(0)
    pattern = torch.randn(6, 2, 12, 12).masked_fill(torch.ones(12, 12).triu(1) > 0, -torch.inf).softmax(-1)
    report = sink_report(
        {0: kernel.pattern_statistics(pattern, causal="inclusive", weights="share")},
        torch.ones(6, 12, dtype=torch.bool),
    )
    each = pattern[:, :, 1:, 0].mean(-1).double().numpy()  # by the definition (a), one number per sequence
    np.testing.assert_allclose(report.by_sequence["first_mass"][:, 0], each, rtol=1e-5)
    np.testing.assert_allclose(report.first_mass[0], each.mean(0), rtol=1e-5)
    table = score_tables(report)["first_mass"]
    draws = np.random.default_rng(5).integers(6, size=(20_000, 6))
    low, high = np.percentile(each[draws].mean(1), [2.5, 97.5], axis=0)
    np.testing.assert_allclose(table.low[0], low, atol=0.01)
    np.testing.assert_allclose(table.high[0], high, atol=0.01)
    one = score_tables(sink_report({0: kernel.pattern_statistics(pattern[:1], causal="inclusive", weights="share")},
                                   torch.ones(1, 12, dtype=torch.bool)))["first_mass"]  # fmt: skip
    assert np.isnan(one.low).all() and not one.stands_out().any()


def test_chance_of_retrieval_is_what_reading_at_random_scores() -> None:
    runs = needle_grid(64, (30, 50), repeats=2)
    random = torch.Generator().manual_seed(0)
    by_run = np.stack([
        np.stack([
            copy_scores(torch.randint(run.length, (400, len(run.answer)), generator=random), run, run.answer).double().mean().numpy()
        ]).reshape(1, 1)
        for run in runs
    ])  # fmt: skip
    counted = np.ones(len(runs), bool)
    found = RetrievalScores(by_run.mean(0), (by_run > 0).mean(0), by_run, np.ones(len(runs)), counted, (0,),
                            tuple(run.length for run in runs), tuple(run.depth for run in runs), "paper")  # fmt: skip
    table = score_tables(found)["score"]
    assert table.chance[0] == pytest.approx(float(by_run.mean()), abs=0.006)


def test_a_head_stands_out_above_chance_and_the_twins_best_head() -> None:
    nothing = np.full((2, 2), np.nan)
    table = ScoreTable(
        np.array([[0.5, 0.3], [0.2, np.nan]]), np.array([[0.4, 0.25], [0.15, np.nan]]), nothing, np.array([0.1, 0.2])
    )
    assert table.stands_out().tolist() == [[True, True], [False, False]]
    twin = ScoreTable(np.array([[0.1, 0.3], [np.nan, 0.05]]), nothing, nothing, np.full(2, np.nan))
    assert table.null(twin) == 0.3 and table.stands_out(twin).tolist() == [[True, False], [False, False]]
    unknown = ScoreTable(table.values, np.array([[-0.1, 0.25], [0.0, np.nan]]), nothing, np.full(2, np.nan))
    assert unknown.stands_out().tolist() == [[False, True], [False, False]]


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Survey, Survey, RunStore]:
    model = models.load("induction-circuit")
    found = survey(model, ["induction", "census", "sinks", "retrieval"], lengths=(36,), length=56, sequences=6)
    return (
        found,
        survey(model, ["sinks"], twin=False, text="ab" * 20, lengths=(30,)),
        RunStore(tmp_path_factory.mktemp("survey")),
    )


def test_a_survey_is_the_probes_at_each_length_and_on_the_twin(surveyed: tuple[Survey, Survey, RunStore]) -> None:
    from probes.census import random_twin

    found, of_text, store = surveyed
    model = models.load("induction-circuit")
    run = store_probes(store, model, found, settings={"length": 56})
    plain = run_probes(model, ["induction"], length=36, sequences=6)["induction"]
    np.testing.assert_allclose(run.array("induction.induction.by_length")[0], plain["induction"], atol=1e-6)
    np.testing.assert_array_equal(run.array("induction.induction.by_length")[1], run.array("induction.induction"))
    assert run.array("lengths").tolist() == [36, 56]
    low, twin = run.array("induction.induction.low"), run.array("induction.induction.twin")
    np.testing.assert_array_equal(run.array("induction.induction.stands_out"), low > max(0.0, twin.max()))
    assert run.array("induction.induction.stands_out").any()
    untrained = run_probes(random_twin(model, 1), ["induction"], length=56, sequences=6)["induction"]
    np.testing.assert_allclose(run.array("induction.induction.twin"), untrained["induction"], atol=1e-6)
    census = found.results["census"]
    assert census.null["induction"] == pytest.approx(
        twin_tables(census)["induction"].null(twin_tables(census)["induction"])
    )
    assert run.manifest["results"]["retrieval"]["twin"].startswith(
        "The model repeats more than"
    )  # the twin repeats nothing
    assert "retrieval.score.twin" not in run.arrays() and layer_labels(census) == ["0", "1"]
    # the profile is a mean of weights: over all distances a row's weights sum to 1, so the last row's do
    one = store_probes(store, model, of_text)
    pattern = models.load("induction-circuit").patterns("ab" * 20)[1].values[0].double()
    wanted = [pattern.diagonal(-d, -2, -1).mean(-1).tolist() for d in range(40)]
    np.testing.assert_allclose(one.array("profile")[1].T, np.array(wanted), atol=1e-5)
    assert (
        one.array("sinks.first_mass.by_length").shape == (2, 2, 4) and np.isnan(one.array("sinks.first_mass.low")).all()
    )


def test_what_has_no_answer_says_why(tmp_path: Path) -> None:
    model = models.build("lstm")
    found = survey(model, ["induction", "sinks"], length=30, sequences=2)
    assert all(isinstance(result, NoAnswer) for result in found.results.values()) or found.profile is None
    run = store_probes(RunStore(tmp_path), model, found)
    assert run.manifest["results"]["sinks"]["reason"] and run.manifest["settings"]["profile"]["no_profile"]


@pytest.mark.parametrize(("options", "words"), [
    ({"lengths": (LEAST_LENGTH - 1,)}, "length 23"), ({"text": "a" * 40, "lengths": (41,)}, "from 24 to 40"),
    ({"probes": ["sink"]}, "Did you mean"),
])  # fmt: skip
def test_mistakes_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        survey(models.build("attention-only"), **options)


def test_a_survey_can_be_cancelled() -> None:
    cancel = Event()
    cancel.set()
    with pytest.raises(MeasurementCancelled):
        survey(models.build("attention-only"), ["induction"], cancel=cancel)
