"""`workbench state`: tables, JSON and a figure of a layer's memory, with and without edits, and what is typed wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from probes.state_tools import retention_matrix

TEXT = "one two one"


def test_json_holds_the_measures(workbench: Callable) -> None:
    done = workbench("state", "retnet-english", TEXT, "--layer", 1, "--json")
    assert done.code == 0, done.err
    found, model = done.json, models.load("retnet-english")
    expected = retention_matrix(model, TEXT, 1).cosine[0]
    matrix = torch.tensor(
        [[[float("nan") if x is None else x for x in row] for row in head] for head in found["retention"]]
    )
    assert torch.allclose(matrix, expected, atol=1e-5, equal_nan=True)
    assert found["layer"] == 1 and found["edits"] == [] and found["divergence"] is None and found["loss"][0] is None
    assert found["spectrum"]["positions"] == [1, 4, 7, 10] and "state norm" in found["tokens"]


def test_edits_act_and_are_said(workbench: Callable, tmp_path: Path) -> None:
    figure = tmp_path / "kept.json"
    options = ["--do", "reset state 1 after 3", "--implant", "0:4", "--after", 6, "--figure", figure]
    done = workbench("state", "gated-deltanet-random", TEXT, "--layer", 1, *options)
    assert done.code == 0, done.err
    assert "divergence" in done.out and "what is remembered" in done.out and "effective rank" in done.out
    assert done.err.count("Edit: ") == 3  # an implant erases before it writes
    drawn = json.loads(figure.read_text())
    assert len([trace for trace in drawn["data"] if trace["type"] == "heatmap"]) == 4  # one map per head
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(
    "name, words", [("mamba-random", "state 0"), ("lstm-random", "does not store values under keys")]
)
def test_other_memories(workbench: Callable, name: str, words: str) -> None:
    done = workbench("state", name, "ab")
    assert done.code == 0 and words in done.out + done.err and "state norm" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gpt2-random", TEXT], "carries no recurrent state"),
        (["retnet-random", TEXT, "--layer", "9"], "there is no layer 9"),
        (["retnet-random", TEXT, "--after", "3"], "--after does nothing"),
        (["retnet-random", TEXT, "--erase-key", "3"], "act after a token"),
        (["retnet-random", TEXT, "--erase-key", "99", "--after", "2"], "there is no token 99"),
        (["retnet-random", TEXT, "--implant", "3-4", "--after", "2"], "KEY:VALUE"),
        (["retnet-random", TEXT, "--implant", "3:40", "--after", "2"], "there is no token 40"),
        (["mamba-random", TEXT, "--erase-key", "1", "--after", "2"], "has no key"),
        (["retnet-random", TEXT, "--do", "reste state 1 after 3"], "reste"),
        (["retnet-random", TEXT, "--figure", "x.png"], ".html or .json"),
        (["retnet-random"], "no text was given"),
        (["retnet-randm", TEXT], "Did you mean"),
    ],
)
def test_what_is_typed_wrongly_is_named(workbench: Callable, options: list[str], words: str) -> None:
    failed = workbench("state", *options)
    assert failed.code in (1, 2) and words in failed.err and failed.out == ""
