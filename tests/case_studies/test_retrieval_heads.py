"""The hand-written model cell by cell, the statistics of released scores on planted files, the measurements, the study end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import models
from case_studies import run_study
from case_studies.harness.evidence import NotRun, Sample
from case_studies.retrieval_heads import checkpoint, planted, published, study, trained
from case_studies.retrieval_heads.planted import FEEDER, HEADS, READER, VOCAB
from probes.retrieval import needle_grid, needle_recall, retrieval_scores
from probes.text_needles import NEEDLES
from workbench.lab.corpora import MissingData
from workbench.lab.runs import RunStore


def test_the_heads_written_by_hand_read_what_they_should() -> None:
    """Patterns on a row in which every place is known: 5 7 9 2 … 5 7."""
    model = planted.hand_written()
    tokens = torch.tensor([[5, 7, 9, 2, 11, 5, 7]])
    patterns = {layer: pattern.values[0] for layer, pattern in model.patterns(tokens).items()}
    assert patterns[0][FEEDER[1], 6, 5] > 0.999, "the previous token"
    assert patterns[1][READER[1], 6, 2] > 0.999, "after the earlier 7 comes 9"
    assert patterns[1][3, 6, 1] > 0.999, "the earlier 7 itself"
    assert patterns[1][0, 6, 3] > 0.999 and patterns[1][1, 6, 0] > 0.999
    assert torch.allclose(patterns[1][4, 6], torch.full((7,), 1 / 7, dtype=torch.float64))
    assert int(model(tokens)[0, -1].argmax()) == 9


def test_precision_and_recall_are_one_and_both_readers_of_the_needle_differ() -> None:
    model = planted.hand_written()
    runs = needle_grid(VOCAB, (20, 36), (0.0, 0.3, 1.0), needle_length=4, repeats=3, seed=5)
    for mode in ("paper", "official"):
        found = retrieval_scores(model, runs, mode)
        assert found.retrieval_heads() == [READER] and found.scores[READER] == 1.0
    assert (needle_recall(model, runs) == 1).all()
    assert needle_recall(model, runs, [READER]).mean() < 0.2 and needle_recall(model, runs, [FEEDER]).mean() < 0.3
    for head in range(HEADS):
        if head != READER[1]:
            assert (needle_recall(model, runs, [(1, head)]) == 1).all(), "decoys write nothing"
    measured = planted.planted()
    assert (
        measured["planted_precision"] == 1
        and measured["planted_feeder"] > 0.9 > 0.1 > measured["planted_other_feeders"]
    )


def released(folder: Path, name: str, scores: np.ndarray) -> None:
    """Write scores [layer, head, run] as the authors do."""
    table = {f"{layer}-{head}": scores[layer, head].tolist() for layer, head in np.ndindex(*scores.shape[:2])}
    (folder / f"{name}.json").write_text(json.dumps(table))


def test_statistics_of_released_scores(tmp_path: Path) -> None:
    """Ten by ten heads of which three score: one always, one in half of the runs, one a little."""
    base = np.zeros((10, 10, 4))
    base[1, 2], base[3, 4, :2], base[5, 6] = 1.2, 0.5, 0.05
    other = np.zeros((10, 10, 4))
    other[9, 9] = 0.7
    related = base + np.where(base > 0, 0.01, 0)
    for name, scores in {
        published.LLAMA: base,
        "Qwen1.5-14B": base,
        "Qwen1.5-14B-Chat": related,
        "else": other,
    }.items():
        released(tmp_path, name, scores)
    found = published.statistics(published.released(tmp_path))
    assert sorted(found["released_share"].values) == [0.01, 0.02, 0.02, 0.02]
    assert max(found["released_zero_share"].values) == 0.99 and found["always_llama"] == 2.0
    assert max(found["released_largest_run"].values) == pytest.approx(1.21)
    assert isinstance(found["always_yi"], NotRun) and found["family_correlation"].values[0] > 0.99
    assert len(found["other_correlation"].values) == 5 and min(found["other_correlation"].values) < 0
    assert found["released_models"][published.LLAMA]["silent_runs"] == 0
    ranked = np.zeros((32, 32))
    for rank, place in enumerate(published.README_BEST):
        ranked[place] = 1 - rank / 20
    assert published.same_order(ranked) == 10.0
    ranked[published.README_BEST[1]] = 2.0
    assert published.same_order(ranked) == 8.0, "the first two exchanged"


def test_released_scores_that_are_not_there_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingData, match=r"no \*.json"):
        published.released(tmp_path)
    (tmp_path / "broken.json").write_text(json.dumps({"0-0": [1.0], "1-1": [1.0]}))
    with pytest.raises(ValueError, match=r"broken.json: expected every head"):
        published.released(tmp_path)

    def missing(name: str) -> Path:
        raise MissingData("not here")

    monkeypatch.setattr(published, "find_data", missing)
    found = published.published()
    assert set(published.NAMES) < set(found) and all(isinstance(found[name], NotRun) for name in published.NAMES)


@pytest.mark.parametrize("kind", ["softmax", "gated-deltanet", "bdh"])
def test_models_are_of_like_size_and_depend_on_the_seed(kind: str) -> None:
    built = [trained.build(kind, seed) for seed in (0, 1)]
    sizes = {sum(weight.numel() for weight in model.parameters()) for model in built}
    assert len(sizes) == 1 and 25_000 < sizes.pop() < 45_000
    first, second = (next(iter(model.parameters())) for model in built)
    assert not torch.equal(first, second)


def test_seeds_that_did_not_learn_are_left_out() -> None:
    refused = dict.fromkeys(trained.NAMES, NotRun("did not learn"))
    learned = {"recall": 0.9, "retrieval_heads": 3.0, "stability_depth": NotRun("alike"), "scores": np.zeros((2, 4))}
    found = study.measurements([learned, refused, {**learned, "recall": 0.7}])  # type: ignore[arg-type]
    assert found["recall"] == [0.9, 0.7] and isinstance(found["stability_depth"], NotRun) and "scores" not in found
    assert isinstance(study.measurements([refused])["masking_difference"], NotRun)  # type: ignore[arg-type]


def test_the_best_effective_pattern_is_of_a_model_that_succeeds() -> None:
    beside = {
        "bdh": {"scores": [[0.3, 0.9]], "succeeded": 0.0},
        "gated-deltanet": {"scores": [[0.4, 0.2]], "succeeded": 0.8},
        "induction-circuit": {"scores": [[1.0]], "succeeded": 1.0},
    }
    assert study.effective(beside) == 0.4
    assert isinstance(study.effective({"bdh": beside["bdh"]}), NotRun)


def test_a_checkpoint_is_asked_for_by_name() -> None:
    found = checkpoint.checkpoint(SimpleNamespace(settings={"model": ""}))  # type: ignore[arg-type]
    assert all("--model" in value.reason for value in found.values())


def test_the_study_runs(tmp_path: Path) -> None:
    """The smoke tier end to end; what is planted is decided, and what is trained is not."""
    result = run_study("retrieval_heads", "smoke", store=RunStore(tmp_path))
    verdicts = {claim.id: claim.verdict for claim in result.claims}
    assert {verdicts[name] for name in ("planted-head", "planted-precision", "planted-feeder")} == {"reproduced"}
    assert verdicts["masking"] == verdicts["checkpoint-sparse"] == "not run here"
    run = RunStore(tmp_path).open(result.run)
    assert {"planted.json", "scores.json", "masking.json", "alone.json", "effective.json"} <= set(run.figures())
    assert run.array("scores").shape == (1, trained.LAYERS, trained.HEADS)


def test_a_model_of_bytes_is_refused() -> None:
    """Most letters of any sentence are in any other, so that nearly every answer would count as found."""
    settings = {"model": "induction-circuit"}
    found = checkpoint.checkpoint(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
    assert all("reads bytes" in value.reason for value in found.values())


def asked_of(folder: Path, **settings: Any) -> SimpleNamespace:
    """The context of the full tier on a checkpoint in a folder."""
    own = {"model": str(folder), "haystack": "pydoc", "depths": (0.0, 0.5, 1.0), "controls": 2, **settings}
    return SimpleNamespace(settings=own, progress=lambda fraction, words: None, cancel=None)


def test_a_checkpoint_in_a_folder_that_retrieves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model written by hand with more words than a byte has values, saved, opened by its folder, and read like any checkpoint."""
    monkeypatch.setattr(planted, "VOCAB", 260)
    model = planted.hand_written().float()
    model.architecture = "gpt"
    models.save(model, tmp_path / "planted")
    grid = lambda model, text, lengths, depths: needle_grid(model.vocab_size, lengths, depths, 5, repeats=1)  # noqa: E731
    monkeypatch.setattr(checkpoint, "text_needle_grid", grid)
    found = checkpoint.checkpoint(asked_of(tmp_path / "planted", lengths=(24,)))  # type: ignore[arg-type]
    assert found["checkpoint_share"] == pytest.approx(1 / 12)
    assert found["checkpoint"]["best"][0] == [*READER, 1.0] and found["checkpoint"]["recall"] == 1
    assert found["checkpoint_stability"] > 0 and found["checkpoint_masking"] > 0.8


def test_a_published_checkpoint_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """A small GPT-2 in Hugging Face layout, at random weights: it reads needles in text, repeats none, and the tier says so."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator([needle + question for needle, question in NEEDLES], trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    config = transformers.GPT2Config(vocab_size=words.get_vocab_size(), n_positions=256, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = checkpoint.checkpoint(asked_of(tmp_path, lengths=(200,), depths=(0.5,)))  # type: ignore[arg-type]
    assert all("nothing is retrieved" in value.reason for value in found.values())


def test_samples_are_over_models() -> None:
    scores = {"a": np.ones((2, 2, 1)), "b": np.zeros((3, 3, 1))}
    assert published.statistics(scores)["released_share"] == Sample([1.0, 0.0], over="models")
