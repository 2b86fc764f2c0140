"""`workbench probe`: every probe on a small model, as JSON and for people, and what is typed wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.lab.runs import RunStore


def test_every_probe_as_json_and_as_a_run(workbench: Callable, tmp_path: Path) -> None:
    done = workbench("probe", "induction-circuit", "--out", tmp_path, "--json", "--length", 64, "--sequences", 8)
    assert done.code == 0, done.err
    kinds = {name: result["kind"] for name, result in done.json["results"].items()}
    assert kinds == {
        "induction": "HeadScores",
        "census": "Census",
        "sinks": "SinkReport",
        "retrieval": "RetrievalScores",
        "local": "AdaptiveHeads",
        "basin": "SegmentAttention",
    }
    assert done.json["results"]["retrieval"]["best"][0][0] == 1  # layer 1 retrieves
    assert "induction" in done.json["results"]["census"]["labels"]
    run = RunStore(tmp_path).open(done.json["id"])
    assert run.kind == "probe" and run.manifest["settings"]["length"] == 64


def test_for_people(workbench: Callable, tmp_path: Path) -> None:
    text = "a b c d e f a b c d e f a b c d"
    done = workbench("probe", "gpt2-random", "--probe", "sinks,retrieval", "--text", text, "--out", tmp_path)
    assert done.code == 0, done.err
    assert "on first token" in done.out and "nothing is retrieved" in done.err and "Stored as" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gpt2-random", "--probe", "sink"], "Did you mean 'sinks'"),
        (["gpt2-random", "--probe", ","], "no probe was named"),
        (["gpt2-random", "--text", "abc", "--corpus", "english"], "a text and a corpus"),
        (["gpt2-radom"], "Did you mean"),
    ],
)
def test_what_is_typed_wrongly_is_named(workbench: Callable, tmp_path: Path, options: list[str], words: str) -> None:
    failed = workbench("probe", *options, "--out", tmp_path)
    assert failed.code == 1 and words in failed.err and failed.out == ""
    assert RunStore(tmp_path).list() == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_has_no_score_is_a_dash_and_a_refusal_names_the_option(workbench: Callable, tmp_path: Path) -> None:
    text = "a b c d e f a b c d e f a b c d"
    strict = workbench(
        "probe", "bdh-random", "--probe", "census", "--text", text, "--out", tmp_path
    )  # reads nobody's own token
    assert strict.code == 0, strict.err
    assert "–" in strict.out and "nan" not in strict.out and "-0.00" not in strict.out
    signed = workbench("probe", "diff-transformer-random", "--probe", "sinks", "--text", text, "--out", tmp_path)
    assert "Possible is --whole-patterns" in signed.err
    formed = workbench(
        "probe", "diff-transformer-random", "--probe", "sinks", "--text", text, "--out", tmp_path, "--whole-patterns"
    )
    assert formed.code == 0 and "on first token" in formed.out


def test_the_encoder_of_an_encoder_decoder(workbench: Callable, tmp_path: Path) -> None:
    """Its heads, beside those of a random encoder; a model that has none says so."""
    done = workbench("probe", "t5-random", "--encoder", "--probe", "sinks,census", "--whole-patterns", "--sequences", 2, "--length", 24,
                     "--out", tmp_path, "--json")  # fmt: skip
    assert done.code == 0, done.err
    run = RunStore(tmp_path).open(done.json["id"])
    assert run.model["name"] == "t5-random (encoder)" and run.model["architecture"] == "t5-encoder"
    assert done.json["results"]["sinks"]["layers"] == [0, 1, 2] and run.manifest["settings"]["encoder"] is True
    refused = workbench("probe", "gpt2-random", "--encoder", "--out", tmp_path)
    assert refused.code != 0 and "gpt2-random has no encoder besides" in refused.err
