"""`workbench intervene`: JSON and for people, baskets from files, prompts by line, what the model takes, and what is typed wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from probes.interventions import Operation, intervene
from workbench.lab.runs import RunStore


def test_json_is_what_python_gives(workbench: Callable, tmp_path: Path) -> None:
    text = "the cat sat on the mat"
    done = workbench(
        "intervene", "gpt-english", text, "--do", "zero head 1.2", "--do", "scale mlp 2 by 0.5", "--target", "e", "--against", " ",
        "--controls", 2, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    run = RunStore(tmp_path).open(done.json["id"])
    operations = [Operation.from_json(record) for record in run.manifest["interventions"]]
    assert [str(operation) for operation in operations] == ["zero head 1.2", "scale mlp 2 by 0.5"]
    same = intervene(models.load("gpt-english"), text, operations, target="e", wrong=" ", controls=2)
    for measure, found in done.json["results"]["changes"].items():
        assert found["value"] == pytest.approx(same.change(measure).value, abs=1e-9)
        assert found["controls"] == pytest.approx(same.change(measure).controls.tolist(), abs=1e-9)


def test_for_people_from_a_file_and_by_line(workbench: Callable, tmp_path: Path) -> None:
    (tmp_path / "basket.txt").write_text("# no comment syntax\n", encoding="utf-8")
    failed = workbench(
        "intervene", "retnet-english", "abc", "--basket", tmp_path / "basket.txt", "--out", tmp_path / "runs"
    )
    assert failed.code == 1 and "no edit is called '#'" in failed.err
    (tmp_path / "basket.txt").write_text("reset state 1 after 3\n\nzero mlp 0 at 2\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("one two three\nfour five\n", encoding="utf-8")
    done = workbench(
        "intervene", "retnet-english", "-f", tmp_path / "text.txt", "--each-line", "--basket", tmp_path / "basket.txt", "--controls", 1,
        "--out", tmp_path / "runs",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "logit of the target" in done.out and "next token" in done.out and "Stored as" in done.err
    (entry,) = RunStore(tmp_path / "runs").list()
    assert RunStore(tmp_path / "runs").open(entry.id).manifest["settings"]["prompts"] == ["one two three", "four five"]


def test_what_a_model_takes(workbench: Callable) -> None:
    done = workbench("intervene", "gpt-english", "--list", "--json")
    assert done.json["zero"]["refused"] == "" and "head" in done.json["zero"]["places"]
    assert "no layer carries a recurrent state" in done.json["reset"]["refused"]
    assert "no: only a BDH" in workbench("intervene", "gpt-english", "--list").out


def test_features_of_a_folder(workbench: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    from probes.features import TopK, build_dictionary, save_dictionary

    model = models.load("gpt-english")
    (tmp_path / "found" / "dictionary").mkdir(parents=True)
    save_dictionary(
        build_dictionary(TopK(n_features=64, k=8), model.d_model),
        tmp_path / "found" / "dictionary" / "dictionary.safetensors",
    )
    (tmp_path / "found" / "features.json").write_text(
        '{"model": "gpt-english", "site": "blocks.2.hook_resid_post"}', encoding="utf-8"
    )
    options = [
        "--do",
        "feature mine 3,4,5,6,7,8,9,10,11,12 to 0",
        "--dictionary",
        f"mine={tmp_path / 'found'}",
        "--controls",
        2,
    ]
    done = workbench("intervene", "gpt-english", "the cat sat", *options, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.err
    assert len(done.json["results"]["controls"]) == 2 and done.json["results"]["changes"]["top"]["value"] != 0
    failed = workbench(
        "intervene",
        "gpt-english",
        "the cat",
        "--do",
        "feature mine 3 to 0",
        "--dictionary",
        f"mine={tmp_path}",
        "--out",
        tmp_path / "runs",
    )
    assert failed.code == 1 and "no folder of" in failed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gpt-english", "abc"], "nothing to do"),
        (["gpt-english", "abc", "--do", "zer head 1.2"], "Did you mean 'zero'"),
        (["gpt-english", "abc", "--do", "zero head 9.2"], "layers 0 to 3"),
        (["gpt-english", "abc", "--do", "reset state 0 after 1"], "no recurrent state"),
        (["retnet-english", "abc", "--do", "keep head 1.1 top 2"], "no layer has scores that a softmax follows; `cut` takes edges"),
        (["bdh-english", "abcdefgh", "--do", "star layer 1 block 2 after 4"], "no layer has scores that a softmax follows"),
        (["gpt-english", "abc", "--do", "zero mlp 1", "--target", "ab"], "Expected exactly one"),
        (["gpt-english", "abc", "--do", "zero mlp 1", "--dictionary", "x"], "NAME=FOLDER"),
        (["gpt-englsh", "abc", "--do", "zero mlp 1"], "Did you mean"),
    ],
)
def test_what_is_typed_wrongly_is_named(workbench: Callable, tmp_path: Path, options: list[str], words: str) -> None:
    failed = workbench("intervene", *options, "--out", tmp_path)
    assert failed.code == 1 and words in failed.err and failed.out == ""
    assert RunStore(tmp_path).list() == []
