"""`workbench segments`, as a person and as a program calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import models
from probes.segments import segment_memory
from workbench.lab.runs import RunStore

TEXT = "one two three four one two three four"
OTHER = "a cat sat"


def test_json_is_what_python_gives(workbench: Callable, tmp_path: Path) -> None:
    done = workbench(
        "segments", "retnet-english", TEXT, "--length", "12", "--other", OTHER, "--json", "--out", tmp_path
    )
    assert done.code == 0, done.err
    found = segment_memory(models.load("retnet-english"), TEXT, 12, other=OTHER)
    told = done.json
    assert {name: told[name] for name in ("starts", "layers", "slots", "repeated")} == {
        "starts": [0, 12, 24], "layers": ["0", "1", "2", "3"], "slots": [f"{layer}.state" for layer in range(4)], "repeated": 3,
    }  # fmt: skip
    for reading in ("none", "other"):
        assert told["worth"][reading]["nats"] == pytest.approx(found.worth(reading)[0])
    np.testing.assert_allclose(np.array(told["lost_by_layer"]["cut"], float), found.by_layer("cut"))
    run = RunStore(tmp_path).open(told["id"])
    np.testing.assert_array_equal(run.array("loss.other"), found.loss["other"])
    assert run.manifest["settings"] == {
        "model": "retnet-english",
        "length": 12,
        "text": TEXT,
        "other": OTHER,
        "parts": True,
    }


def test_for_people(workbench: Callable, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    asked = ["segments", "gpt-english", TEXT, "--length", "12", "--out", tmp_path / "runs"]
    done = workbench(*asked, "--other-file", tmp_path / "other.txt")
    assert done.code == 0, done.err
    assert "true state" in done.out and "saves" in done.out and "layer 3" in done.out and "2.key" in done.out
    assert "begun 3 times" in done.err and "Stored as" in done.err
    plain = workbench(*asked, "--no-parts")
    assert "layer 3" not in plain.out and "With --other TEXT" in plain.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retnet-english", TEXT, "--length", "64"], "at least 66"),
        (["retnet-english", TEXT, "--other", "a", "--other-file", __file__], "given twice"),
        (["t5-random", TEXT], "encoder-decoder"),
        (["retnet-english", TEXT, "--length", "1"], "--length"),
    ],
)
def test_mistakes_are_named(workbench: Callable, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = workbench("segments", *arguments, "--out", tmp_path)
    assert done.code != 0 and words in done.err and not list(tmp_path.glob("2*"))
