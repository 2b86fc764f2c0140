"""`workbench weights`: heads from weights."""

from __future__ import annotations

from collections.abc import Callable


def test_composition_and_directions_as_json(workbench: Callable) -> None:
    shown = workbench(
        "weights",
        "induction-circuit",
        "--composition",
        "--svd",
        "1.0",
        "--fold-norms",
        "--top",
        "2",
        "--draws",
        "5",
        "--json",
    )
    assert shown.code == 0
    best = max(shown.json["composition"]["largest"], key=lambda pair: pair["score"])
    assert best["kind"] == "K" and best["earlier"] == [0, 2] and best["later"][0] == 1
    assert shown.json["composition"]["scores"]["V"][4][0] is None
    assert len(shown.json["processing"]["folded"]) == 3
    (record,) = shown.json["svd"]
    assert (record["layer"], record["head"], record["map"]) == (1, 0, "ov") and len(record["directions"]) == 2


def test_tables(workbench: Callable) -> None:
    shown = workbench("weights", "gpt-random", "--composition", "--svd", "0.1", "--map", "qk", "--draws", "2")
    assert shown.code == 0 and "K (keys)" in shown.out and "queries, other way" in shown.out


def test_without_options_it_says_what_is_possible(workbench: Callable) -> None:
    shown = workbench("weights", "gemma2-random")
    assert (
        shown.code == 0 and "caps its logits" in shown.out and "RMS norms" in shown.out and "blocks.0.ln1" in shown.out
    )


def test_a_head_that_is_no_head(workbench: Callable) -> None:
    shown = workbench("weights", "gpt-random", "--svd", "first")
    assert shown.code == 1 and "names no head" in shown.err
    shown = workbench("weights", "mamba-random", "--composition")
    assert shown.code == 1 and "no linear map" in shown.err
