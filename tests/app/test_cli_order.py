"""`workbench order`, as a person and as a program calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import models
from probes.document_order import plan_order

LINES = "The cat sat.\nA dog ran.\nRain fell.\nWho sat? The "


def test_json_is_what_python_gives(workbench: Callable, tmp_path: Path) -> None:
    done = workbench("order", "gpt-english", LINES, "--answer", "c", "--bases", "10000,17500", "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    found = plan_order(
        models.load("gpt-english"), [f"{line}\n" for line in LINES.splitlines()[:-1]], "Who sat? The ", answer="c", bases=[10000.0, 17500.0]
    )
    told = done.json
    assert told["orders"]["attention sorting"] == list(found.orders["attention sorting"])
    assert told["answers"] == pytest.approx(found.answers) and told["profile"] == pytest.approx(found.profile.tolist())
    assert (tmp_path / told["id"] / "manifest.json").is_file()


def test_for_people(workbench: Callable, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(LINES, encoding="utf-8")
    done = workbench("order", "gpt-english", "--file", tmp_path / "prompt.txt", "--out", tmp_path / "runs")
    assert done.code == 0, done.err
    assert "attention sorting" in done.out and "attnrank" in done.out and "The cat sat." in done.out and "Stored as" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["gpt-english", "One line."], "0 documents"), (["gpt-english", LINES, "--bases", "a"], "--bases is 'a'"),
     (["retnet-english", LINES], "distribution")],
)  # fmt: skip
def test_mistakes_are_named(workbench: Callable, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = workbench("order", *arguments, "--out", tmp_path)
    assert done.code != 0 and words in done.err and not list(tmp_path.glob("2*"))
