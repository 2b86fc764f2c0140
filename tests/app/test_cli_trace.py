"""`workbench trace`: a real trace of a small model from each source of text, and every way to type it wrongly."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.commands._console import Failure
from app.commands.trace import parse_layers
from workbench.lab.runs import RunStore

TEXT = "A dragon hatches."


def test_a_trace_is_a_run(workbench: Callable, tmp_path: Path) -> None:
    done = workbench("trace", "retnet-random", TEXT, "--out", tmp_path, "--title", "Dragon [x]", "--json")
    assert done.code == 0 and done.err == "", done.err
    run = RunStore(tmp_path).open(done.json["id"])
    assert run.kind == "trace" and run.title == "Dragon [x]" and run.manifest["text"] == TEXT
    assert done.json["tokens"] == len(TEXT) == len(run.array("tokens"))
    assert done.json["layers"] == len(run.layers) and done.json["arrays"] == len(run.arrays())
    assert Path(done.json["path"]) == run.path and done.json["model"] == "retnet-random"


def test_for_people_it_says_what_comes_next(workbench: Callable, tmp_path: Path) -> None:
    done = workbench("trace", "gpt2-random", TEXT, "--out", tmp_path)
    (entry,) = RunStore(tmp_path).list()
    assert done.code == 0 and entry.id in done.out and f"workbench serve --runs {tmp_path}" in done.err


def test_text_from_a_file_and_from_standard_input(
    workbench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("from a file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped in")))
    options = ("--out", tmp_path / "runs", "--json")
    for source in (("--file", file), ("-",)):
        assert workbench("trace", "gpt2-random", *source, *options).code == 0
    texts = {
        RunStore(tmp_path / "runs").open(entry.id).manifest["text"] for entry in RunStore(tmp_path / "runs").list()
    }
    assert texts == {"from a file", "piped in"}


def test_the_layers_asked_for_reach_the_trace(
    workbench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workbench.lab.trace as trace

    asked = []
    real = trace.trace_run

    def recording(*arguments: object, layers: list[int] | None, **named: object) -> object:
        asked.append(layers)
        return real(*arguments, **named)

    monkeypatch.setattr(trace, "trace_run", recording)
    for options in ((), ("--layers", "2,0")):
        assert workbench("trace", "gpt2-random", TEXT, "--out", tmp_path, *options).code == 0
    assert asked == [None, [0, 2]]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["gtp2-random", TEXT], 1, "Did you mean 'gpt2"),
        (["gpt2-random"], 1, "no text was given"),
        (["gpt2-random", ""], 1, "the text is empty"),
        (["gpt2-random", TEXT, "--file", __file__], 1, "given twice"),
        (["gpt2-random", "--file", "no-such-file.txt"], 2, "does not exist"),
        (["gpt2-random", TEXT, "--layers", "0,9"], 1, "layers are 0 to 2"),
        (["gpt2-random", "x" * 100], 1, "64"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_is_typed_wrongly_is_named(
    workbench: Callable, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    failed = workbench("trace", *options, "--out", tmp_path)
    assert failed.code == code and words in failed.err, failed.err
    assert failed.out == "" and "Traceback" not in failed.err
    assert RunStore(tmp_path).list() == []


def test_layers_in_words() -> None:
    assert parse_layers("0,2-4", 6) == [0, 2, 3, 4]
    assert parse_layers(" 3 , 1-1", 6) == [1, 3]
    for wrong in ("", "a", "1-", "-1", "4-2", "6", "1,,2", "²"):
        with pytest.raises(Failure):
            parse_layers(wrong, 6)
