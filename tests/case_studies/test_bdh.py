"""The study's own measurements against planted truths and direct computation, its rules on planted numbers, and the study end to end."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from case_studies import list_studies, run_study
from case_studies.bdh import letters, shipped, study, text
from case_studies.harness.context import Context
from case_studies.harness.evidence import Sample, summarise
from case_studies.harness.results import decide
from case_studies.harness.workspace import Workspace
from models.bdh.model import BDH, BDHConfig
from workbench.lab.jobs import JobCancelled
from workbench.lab.runs import RunStore
from workbench.lab.training import CurvePoint

CLAIMS = {claim.id: claim for found in list_studies() if found.name == "bdh" for claim in found.claims}


def tiny(**changes: Any) -> BDH:
    sizes = {"n_layers": 4, "d_model": 16, "n_heads": 2, "n_neurons": 64, "vocab_size": 26, "dropout": 0.0}
    return BDH(BDHConfig(**{**sizes, **changes})).eval()


# ---- letters ---------------------------------------------------------------------------------------------------------


def test_the_stream_is_the_paper_s() -> None:
    """13 fixed letters, then one word of 8 letters 8 times: period 77; a batch depends on seed and step alone."""
    stream = letters.LetterStream(3, 5)
    tokens, counted = stream.next_batch(7)
    assert tokens.shape == (5, 77) and tokens.max() < 26 and not counted[:, 0].any() and counted[:, 1:].all()
    words = tokens[:, 13:].reshape(5, 8, 8)
    assert torch.equal(words, words[:, :1].expand(-1, 8, -1)) and (tokens[:, :13] == tokens[0, :13]).all()
    assert len({tuple(word.tolist()) for word in words[:, 0]}) == 5
    assert torch.equal(tokens, letters.LetterStream(3, 5).next_batch(7)[0])
    assert not torch.equal(tokens, stream.next_batch(8)[0])
    fresh = stream.periods(stream.words([4], 2, letters.REPEATS))[:, 13:].reshape(2, 8, 8)
    assert not torch.equal(fresh[:, 0], fresh[:, 1]), "the control has a new word every time"


def test_presentation_ratio_on_planted_activity() -> None:
    """Twice as active on positions 13 to 20 as on 21 to 76; what happens before them does not count."""
    active = torch.full((3, 2, 77), 0.1)
    active[:, 1, 13:21] = 0.2
    active[..., :13] = 0.9
    assert torch.allclose(letters.presentation_ratio(active), torch.tensor([1.0, 2.0]).double())


def test_surprise_counts_active_neurons() -> None:
    """The ratio of layer 2 from the model's own y, counted by hand."""
    model, stream = tiny(), letters.LetterStream(0, 4)
    tokens = stream.periods(stream.words([3], letters.TEST_WORDS))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names="blocks.2.hook_y")
    share = (cache["blocks.2.hook_y"] != 0).double().mean((0, 1, 3))
    found = letters.surprise(model, stream)
    assert float(found["surprise_ratio"]) == pytest.approx(float(share[13:21].mean() / share[21:77].mean()), rel=1e-5)
    assert float(found["first_nats"]) == pytest.approx(np.log(26), abs=0.3)


def test_nats_are_log_probabilities_of_the_tokens_asked_for() -> None:
    model = tiny()
    tokens = torch.randint(0, 26, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1)
    expected = np.mean([log_p[b, t - 1, tokens[b, t]].item() for b in range(3) for t in (5, 11)])
    assert letters.nats(model, tokens, [5, 11], []) == pytest.approx(expected, abs=1e-6)


def test_edits_reach_recall_only_through_the_state() -> None:
    """In a model whose attention reads nothing (D_y = 0) no edit of the state has any effect."""
    model, stream = tiny(), letters.LetterStream(1, 4)
    seeing = letters.recall_under_edits(model, stream)
    assert all(abs(seeing[name]) > 0 for name in ("copy_effect", "reset_effect", "freeze_effect"))
    with torch.no_grad():
        model.weights.D_y.zero_()
    blind = letters.recall_under_edits(model, stream)
    assert all(abs(blind[name]) < 1e-6 for name in ("copy_effect", "reset_effect", "freeze_effect", "copy_over_plain"))


# ---- text ------------------------------------------------------------------------------------------------------------


def test_merge_summary_on_the_published_table() -> None:
    """The paper's table 2 in place of our losses: 0.87 of the gap, 0.07 nats forgotten."""
    base, french, python = text.DOMAINS
    losses = {
        "base": {base: 0.36, french: 0.77, python: 0.64},
        french: {base: 0.58, french: 0.36, python: 0.68},
        python: {base: 0.44, french: 0.76, python: 0.34},
        "merged": {base: 0.43, french: 0.40, python: 0.39},
    }
    found = text.merge_summary(losses)
    assert found["merge_gap"] == pytest.approx((0.37 / 0.41 + 0.25 / 0.30) / 2)
    assert found["merge_forgets"] == pytest.approx(0.07)
    assert found["merge_gap"] == pytest.approx(CLAIMS["merge-gap"].published_number, abs=0.005)


def test_the_sparsity_of_a_run_that_changes_nothing() -> None:
    model = tiny().train()
    watched = text.SparsityWatch(model, torch.randint(0, 26, (2, 30)), every=2)
    watched(CurvePoint(24, 3.0, None, 1e-3, 1.0, 100, 0.0), 24)
    assert model.training
    found = text.sparsity_results(watched)
    assert found["y_kept"] == pytest.approx(1.0) and found["y_at_the_start"] == pytest.approx(0.25, abs=0.08)
    assert found["sparsity_curve"].shape == (2, 3, 4) and found["sparsity_steps"].tolist() == [0, 24]


def test_generated_domains_are_one_language_each_and_never_share_a_sentence() -> None:
    """English words stand in French text only where a sentence translates one."""
    train, held_out = (text.generated("fr", split, 20_000, 0).data.decode() for split in ("train", "combinations"))
    assert train.count(" la ") > 10 * train.count(" the ") and not set(train.split("\n")) & set(
        held_out.split("\n")
    ) - {""}


# ---- shipped ---------------------------------------------------------------------------------------------------------


def test_sentences_about_a_concept() -> None:
    inside, outside = shipped.about("currency", "fr", 12)
    assert len(inside) == len(outside) == 12 and {s.language for s in inside + outside} == {"fr"}
    assert all("currency" in s.concepts for s in inside) and not any("currency" in s.concepts for s in outside)


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "good", "bad"),
    [
        ("sparsity-emerges", [0.5, 0.6, 0.7], [0.5, 0.6, 0.76]),
        ("sparsity-level-y", Sample([0.05, 0.08]), Sample([0.2, 0.2])),
        ("surprise", [1.5, 1.4, 1.6, 1.5, 1.4], [2.0, 0.6, 1.4, 0.9, 1.2]),
        ("surprise-slow-neurons", [0.2, 0.3, 0.2, 0.3, 0.2], [0.2, -0.3, 0.2, -0.3, 0.2]),
        ("modularity-trained", [0.1, 0.12, 0.11], [-0.1, 0.12, 0.01]),
        ("excitatory-heads", Sample([1.0] * 12 + [0.0] * 4), Sample([1.0] * 6 + [0.0] * 10)),
        ("power-law", Sample([1.0, 1.0, 0.0]), Sample([1.0, 0.0, 0.0])),
        ("concept-synapses", Sample([0.5, 0.4, 0.6]), Sample([0.5, -0.4, 0.1])),
        ("synapse-beats-neuron", Sample([0.05, 0.04, 0.06]), Sample([-0.05, 0.02, -0.01])),
        ("concept-transfer", Sample([0.8, 0.7, 0.9]), Sample([0.5, 0.4, 0.6])),
        ("concept-cause", Sample([-0.1, -0.2, -0.15]), Sample([-0.1, 0.2, 0.0])),
        ("merge-gap", [0.8, 0.85, 0.9], [0.1, 0.2, 0.15]),
        ("merge-self", [1e-15], [1e-3]),
        ("state-copy", [3.0, 2.5, 2.8, 3.1, 2.9], [0.2, 0.1, 0.0, 0.2, 0.1]),
        ("length-rotary", [0.01, 0.02, 0.0, 0.03, 0.01], [1.4, 1.8, 1.5, 1.6, 1.7]),
        ("length-decay", [1.0, 1.1, 0.9], [0.1, -0.4, 0.2]),
    ],
)
def test_rules_on_planted_numbers(claim: str, good: Any, bad: Any) -> None:
    """Each claim is reproduced by numbers that show it and not by numbers that do not."""
    found = CLAIMS[claim]
    for planted, verdict in ((good, "reproduced"), (bad, "not reproduced")):
        summary = summarise(found.measurement, planted)
        assert decide(found, "small", summary).verdict == verdict


def test_the_published_test_recomputed() -> None:
    """U = 2368 of 2500 is r = 2·2368/2500 − 1, not the 0.86 of the text; p by the normal approximation."""
    found = study.published_test()
    assert found["published_r"] == pytest.approx(2 * 2368 / 2500 - 1) == pytest.approx(0.8944)
    assert found["published_p"] == pytest.approx(6.4e-15, rel=0.05)


def test_measurements_take_the_seeds_that_have_them() -> None:
    records = [{"a": 1.0, "b": 3.0, "c": ["x"]}, {"a": 2.0, "b": None, "c": ["y"]}]
    assert study.measurements(records) == {"a": [1.0, 2.0], "b": [3.0]}


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_the_study_runs(tmp_path: Path) -> None:
    """The smoke tier: every stage, figure and array, and a verdict on what needs no training."""
    result = run_study("bdh", "smoke", store=RunStore(tmp_path))
    assert {claim.id: claim.verdict for claim in result.claims if claim.verdict != "not run here"} == {
        "published-r": "not reproduced",
        "published-p": "reproduced",
        "merge-self": "reproduced",
    }
    run = RunStore(tmp_path).open(result.run)
    assert set(run.figures()) == {
        f"{name}.json"
        for name in (
            "sparsity",
            "surprise",
            "octiles",
            "edits",
            "modularity",
            "degrees",
            "concepts",
            "traces",
            "merging",
        )
    }
    assert run.array("surprise.ratio").shape == (1, 4) and run.array("merge.loss").shape == (1, 4, 3)
    assert np.isfinite(run.array("surprise.active")).all()


def test_a_cancelled_seed_stops_within_a_step(tmp_path: Path) -> None:
    cancel = threading.Event()
    settings = next(found for found in list_studies() if found.name == "bdh").tier("smoke").settings
    steps: list[str] = []

    def report(fraction: float, words: str) -> None:
        steps.append(words)
        if "step 2" in words:
            cancel.set()

    with Workspace(tmp_path, "bdh", "smoke", {}) as workspace:
        context = Context(workspace, "bdh", "smoke", (0,), dict(settings), report=report, cancel=cancel)
        with pytest.raises(JobCancelled):
            context.each_seed(letters.letters)
    assert not any("step 3" in words for words in steps) and json.dumps(steps)
